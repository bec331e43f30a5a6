"""What the page is made of."""

import dataclasses
from typing import Any

from timm_memwrap.data import SampleImages
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.model import MemoryWrapModel

__all__ = ["Page"]


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page is made of.

    Args:
        model: The model, in evaluation mode. No visitor changes it.
        title: What the page is called.
        dataset: Where to find pictures of the memory that the bank does not hold, as in `plot_explanations`.
        validation: Labelled data to measure the accuracy on; `None` for none.
        teach: Whether visitors may teach their own copy of the memory.
        save: Whether they may save it, to folders of this machine or to the Hub with its token.
    """

    model: MemoryWrapModel
    title: str
    dataset: Any = None
    validation: Any = None
    teach: bool = True
    save: bool = True

    @property
    def stored(self) -> SampleImages | None:
        """Where pictures of samples are found that the bank does not hold."""
        return stored_images(self.model, self.dataset)
