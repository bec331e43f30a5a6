"""What of a memory bank may leave the machine."""

import dataclasses

from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.sample_ids import public_ids, short_name

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
        ids = public_ids(bank.ids, classes)
        images = bank.images if include_images else None
        provenance = dataclasses.replace(bank.provenance, dataset=short_name(bank.provenance.dataset))
        public.replace(encodings, labels, ids, images, bank.class_names, provenance, encodings.dtype)
        public.set_reference(bank.reference)
    return public
