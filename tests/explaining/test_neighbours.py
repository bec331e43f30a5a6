"""What neighbours tell of labels and of samples out of place, on points whose truth is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap.attention import make_keys
from timm_memwrap.explaining.neighbours import Neighbours, find_neighbours, label_support, out_of_place
from timm_memwrap.explaining.ranking import auroc
from timm_memwrap.search import ExactIndex


def _neighbours(points: Tensor, count: int = 50) -> Neighbours:
    keys = make_keys(points, "cosine")
    return find_neighbours(ExactIndex(keys), keys.vectors, min(count, len(points) - 1))


def _clouds(sizes: list[int], spread: float, seed: int = 0, width: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = F.normalize(torch.randn(len(sizes), width, generator=generator), dim=1)
    return centres[labels] + spread * torch.randn(len(labels), width, generator=generator) / width**0.5, labels


def _relabelled(labels: Tensor, rate: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    wrong = torch.rand(len(labels), generator=generator) < rate
    return torch.where(wrong, (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes, labels)


def test_neighbours_are_the_nearest_others() -> None:
    points, _ = _clouds([30, 30], 1.0)
    units = F.normalize(points, dim=1)
    similarities = (units @ units.T).fill_diagonal_(-9)
    expected = similarities.sort(dim=1, descending=True)
    found = _neighbours(points, 7)
    assert torch.allclose(found.similarities, expected.values[:, :7], atol=1e-6)
    assert torch.equal(found.positions, expected.indices[:, :7])


def test_those_left_out_follow_without_weight() -> None:
    found = Neighbours(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[4, 5, 6, 7]]))
    some = found.without(torch.tensor([[True, False, True, False]]), 3)
    assert some.positions.tolist() == [[5, 7, 4]]
    assert some.similarities[0].tolist() == pytest.approx([0.8, 0.6, 0.6])
    # Where nothing is left, all are as they were.
    assert torch.equal(found.without(torch.ones(1, 4, dtype=torch.bool), 4).similarities, found.similarities)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_wrong_labels_have_less_support_and_the_right_class_is_named(rate: float) -> None:
    points, labels = _clouds([100] * 5, 0.8)
    given = _relabelled(labels, rate)
    wrong = given != labels
    support = label_support(_neighbours(points), given)
    assert support.share.min() >= 0
    assert support.share.max() <= 1
    assert auroc(-support.share, wrong) > 0.99
    assert (support.other[wrong] == labels[wrong]).float().mean() > 0.95


def test_a_rare_class_is_not_suspected_for_being_rare() -> None:
    """Of classes that overlap, a vote alone would call all of the rare one wrong."""
    points, labels = _clouds([312, 120, 60, 25, 8], 2.5)
    found = _neighbours(points)
    shares = label_support(found, labels).share
    votes = (labels[found.positions] == labels.unsqueeze(1)).float().mean(dim=1)
    assert (votes[labels == 4] < 0.1).float().mean() > 0.5
    assert (shares[labels == 4] < 0.3).float().mean() < 0.5


def test_support_does_not_depend_on_the_numbers_of_classes_or_the_order() -> None:
    points, labels = _clouds([40, 30, 20], 1.5)
    given = _relabelled(labels, 0.2)
    expected = label_support(_neighbours(points, 20), given)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(1))
    number = torch.tensor([70, 3, 11])
    again = label_support(_neighbours(points[order], 20), number[given[order]])
    assert torch.allclose(again.share, expected.share[order], atol=1e-5)
    assert torch.equal(again.other, number[expected.other[order]])


def test_one_class_and_equal_samples_are_supported() -> None:
    one = label_support(_neighbours(torch.eye(4), 3), torch.zeros(4, dtype=torch.long))
    assert one.share.tolist() == [1.0] * 4
    assert one.other.tolist() == [0] * 4
    equal = label_support(_neighbours(torch.ones(6, 3), 5), torch.tensor([0, 0, 0, 0, 0, 1]))
    assert equal.share[5] < 0.3 < equal.share[0]
    assert int(equal.other[5]) == 0


def test_strangers_are_out_of_place_and_nothing_else() -> None:
    points, labels = _clouds([200, 200], 0.7)
    # On the other side of the origin, and labelled as what they are least unlike is not.
    strangers = torch.randn(4, 32, generator=torch.Generator().manual_seed(5)) - 2 * (points[:4] + points[-4:])
    likeness = F.normalize(strangers, dim=1) @ torch.stack([points[labels == i].mean(dim=0) for i in range(2)]).T
    points, given = torch.cat([points, strangers]), torch.cat([labels, likeness.argmin(dim=1)])
    found = _neighbours(points)
    out = out_of_place(found, label_support(found, given).share)
    assert out[-4:].all()
    assert out[:-4].sum() <= 1
    # A sample that its label is right for is not, however far it is.
    assert not out_of_place(found, torch.ones(len(points))).any()


def test_it_finds_as_much_as_cleanlab_on_the_digits() -> None:
    """Features are the pixels; cleanlab gets the predictions of a cross-validated classifier, as its authors advise."""
    from cleanlab.filter import find_label_issues
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    data = load_digits()
    pixels, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    ours, theirs = [], []
    for seed in range(3):
        given = _relabelled(labels, 0.2, seed)
        wrong = given != labels
        support = label_support(_neighbours(pixels), given)
        model = LogisticRegression(max_iter=300)
        probabilities = cross_val_predict(model, pixels.numpy(), given.numpy(), cv=5, method="predict_proba")
        for found, suspected in (
            (ours, support.share < 0.3),
            (theirs, torch.tensor(find_label_issues(given.numpy(), probabilities, n_jobs=1))),
        ):
            found.append(2 * float((suspected & wrong).sum()) / float(suspected.sum() + wrong.sum()))
    assert np.mean(ours) > 0.9
    assert np.mean(ours) > np.mean(theirs) - 0.02
