"""The buffers of a bank and the JSON among them: what is taken, and what is refused with its name."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from timm_memwrap.bank_format import (
    BUFFERS,
    REQUIRED,
    Meaning,
    Provenance,
    Reference,
    check_state,
    parse_state,
    plain_ids,
    plain_names,
)

REFERENCE = Reference("joint", 7, [i / 100 for i in range(101)])
MEANING = Meaning(["a", 2], ["cat", "狗"], Provenance("animals", "balanced", 3, 50, "abc"), REFERENCE)


def _state() -> dict[str, Tensor]:
    return {"encodings": torch.zeros(2, 4), "labels": torch.tensor([0, 1]), "meaning": MEANING.to_tensor()}


def _text(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "meaning",
    [
        MEANING,
        Meaning(),
        Meaning([b"caf\xe9.png".decode(errors="surrogateescape")], ['"\n\\'], Provenance()),
        Meaning(["1", 1], [], Provenance(seed=None, population=None)),
    ],
)
def test_meaning_comes_back_as_it_was(meaning: Meaning) -> None:
    tensor = meaning.to_tensor()
    assert tensor.dtype == torch.uint8
    assert tensor.ndim == 1
    assert Meaning.from_tensor(tensor) == meaning


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"format_version": 99}, r"format_version=99.*Upgrade"),
        ({"format_version": None}, r"format_version=None"),
        ({"ids": None}, "ids"),
        ({"ids": [True]}, "ids"),
        ({"ids": [1.5]}, "ids"),
        ({"ids": [[1]]}, "ids"),
        ({"class_names": [1]}, "class_names"),
        ({"class_names": "cat"}, "class_names"),
        ({"provenance": []}, "provenance"),
        ({"provenance": {"seed": "1"}}, "provenance"),
        ({"provenance": {"population": True}}, "provenance"),
        ({"provenance": {"encoder": None}}, "provenance"),
        ({"reference": []}, "reference"),
        ({"reference": {"count": 7}}, "reference"),
        ({"reference": {"count": -1, "quantiles": REFERENCE.quantiles}}, "reference"),
        ({"reference": {"count": True, "quantiles": REFERENCE.quantiles}}, "reference"),
        ({"reference": {"count": 7, "quantiles": REFERENCE.quantiles[::-1]}}, "reference"),
        ({"reference": {"count": 7, "quantiles": [*REFERENCE.quantiles[1:], math.inf]}}, "reference"),
        ({"reference": {"count": 7, "quantiles": [*REFERENCE.quantiles[1:], 10**400]}}, "reference"),
        ({"reference": {"count": 7, "quantiles": [math.nan, *REFERENCE.quantiles[1:]]}}, "reference"),
        ({"reference": {"count": 7, "quantiles": REFERENCE.quantiles[1:]}}, "reference"),
        ({"reference": {"count": 0, "quantiles": REFERENCE.quantiles}}, "reference"),
        ({"reference": {"read": 1}}, "reference"),
        ({"reference": {"weather": "fine"}}, "reference"),
    ],
)
def test_meaning_of_another_kind_is_refused(change: dict[str, Any], quoted: str) -> None:
    found = json.loads(bytes(MEANING.to_tensor().numpy()))
    with pytest.raises(ValueError, match=quoted):
        Meaning.from_tensor(_text({**found, **change}))


@pytest.mark.parametrize("text", [b"{", b"\xff\xff", b"[" * 100_000, b""])
def test_meaning_that_is_not_json_is_refused(text: bytes) -> None:
    tensor = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(ValueError, match="not JSON"):
        Meaning.from_tensor(tensor)


def test_provenance_of_a_later_version_is_read_without_what_is_unknown() -> None:
    found = json.loads(bytes(MEANING.to_tensor().numpy()))
    found["provenance"]["weather"] = "fine"
    assert Meaning.from_tensor(_text(found)) == MEANING


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


def test_ids_are_text_or_whole_numbers_of_any_library() -> None:
    ids = plain_ids(["a", 1, np.int64(2), torch.tensor(3)])
    assert ids == ["a", 1, 2, 3]
    assert [type(sample_id) for sample_id in ids] == [str, int, int, int]
    for wrong in (1.5, None, b"a"):
        with pytest.raises(ValueError, match="neither text nor a whole number"):
            plain_ids([wrong])


def test_class_names_are_text() -> None:
    assert plain_names(("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match="Class name 3"):
        plain_names(["a", 3])  # type: ignore[list-item]
