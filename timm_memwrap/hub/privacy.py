"""What of a memory bank may leave the machine."""

import dataclasses
from collections.abc import Iterable

from timm_memwrap.memory_bank import MemoryBank, SampleId
from timm_memwrap.sample_ids import short_name

__all__ = ["public_bank"]


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
        provenance = dataclasses.replace(bank.provenance, dataset=short_name(bank.provenance.dataset))
        public.replace(encodings, labels, ids, images, bank.class_names, provenance, encodings.dtype)
        public.set_reference(bank.reference)
    return public


def _public_ids(ids: Iterable[SampleId], classes: Iterable[str]) -> list[SampleId]:
    """Reduces ids that look like paths, and keeps them unique."""
    reduced = [i if isinstance(i, int) else short_name(i, name) for i, name in zip(ids, classes, strict=True)]
    taken = {new for new, old in zip(reduced, ids, strict=True) if new == old}
    public: list[SampleId] = []
    # The first number of each name that may be free. All below it are taken, and stay so.
    first: dict[SampleId, int] = {}
    for new, old in zip(reduced, ids, strict=True):
        candidate, number = new, first.get(new, 1)
        while new != old and (candidate := f"{new} ({number})" if number > 1 else new) in taken:
            number += 1
        if new != old:
            first[new] = number + 1
        public.append(candidate)
        taken.add(candidate)
    return public
