"""The name of a data set at a commit, as a bank has it for the pictures of its samples."""

import re

from timm_memwrap.memory_bank import MemoryBank

__all__ = ["image_dataset"]

_PIN = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)@([0-9a-f]{40})", re.ASCII)


def image_dataset(bank: MemoryBank) -> tuple[str, str] | None:
    """Returns repository and commit of the data set that a bank names for its pictures.

    `None` if it names none, or something else: what is read from outside may hold any text.
    """
    match = _PIN.fullmatch(bank.provenance.image_dataset)
    return None if match is None else (match[1], match[2])
