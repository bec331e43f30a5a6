"""What the buffers of a memory bank must be, and the JSON among them.

Shapes: M memory samples, D width of an encoding.
"""

import json
import math
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from timm_memwrap.constants import BANK_FORMAT_VERSION

__all__ = [
    "BUFFERS",
    "DTYPES",
    "QUANTILES",
    "REQUIRED",
    "Meaning",
    "Provenance",
    "Reference",
    "SampleId",
    "check_state",
    "parse_state",
]

# name: (dtype, number of dimensions)
BUFFERS = {
    "encodings": (torch.float32, 2),
    "labels": (torch.int64, 1),
    "images": (torch.uint8, 4),
    "meaning": (torch.uint8, 1),
}
REQUIRED = ("encodings", "labels", "meaning")
# What encodings may be stored in. All but the first lose digits; a read is in float32 whatever they are stored in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Values that a reference is described by.
QUANTILES = 101

SampleId = int | str


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
    """

    dataset: str = ""
    selection: str = ""
    seed: int | None = None
    population: int | None = None
    encoder: str = ""
    appended: int = 0
    removed: int = 0


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
    """What of a bank is not a number. Travels as JSON in a uint8 buffer, so that stock timm restores it."""

    ids: list[SampleId] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    provenance: Provenance = field(default_factory=Provenance)
    reference: Reference = field(default_factory=Reference)

    def to_tensor(self) -> Tensor:
        """Returns the JSON as bytes."""
        text = json.dumps({"format_version": BANK_FORMAT_VERSION, **asdict(self)}, ensure_ascii=False)
        # A file name need not be Unicode: Python then gives it surrogates.
        return torch.frombuffer(bytearray(text.encode(errors="surrogatepass")), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Meaning":
        """Parses what `to_tensor` returned, or raises a `ValueError`."""
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
        return cls(ids, names, Provenance(**kept), Reference(**reference))


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


def plain_ids(ids: Iterable[Any]) -> list[SampleId]:
    """Returns ids that JSON brings back as they are: text, and whole numbers of any library."""
    plain: list[SampleId] = []
    for sample_id in ids:
        try:
            plain.append(sample_id if isinstance(sample_id, str) else operator.index(sample_id))
        except TypeError:
            raise ValueError(
                f"Id {sample_id!r} is neither text nor a whole number. Pass file names or positions."
            ) from None
    return plain


def plain_names(class_names: Iterable[str]) -> list[str]:
    """Returns class names as a list, and raises if one is not text."""
    names = list(class_names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"Class name {wrong[0]!r} is not text. Pass a list of names, by label.")
    return names


def parse_state(found: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor | None], Meaning]:
    """Returns the buffers of a bank that are in a file or state dict, and their meaning, or raises a `ValueError`."""
    unknown = sorted(set(found) - set(BUFFERS))
    if unknown:
        raise ValueError(f"{source} is not a memory bank: it holds {unknown[:5]}. Pass what bank.save wrote.")
    for name in REQUIRED:
        if name not in found:
            raise ValueError(f"The memory bank in {source} lacks {name!r}. The file is damaged, or not a memory bank.")
    meaning = found["meaning"]
    if meaning.dtype != torch.uint8 or meaning.ndim != 1:
        raise ValueError(
            f"The memory bank in {source} has a meaning of {meaning.dtype} {list(meaning.shape)}, not text."
        )
    return {name: found.get(name) for name in BUFFERS}, Meaning.from_tensor(meaning)


def check_state(state: dict[str, Tensor | None], meaning: Meaning) -> None:
    """Raises a `ValueError` if the buffers of a bank do not fit each other."""
    encodings, labels = state["encodings"], state["labels"]
    assert encodings is not None and labels is not None
    size = len(labels) if labels.ndim else 0
    for name, (dtype, ndim) in BUFFERS.items():
        tensor = state.get(name)
        if tensor is None or name == "meaning":
            continue
        allowed = DTYPES if name == "encodings" else (dtype,)
        if tensor.dtype not in allowed or tensor.ndim != ndim or len(tensor) != size:
            raise ValueError(
                f"The memory bank's {name} are {tensor.dtype} of shape {list(tensor.shape)}; expected {dtype} with "
                f"{ndim} dimensions, the first of length {size} as the labels have."
            )
    images = state.get("images")
    if images is not None and (images.shape[1] not in (1, 3) or 0 in images.shape[2:]):
        raise ValueError(f"The memory bank's images have shape {list(images.shape)}; expected [M, 1 or 3, H, W].")
    if size == 0:
        raise ValueError("No samples to remember: labels have length 0. Call clear() to empty a memory bank.")
    if len(meaning.ids) != size:
        raise ValueError(f"{len(meaning.ids)} ids for {size} samples. Give one id per sample.")
    if len(set(meaning.ids)) != size:
        twice = [sample_id for sample_id, count in Counter(meaning.ids).items() if count > 1]
        raise ValueError(f"Ids must be unique; {twice[:5]} come more than once. Remember a sample once.")
    if encodings.is_meta:
        return
    # NaN and infinity are among the extremes; torch.isfinite would make a tensor of the size of the bank.
    if encodings.numel() and not all(bool(extreme.isfinite()) for extreme in torch.aminmax(encodings)):
        bad = (~torch.isfinite(encodings)).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(bad)} of {size} encodings have NaN or infinite entries, the first for id {meaning.ids[bad[0]]!r}. "
            f"Check the images and the model's weights."
        )
    if int(labels.min()) < 0:
        raise ValueError(f"Label {int(labels.min())} is below 0. Labels are class indices, 0 to num_classes - 1.")
