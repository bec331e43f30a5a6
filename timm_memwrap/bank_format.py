"""What the buffers of a memory bank must be.

Shapes: M memory samples, D width of an encoding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from timm_memwrap.labels import LABEL_DTYPES, plain_labels
from timm_memwrap.meaning import Meaning, plain_names
from timm_memwrap.sample_ids import SampleId

__all__ = [
    "BUFFERS",
    "DTYPES",
    "ENTRIES",
    "REQUIRED",
    "addition",
    "check_state",
    "is_finite",
    "largest_label",
    "layout_of",
    "parse_state",
    "reserved",
]

# name: (dtype, number of dimensions); labels of several classes are multi-hot, see LABEL_DTYPES
BUFFERS = {
    "encodings": (torch.float32, 2),
    "labels": (torch.int64, 1),
    "images": (torch.uint8, 4),
}
# What a state dict holds, and what of it at least.
ENTRIES = (*BUFFERS, "meaning")
REQUIRED = ("encodings", "labels", "meaning")
# What encodings may be stored in. All but the first lose digits; a read is in float32 whatever they are stored in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def parse_state(found: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor | None], Meaning]:
    """Returns the buffers of a bank that are in a file or state dict, and their meaning, or raises a `ValueError`."""
    unknown = sorted(set(found) - set(ENTRIES))
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


def layout_of(tensors: Mapping[str, Tensor | None]) -> dict[str, list[Any]]:
    """Returns dtype and shape of each tensor by name, as JSON has it: `{"labels": ["int64", [12]]}`."""
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in found.items()}


def reserved(layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns zeros for all that a state dict of a bank holds, as `layout_of` describes it; none for an empty one.

    Raises:
        ValueError: If it is not the layout of a bank.
    """
    found = {name: value for name, value in layout.items() if name != "num_classes"}
    if not found:
        return {}
    try:
        made = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in found.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"memory_layout={str(layout)[:200]} has no dtypes and shapes: {error}.") from error
    if not set(REQUIRED) <= made.keys() <= set(ENTRIES):
        raise ValueError(
            f"memory_layout has {sorted(made)}; expected {', '.join(REQUIRED)} and at most images. Leave it out: "
            f"save_pretrained writes it for loaders that fill tensors in place."
        )
    return made


def check_state(state: dict[str, Tensor | None], meaning: Meaning) -> None:
    """Raises a `ValueError` if the buffers of a bank do not fit each other."""
    encodings, labels = state["encodings"], state["labels"]
    assert encodings is not None and labels is not None
    size = len(labels) if labels.ndim else 0
    for name, (dtype, ndim) in BUFFERS.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        allowed = DTYPES if name == "encodings" else (dtype,)
        if name == "labels" and tensor.ndim in LABEL_DTYPES:
            allowed, ndim = (LABEL_DTYPES[tensor.ndim],), tensor.ndim
        if tensor.dtype not in allowed or tensor.ndim != ndim or len(tensor) != size:
            raise ValueError(
                f"The memory bank's {name} are {tensor.dtype} of shape {list(tensor.shape)}; expected {dtype} with "
                f"{ndim} dimensions, the first of length {size} as the labels have."
            )
    if labels.ndim == 2 and not labels.shape[1]:
        raise ValueError(f"The memory bank's labels have shape {list(labels.shape)}; expected a column for each class.")
    images = state.get("images")
    if images is not None and (images.shape[1] not in (1, 3) or 0 in images.shape[2:]):
        raise ValueError(f"The memory bank's images have shape {list(images.shape)}; expected [M, 1 or 3, H, W].")
    if size == 0:
        raise ValueError("No samples to remember: labels have length 0. Call clear() to empty a memory bank.")
    if len(meaning.ids) != size:
        raise ValueError(f"{len(meaning.ids)} ids for {size} samples. Give one id per sample.")
    if encodings.is_meta:
        return
    if not is_finite(encodings):
        bad = (~torch.isfinite(encodings)).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(bad)} of {size} encodings have NaN or infinite entries, the first for id {meaning.ids[bad[0]]!r}. "
            f"Check the images and the model's weights."
        )
    if labels.ndim == 2:
        if int(labels.max()) > 1:
            raise ValueError(f"A multi-hot label is {int(labels.max())}. Expected 1 for each class that a sample has.")
    elif int(labels.min()) < 0:
        raise ValueError(f"Label {int(labels.min())} is below 0. Labels are class indices, 0 to num_classes - 1.")


def addition(
    state: dict[str, Tensor | None],
    meaning: Meaning,
    encodings: Tensor,
    labels: Tensor,
    ids: Sequence[SampleId],
    images: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor | None], Meaning]:
    """Returns the buffers of new samples for a bank of this state, in its precision, and what they mean.

    Raises:
        ValueError: If they do not fit each other or what is there.
    """
    names = meaning.class_names if class_names is None else plain_names(class_names)
    new: dict[str, Tensor | None] = {"encodings": encodings, "labels": plain_labels(labels), "images": images}
    for name, given in new.items():
        there = state[name]
        if given is None and there is None:
            continue
        if given is None or there is None or given.shape[1:] != there.shape[1:]:
            expected = "none" if there is None else f"[{', '.join(map(str, ['N', *there.shape[1:]]))}]"
            raise ValueError(
                f"{name} has shape {None if given is None else list(given.shape)}; expected {expected}, as the bank "
                f"has. Encode the samples with the same model, and give images for all samples or for none."
            )
        new[name] = given.detach().to(there)
    provenance = replace(meaning.provenance, appended=meaning.provenance.appended + len(labels))
    added = Meaning(meaning.ids.new(ids), names, provenance)
    check_state(new, added)
    return new, added


def is_finite(encodings: Tensor) -> bool:
    """Returns whether encodings have neither NaN nor infinite entries."""
    # Those are among the extremes; torch.isfinite would make a tensor of the size of the bank.
    return not encodings.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(encodings))


def largest_label(labels: Tensor | None) -> int:
    """Returns the largest of labels `[M]`, or that multi-hot `[M, C]` tell of; -1 if there is none to be seen."""
    if labels is not None and labels.ndim == 2:
        return labels.shape[1] - 1
    return -1 if labels is None or labels.is_meta or not labels.numel() else int(labels.max())
