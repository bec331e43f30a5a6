"""The buffers of a bank: what is taken, and what is refused with its name."""

import pytest
import torch
from torch import Tensor

from timm_memwrap.bank_format import BUFFERS, REQUIRED, check_state, parse_state
from timm_memwrap.meaning import Meaning
from timm_memwrap.sample_ids import SampleIds

MEANING = Meaning(SampleIds(["a", 2]), ["cat", "狗"])


def _state() -> dict[str, Tensor]:
    return {"encodings": torch.zeros(2, 4), "labels": torch.tensor([0, 1]), "meaning": MEANING.to_tensor()}


def test_a_state_is_parsed_with_the_buffers_that_it_lacks_as_none() -> None:
    state, meaning = parse_state(_state(), "a file")
    assert state.keys() == BUFFERS.keys()
    assert state["images"] is None
    assert meaning == MEANING


@pytest.mark.parametrize("name", REQUIRED)
def test_a_state_that_lacks_a_buffer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"in a file lacks '{name}'"):
        parse_state({key: tensor for key, tensor in _state().items() if key != name}, "a file")


def test_a_state_with_another_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a file is not a memory bank.*'weight'"):
        parse_state({**_state(), "weight": torch.zeros(1)}, "a file")


def test_meta_tensors_are_checked_by_shape_alone() -> None:
    meta = {name: tensor.to("meta") for name, tensor in _state().items()}
    check_state(dict(meta), MEANING)
    with pytest.raises(ValueError, match="encodings"):
        check_state({**meta, "encodings": torch.zeros(3, 4, device="meta")}, MEANING)
