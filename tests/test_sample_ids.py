"""Ids of samples: unique, and the same for those who hold them whatever is added for others."""

import copy
import pickle

import numpy as np
import pytest
import torch

from timm_memwrap.sample_ids import SampleIds, plain_ids


def test_ids_are_text_or_whole_numbers_of_any_library() -> None:
    ids = plain_ids(["a", 1, np.int64(2), torch.tensor(3)])
    assert ids == ["a", 1, 2, 3]
    assert [type(sample_id) for sample_id in ids] == [str, int, int, int]
    for wrong in (1.5, None, b"a"):
        with pytest.raises(ValueError, match="neither text nor a whole number"):
            plain_ids([wrong])


def test_added_ids_leave_the_ids_that_they_are_added_to_as_they_were() -> None:
    first = SampleIds(["a", 1])
    second, third = first.added(["b"]), first.added([2, "c"])
    for ids, expected in ((first, ["a", 1]), (second, ["a", 1, "b"]), (third, ["a", 1, 2, "c"])):
        for same in (ids, copy.deepcopy(ids), pickle.loads(pickle.dumps(ids))):
            assert list(same) == same[:] == expected
            assert same[-1] == expected[-1]
            assert same.positions(expected) == list(range(len(expected)))
            assert all((sample_id in same) == (sample_id in expected) for sample_id in ("a", 1, "b", 2, "c", "d"))
    assert first != second
    assert third.added(["b"])[:] == ["a", 1, 2, "c", "b"]


@pytest.mark.parametrize("more", [["a"], ["b", "b"], [1.5], ["b", 7, "b"]])
def test_ids_that_do_not_fit_change_nothing(more: list) -> None:
    ids = SampleIds(["a", 1])
    with pytest.raises(ValueError, match=r"already|more than once|neither"):
        ids.added(more)
    assert ids.added(["b", 7])[:] == ["a", 1, "b", 7]


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_outside_is_an_index_error(index: int) -> None:
    ids = SampleIds("abc")
    ids.added("def")
    with pytest.raises(IndexError):
        ids[index]


def test_unknown_ids_are_named() -> None:
    with pytest.raises(ValueError, match=r"No sample with id 'x', 5 in the memory of 1 samples.*'a'"):
        SampleIds("a").positions(["a", "x", 5])
