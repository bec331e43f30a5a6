"""What of a memory bank is not a number: ids, class names, where its samples come from and what it is compared to."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from timm_memwrap.constants import BANK_FORMAT_VERSION
from timm_memwrap.fingerprint import Watch
from timm_memwrap.sample_ids import SampleIds

__all__ = ["QUANTILES", "LiveMeaning", "Meaning", "Provenance", "Reference", "plain_names"]

# Values that a reference is described by.
QUANTILES = 101


@dataclass(frozen=True)
class Provenance:
    """Where the samples of a bank come from, and which encoder encoded them.

    Args:
        dataset: Name of the data set.
        selection: How the samples were chosen, e.g. `"balanced"`.
        seed: Seed of the choice.
        population: Number of samples that they were chosen from.
        encoder: Fingerprint of the encoder's weights; empty if unknown.
        appended: Number of samples that were remembered since.
        removed: Number of samples that were forgotten since.
        added_classes: Number of classes that were added since. They are the last ones, and what the model's classifier
            knows of them is computed from their samples.
        image_dataset: Data set on the Hub that holds pictures of the samples, `"owner/name@commit"`; empty without one.
    """

    dataset: str = ""
    selection: str = ""
    seed: int | None = None
    population: int | None = None
    encoder: str = ""
    appended: int = 0
    removed: int = 0
    added_classes: int = 0
    image_dataset: str = ""


@dataclass(frozen=True)
class Reference:
    """How near the samples came to held-out images: what the familiarity of an input is measured against.

    Args:
        read: How the samples were read. Of another way to read them it says nothing.
        count: Number of held-out images; 0 without a reference.
        quantiles: 101 quantiles of the remainder over them, from the least to the largest.
    """

    read: str = ""
    count: int = 0
    quantiles: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Meaning:
    """What of a bank is not a number. A state dict has it as JSON in a uint8 tensor, so that stock timm restores it."""

    ids: SampleIds = field(default_factory=SampleIds)
    class_names: list[str] = field(default_factory=list)
    provenance: Provenance = field(default_factory=Provenance)
    reference: Reference = field(default_factory=Reference)

    def to_tensor(self) -> Tensor:
        """Returns the JSON as bytes."""
        return torch.frombuffer(bytearray(self._text), dtype=torch.uint8)

    @cached_property
    def _text(self) -> bytes:
        values = {**vars(self), "ids": self.ids[:], "provenance": asdict(self.provenance)}
        values["reference"] = asdict(self.reference)
        text = json.dumps({"format_version": BANK_FORMAT_VERSION, **values}, ensure_ascii=False)
        # A file name need not be Unicode: Python then gives it surrogates.
        return text.encode(errors="surrogatepass")

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Meaning":
        """Parses what `to_tensor` returned, or raises a `ValueError`."""
        if tensor.is_meta:
            raise ValueError("The memory bank's meaning has no data: it is on the meta device.")
        try:
            data = json.loads(bytes(tensor.cpu().numpy()).decode(errors="surrogatepass"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The memory bank's meaning is not JSON ({error}). The file is damaged.") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != BANK_FORMAT_VERSION:
            raise ValueError(
                f"The memory bank has format_version={version!r}; this version of timm-memwrap reads "
                f"{BANK_FORMAT_VERSION}. Upgrade timm-memwrap, or build the bank again with build_memory_bank."
            )
        ids, names, provenance = data.get("ids"), data.get("class_names"), data.get("provenance")
        reference = data.get("reference", {})
        valid = (
            isinstance(ids, list)
            and all(isinstance(i, int | str) and not isinstance(i, bool) for i in ids)
            and isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and isinstance(provenance, dict)
            and all(_is_valid(provenance, key) for key in _PROVENANCE)
            and _is_reference(reference)
        )
        if not valid:
            raise ValueError(
                "The memory bank's ids, class_names, provenance or reference are missing or of another type. The file "
                "is damaged."
            )
        kept = {k: v for k, v in provenance.items() if k in _PROVENANCE}
        return cls(SampleIds(ids), names, Provenance(**kept), Reference(**reference))


_PROVENANCE = {f.name: type(f.default) for f in fields(Provenance)}


def _is_valid(provenance: dict[str, Any], key: str) -> bool:
    value, kind = provenance.get(key, Provenance.__dataclass_fields__[key].default), _PROVENANCE[key]
    if kind is str:
        return isinstance(value, str)
    return (value is None and kind is not int) or (isinstance(value, int) and not isinstance(value, bool))


def _is_reference(reference: Any) -> bool:
    """Returns whether parsed JSON is a `Reference`: of no images, or numbers that can be compared with."""
    empty = asdict(Reference())
    if not isinstance(reference, dict) or not reference.keys() <= empty.keys():
        return False
    read, count, quantiles = {**empty, **reference}.values()
    return (
        isinstance(read, str)
        and isinstance(count, int)
        and not isinstance(count, bool)
        and count >= 0
        and isinstance(quantiles, list)
        and len(quantiles) == (QUANTILES if count else 0)
        and all(isinstance(value, float) and math.isfinite(value) for value in quantiles)
        and quantiles == sorted(quantiles)
    )


def plain_names(class_names: Iterable[str]) -> list[str]:
    """Returns class names as a list, and raises if one is not text."""
    names = list(class_names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"Class name {wrong[0]!r} is not text. Pass a list of names, by label.")
    return names


class LiveMeaning:
    """The meaning of a bank, and its text once a state dict has it.

    Whoever has a state dict may write to it: timm's average of weights does, and expects that the module follows.
    """

    def __init__(self, meaning: Meaning) -> None:
        self._meaning = meaning
        self._text: Tensor | None = None
        self._watch: Watch | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return LiveMeaning, (self.read(),)

    def read(self) -> Meaning:
        """Returns the meaning, parsed again if its text was written to."""
        if self._text is not None and self._watch is not None and not self._watch.unchanged([self._text]):
            self._meaning, self._watch = Meaning.from_tensor(self._text), Watch([self._text])
        return self._meaning

    def text(self, device: torch.device) -> Tensor:
        """Returns the text, which is made when it is first asked for: for a million ids that takes a while."""
        if self._text is None:
            self._text = self._meaning.to_tensor().to(device)
            self._watch = Watch([self._text])
        return self._text
