"""The JSON of a bank: what is taken, what is refused with its name, and what follows when it is written to."""

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from timm_memwrap.meaning import LiveMeaning, Meaning, Provenance, Reference, plain_names
from timm_memwrap.sample_ids import SampleIds

REFERENCE = Reference("joint", 7, [i / 100 for i in range(101)])
MEANING = Meaning(SampleIds(["a", 2]), ["cat", "狗"], Provenance("animals", "balanced", 3, 50, "abc"), REFERENCE)


def _text(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "meaning",
    [
        MEANING,
        Meaning(),
        Meaning(SampleIds([b"caf\xe9.png".decode(errors="surrogateescape")]), ['"\n\\'], Provenance()),
        Meaning(SampleIds(["1", 1]), [], Provenance(seed=None, population=None)),
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


def test_class_names_are_text() -> None:
    assert plain_names(("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match="Class name 3"):
        plain_names(["a", 3])  # type: ignore[list-item]


def test_a_meaning_follows_its_text_as_does_each_copy_from_then_on() -> None:
    live, other = LiveMeaning(MEANING), Meaning(SampleIds(["z", 9]), ["cat", "狗"], MEANING.provenance, REFERENCE)
    live.text(torch.device("cpu")).copy_(other.to_tensor())
    for one in (live, copy.deepcopy(live), pickle.loads(pickle.dumps(live))):
        assert one.read() == other
        assert torch.equal(one.text(torch.device("cpu")), other.to_tensor())
