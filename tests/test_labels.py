"""Labels of either kind: what is remembered of them, and what logits say."""

import pytest
import torch

from timm_memwrap.labels import class_counts, multi_hot, plain_labels, present, probabilities


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32, torch.float16])
def test_multi_hot_labels_of_any_kind_are_remembered_as_bytes(dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=dtype)
    plain = plain_labels(labels)
    assert plain.dtype == torch.uint8
    assert plain.tolist() == [[1, 0, 1], [0, 0, 0]]
    labels.zero_()
    assert plain.sum() == 2


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")])
def test_soft_labels_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        plain_labels(torch.tensor([[1.0, value]]))


def test_both_kinds_say_which_classes_samples_have() -> None:
    assert multi_hot(torch.tensor([2, 0]), 3).tolist() == [[False, False, True], [True, False, False]]
    several = torch.tensor([[1, 1], [0, 0]], dtype=torch.uint8)
    # A class that the model got later is one that no sample has.
    assert multi_hot(several, 3).tolist() == [[True, True, False], [False, False, False]]


def test_a_sample_of_several_classes_counts_for_each() -> None:
    assert class_counts(torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.uint8)) == {0: 1, 1: 2}
    assert class_counts(torch.tensor([3, 0, 3])) == {0: 1, 3: 2}
    assert class_counts(None) == {}


def test_a_class_is_present_where_it_is_more_probable_than_not() -> None:
    logits = torch.tensor([[2.0, 1e-3, 0.0, -1e-3]])
    assert present(logits).tolist() == [[True, True, False, False]]
    assert probabilities(logits, multi_label=True)[0, 2] == 0.5
    assert probabilities(logits, multi_label=False).sum() == pytest.approx(1.0)
