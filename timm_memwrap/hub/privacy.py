"""What of a memory bank may leave the machine."""

import dataclasses
import re
from collections.abc import Iterable

from timm_memwrap.memory_bank import MemoryBank, SampleId

__all__ = ["file_name", "public_bank"]


def public_bank(bank: MemoryBank, include_images: bool = False) -> MemoryBank:
    """Returns what of a bank may be published: no images unless asked for, and no paths of this machine.

    Of an id that looks like a path, its name stays, and its last folder where that is the sample's class name, which
    is published anyway: by both a picture can still be found in the data.
    """
    public = MemoryBank()
    if bank.encodings is None or bank.labels is None:
        return public
    names = bank.class_names
    classes = [names[label] if label < len(names) else "" for label in bank.labels.tolist()]
    public.replace(
        bank.encodings,
        bank.labels,
        _public_ids(bank.ids, classes),
        bank.images if include_images else None,
        names,
        dataclasses.replace(bank.provenance, dataset=file_name(bank.provenance.dataset)),
        bank.encodings.dtype,
    )
    return public


def file_name(path: str, folder: str = "") -> str:
    """Returns the last part of a path or link, of any system, without the query of a link.

    Args:
        path: The path.
        folder: Its last folder stays if it is this one.
    """
    if "://" in path:
        path = re.split(r"[?#]", path, maxsplit=1)[0]
    if not re.search(r"[/\\]", path):
        return path
    parts = re.split(r"[/\\]+", path.rstrip("/\\"))
    keeps_folder = bool(folder) and parts[-2:-1] == [folder]
    return "/".join(parts[-2:] if keeps_folder else parts[-1:]) or "unnamed"


def _public_ids(ids: Iterable[SampleId], classes: Iterable[str]) -> list[SampleId]:
    """Reduces ids that look like paths, and keeps them unique."""
    reduced = [i if isinstance(i, int) else file_name(i, name) for i, name in zip(ids, classes, strict=True)]
    taken = {new for new, old in zip(reduced, ids, strict=True) if new == old}
    public: list[SampleId] = []
    for new, old in zip(reduced, ids, strict=True):
        candidate, count = new, 1
        while new != old and candidate in taken:
            count += 1
            candidate = f"{new} ({count})"
        taken.add(candidate)
        public.append(candidate)
    return public
