"""What of a memory bank may leave the machine."""

import dataclasses
import re
from collections.abc import Iterable
from itertools import chain, count

from timm_memwrap.memory_bank import MemoryBank, SampleId

__all__ = ["file_name", "public_bank"]


def public_bank(bank: MemoryBank, include_images: bool = False) -> MemoryBank:
    """Returns what of a bank may be published: no images unless asked for, and no paths of this machine.

    Of an id that looks like a path, its name stays, and its last folder where that is the sample's class name, which
    is published anyway: by both a picture can still be found in the data.
    """
    public = MemoryBank()
    if len(bank):
        encodings, labels = bank.filled()
        names = dict(enumerate(bank.class_names))
        # A folder is not the one class of a sample that may have several.
        classes = [""] * len(bank) if bank.multi_label else [names.get(label, "") for label in labels.tolist()]
        ids = _public_ids(bank.ids, classes)
        images = bank.images if include_images else None
        provenance = dataclasses.replace(bank.provenance, dataset=file_name(bank.provenance.dataset))
        public.replace(encodings, labels, ids, images, bank.class_names, provenance, encodings.dtype)
        public.set_reference(bank.reference)
    return public


def file_name(path: str, folder: str = "") -> str:
    """Returns the last part of a path or link of any system, and with it the last folder if that is `folder`."""
    if "://" in path:
        # The query of a link may hold a token.
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
        candidates = chain([new], (f"{new} ({number})" for number in count(2)))
        public.append(old if new == old else next(each for each in candidates if each not in taken))
        taken.add(public[-1])
    return public
