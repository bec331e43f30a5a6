"""Where the pictures of memory samples are that the bank does not hold."""

from typing import Any

from timm_memwrap.data import SampleImages
from timm_memwrap.model import MemoryWrapModel

__all__ = ["stored_images"]


def stored_images(model: MemoryWrapModel, dataset: Any = None) -> SampleImages | None:
    """Returns the samples' pictures in `dataset`, else in the data set on the Hub that the bank names.

    That is asked for a picture when it is needed, and never where the bank has pictures itself. `None` if there are no
    other pictures than the bank's.
    """
    if dataset is not None:
        return SampleImages(model, dataset)
    bank = model.memory_bank
    if bank.images is not None or not bank.provenance.image_dataset:
        return None
    from timm_memwrap.hub.pinned_images import PinnedImages

    return SampleImages(model, PinnedImages(bank), complete=False)
