"""What is remembered: encodings of training samples and what they mean.

Shapes: M memory samples, D width of an encoding.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_memwrap._utils import check_choice, printable
from timm_memwrap.bank_format import BUFFERS, DTYPES, addition, largest_label, parse_state
from timm_memwrap.bank_state import BankState
from timm_memwrap.labels import class_counts, plain_labels
from timm_memwrap.meaning import Meaning, Provenance, Reference, plain_names
from timm_memwrap.rows import add_rows
from timm_memwrap.sample_ids import SampleId, SampleIds
from timm_memwrap.tensor_files import read_tensors, write_tensors

__all__ = ["MemoryBank", "Provenance", "Reference", "SampleId"]

_logger = logging.getLogger(__name__)


class MemoryBank(BankState):
    """Encodings of training samples with their labels, ids and, if wanted, small images.

    A model's state dict carries all of it. An empty bank has no entry in the state dict; loading adapts the length of
    the buffers to the file, and a state dict without a bank leaves this one as it is. Encodings keep their precision
    when the model is cast. Threads may change a bank, one after the other, while others read it.

    Example:
        ```python
        >>> bank = MemoryBank()
        >>> bank.append(torch.randn(2, 8), torch.tensor([0, 1]), ids=["a.png", "b.png"])
        >>> bank
        MemoryBank(2 samples of 2 classes, encodings [2, 8], no images)
        >>> len(bank.remove(["a.png"]))
        1

        ```
    """

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._meaning.read().ids

    def __repr__(self) -> str:
        if self.encodings is None:
            return "MemoryBank(empty)"
        images = "no images" if self.images is None else f"images {list(self.images.shape[1:])}"
        source = f", {self.provenance.selection} from {self.provenance.dataset}" if self.provenance.dataset else ""
        return (
            f"MemoryBank({len(self)} {'multi-label ' * self.multi_label}samples of {len(self.class_counts)} classes, "
            f"encodings {list(self.encodings.shape)}, {images}{source})"
        )

    @property
    def ids(self) -> list[SampleId]:
        """Ids of the samples, in memory order."""
        return self._meaning.read().ids[:]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label; empty if unknown."""
        return self._meaning.read().class_names

    @property
    def provenance(self) -> Provenance:
        """Where the samples come from."""
        return self._meaning.read().provenance

    @property
    def reference(self) -> Reference:
        """How near the samples came to held-out images; of no images until `calibrate` is called."""
        return self._meaning.read().reference

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have several classes, or none: labels are then multi-hot."""
        return self.labels is not None and self.labels.ndim == 2

    @property
    def class_counts(self) -> dict[int, int]:
        """Number of samples by label; a sample of several classes counts for each."""
        return class_counts(self.labels)

    def replace(
        self,
        encodings: Tensor,
        labels: Tensor,
        ids: Sequence[SampleId],
        images: Tensor | None = None,
        class_names: Sequence[str] = (),
        provenance: Provenance | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Forgets everything and remembers these samples.

        Args:
            encodings: Encodings `[M, D]`, finite.
            labels: Labels `[M]`, integers of at least 0; or `[M, C]`, 1 for each class that a sample has, else 0.
            ids: One unique id per sample, which names it in its data set.
            images: Small images for people to look at, uint8 `[M, 3 or 1, H, W]`.
            class_names: Names of the classes by label.
            provenance: Where the samples come from.
            dtype: What the encodings are stored in: `torch.float32`, `torch.float16` or `torch.bfloat16`.

        Raises:
            ValueError: If lengths, shapes, types or values do not fit. The bank is then unchanged.
        """
        check_choice("dtype", dtype, DTYPES)
        meaning = Meaning(SampleIds(ids), plain_names(class_names), provenance or Provenance())
        state = {"encodings": encodings.detach().to(dtype), "labels": plain_labels(labels), "images": images}
        self._set(state, meaning)

    def append(
        self,
        encodings: Tensor,
        labels: Tensor,
        ids: Sequence[SampleId],
        images: Tensor | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Remembers more samples, behind those already there, at the price of what is added. Arguments as in `replace`.

        Raises:
            ValueError: If they do not fit each other or what is there. The bank is then unchanged.
        """
        with self._lock:
            if not len(self):
                return self.replace(encodings, labels, ids, images, class_names or ())
            meaning = self._meaning.read()
            new, added = addition(self._state(), meaning, encodings, labels, ids, images, class_names)
            with torch.inference_mode(False):
                grown = add_rows(self._rows, self._buffers, new)
            added = dataclasses.replace(added, ids=meaning.ids.added(added.ids))
            self._take(grown, added, max(self.largest_label, largest_label(new["labels"])))

    def check_append(self, *args: Any) -> None:
        """Raises what `append` would raise with these arguments, and changes nothing."""
        addition(self._state(), self._meaning.read(), *args)

    def remove(self, ids: Iterable[SampleId]) -> "MemoryBank":
        """Forgets the samples with these ids, and returns itself. Warns if a class has no sample any more.

        Raises:
            ValueError: If an id is not in the bank, or none would be left. The bank is then unchanged.
        """
        with self._lock:
            gone = set(self._meaning.read().ids.positions(ids))
            if len(gone) == len(self) > 0:
                raise ValueError(
                    f"Removing {len(gone)} ids would leave {self!r} empty. Call clear() to forget everything."
                )
            return self.select(i for i in range(len(self)) if i not in gone)

    def select(self, positions: Iterable[int]) -> "MemoryBank":
        """Keeps only the samples at these positions, in this order, and returns itself.

        Warns if a class has no sample any more.
        """
        with self._lock:
            device, meaning, kept = self.filled()[1].device, self._meaning.read(), list(positions)
            index = torch.tensor(kept, dtype=torch.long, device=device)
            state = {name: None if tensor is None else tensor[index] for name, tensor in self._state().items()}
            before, provenance = self.class_counts, meaning.provenance
            provenance = dataclasses.replace(provenance, removed=provenance.removed + len(self) - len(kept))
            self._set(state, Meaning(SampleIds(meaning.ids[i] for i in kept), meaning.class_names, provenance))
            if gone := [label for label in before if label not in self.class_counts]:
                names = dict(enumerate(meaning.class_names))
                _logger.warning(
                    "The memory has no sample of %s any more, so that no prediction can show one.",
                    ", ".join(printable(names.get(label, f"class {label}")) for label in gone),
                )
        return self

    def relabel(self, labels: Mapping[SampleId, int]) -> "MemoryBank":
        """Gives the samples with these ids other labels, and returns itself.

        Raises:
            ValueError: If an id is not in the bank, or a label is below 0. The bank is then unchanged.
        """
        with self._lock:
            positions = torch.tensor(self._meaning.read().ids.positions(labels), dtype=torch.long)
            _, changed = self.filled()
            changed = changed.index_put((positions.to(changed.device),), torch.tensor([*labels.values()]).to(changed))
            self._set({**self._state(), "labels": changed}, self._meaning.read())
        return self

    def store_as(self, dtype: torch.dtype) -> "MemoryBank":
        """Stores the encodings in another precision, and returns itself.

        float16 and bfloat16 take half the space on disk and in memory, and lose digits that do not come back. A read
        computes in float32 from what is stored.

        Args:
            dtype: `torch.float32`, `torch.float16` or `torch.bfloat16`.

        Raises:
            ValueError: If it is another, or an encoding is beyond what it can hold. The bank is then unchanged.
        """
        check_choice("dtype", dtype, DTYPES)
        with self._lock:
            encodings, _ = self.filled()
            self._set({**self._state(), "encodings": encodings.to(dtype)}, self._meaning.read())
        return self

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._rows = {}
            self._take(dict.fromkeys(BUFFERS), Meaning(), -1)

    def without_images(self) -> "MemoryBank":
        """Returns a bank of the same samples that holds no images."""
        bank = self.snapshot()
        bank._buffers, bank._derived = {**bank._buffers, "images": None}, [None]
        return bank

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Names the classes by label."""
        self._describe(class_names=plain_names(class_names))

    def set_reference(self, reference: Reference) -> None:
        """Records how near the samples came to held-out images. It is dropped when samples come or go."""
        self._describe(reference=reference)

    def set_provenance(self, **changes: Any) -> None:
        """Records where the samples come from, e.g. `encoder=model.encoder_fingerprint()`."""
        self._describe(provenance=dataclasses.replace(self.provenance, **changes))

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the bank alone to a safetensors file, whole or not at all, and returns its path.

        Raises:
            ValueError: If the bank is empty.
            OSError: If the disk is full.
        """
        self.filled()
        return write_tensors(self.state_dict(keep_vars=True), path)

    def load(self, path: str | os.PathLike) -> "MemoryBank":
        """Forgets everything and remembers what `save` wrote to a file. Returns itself.

        Raises:
            ValueError: If the file is not a whole bank. The bank is then unchanged.
        """
        found = read_tensors(path, repr(str(path))).tensors
        self._set(*parse_state(found, repr(str(path))), assign=True)
        return self
