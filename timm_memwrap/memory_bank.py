"""What is remembered: encodings of training samples and what they mean.

Shapes: M memory samples, D width of an encoding.
"""

import dataclasses
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap._utils import check_choice, printable
from timm_memwrap.bank_format import (
    BUFFERS,
    DTYPES,
    ENTRIES,
    REQUIRED,
    check_integers,
    check_state,
    largest_label,
    like_state,
    parse_state,
)
from timm_memwrap.meaning import LiveMeaning, Meaning, Provenance, Reference, plain_names
from timm_memwrap.rows import Rows, add_rows
from timm_memwrap.sample_ids import SampleId, SampleIds
from timm_memwrap.tensor_files import read_tensors, write_tensors

__all__ = ["MemoryBank", "Provenance", "Reference", "SampleId"]

_logger = logging.getLogger(__name__)

# Attributes that a copy begins without.
_NOT_COPIED: dict[str, Any] = {"_derived": [None], "_rows": {}, "_lock": None}


class MemoryBank(nn.Module):
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

    encodings: Tensor | None
    labels: Tensor | None
    images: Tensor | None
    _anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Moves with the model, so that an empty bank knows its device too. First, since an EMA pairs the buffers of two
        # models in order, of which one may have no bank.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        for name in BUFFERS:
            self.register_buffer(name, None)
        # Of these samples, for all snapshots of them: in a list, so that they share what one of them makes.
        self._derived: list[Any] = [None]
        self._meaning = LiveMeaning(Meaning())
        self._rows: dict[str, Rows] = {}
        # Held while the bank is changed: a change begins with what is there, and replaces several attributes.
        self._lock = threading.RLock()
        self.largest_label = -1

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    # An empty bank is still a bank: `bank or other` must not ask for its length.
    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        if self.encodings is None:
            return "MemoryBank(empty)"
        images = "no images" if self.images is None else f"images {list(self.images.shape[1:])}"
        source = f", {self.provenance.selection} from {self.provenance.dataset}" if self.provenance.dataset else ""
        return (
            f"MemoryBank({len(self)} samples of {len(self.class_counts)} classes, "
            f"encodings {list(self.encodings.shape)}, {images}{source})"
        )

    @property
    def derived(self) -> Any:
        """What a model made of these samples, such as keys; dropped when they change, and never saved or copied."""
        return self._derived[0]

    @derived.setter
    def derived(self, derived: Any) -> None:
        self._derived[0] = derived

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
    def meaning(self) -> Tensor | None:
        """What of the bank is not a number, as bytes of JSON; `None` if the bank is empty."""
        with self._lock:
            return None if self.labels is None else self._meaning.text(self.labels.device)

    @property
    def class_counts(self) -> dict[int, int]:
        """Number of samples by label."""
        return dict(sorted(Counter([] if self.labels is None else self.labels.tolist()).items()))

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
            labels: Labels `[M]`, integers of at least 0.
            ids: One unique id per sample, which names it in its data set.
            images: Small images for people to look at, uint8 `[M, 3 or 1, H, W]`.
            class_names: Names of the classes by label.
            provenance: Where the samples come from.
            dtype: What the encodings are stored in: `torch.float32`, `torch.float16` or `torch.bfloat16`.

        Raises:
            ValueError: If lengths, shapes, types or values do not fit. The bank is then unchanged.
        """
        check_choice("dtype", dtype, DTYPES)
        check_integers(labels)
        meaning = Meaning(SampleIds(ids), plain_names(class_names), provenance or Provenance())
        state = {"encodings": encodings.detach().to(dtype), "labels": labels.detach().long(), "images": images}
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
            meaning = self._meaning.read()
            names = meaning.class_names if class_names is None else plain_names(class_names)
            if not len(self):
                return self.replace(encodings, labels, ids, images, names)
            check_integers(labels)
            new = like_state({"encodings": encodings, "labels": labels.long(), "images": images}, self._state())
            check_state(new, Meaning(SampleIds(ids)))
            provenance = dataclasses.replace(meaning.provenance, appended=meaning.provenance.appended + len(labels))
            longer = Meaning(meaning.ids.added(ids), names, provenance)
            with torch.inference_mode(False):
                grown = {
                    name: add_rows(self._rows, name, self._buffers[name], rows)
                    for name, rows in new.items()
                    if rows is not None
                }
            self._take(grown, longer, max(self.largest_label, largest_label(labels)))

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

    def snapshot(self) -> "MemoryBank":
        """Returns a bank of the same samples that stays so when this one changes, in this or another thread."""
        bank = MemoryBank()
        with self._lock:
            bank._buffers, bank._derived, bank._meaning = self._buffers, self._derived, self._meaning
            bank.largest_label = self.largest_label
        return bank

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Names the classes by label."""
        self._describe(class_names=plain_names(class_names))

    def set_reference(self, reference: Reference) -> None:
        """Records how near the samples came to held-out images. It is dropped when samples come or go."""
        self._describe(reference=reference)

    def set_encoder(self, encoder: str) -> None:
        """Records which encoder encoded the samples, by its fingerprint."""
        self._describe(provenance=dataclasses.replace(self.provenance, encoder=encoder))

    def _describe(self, **changes: Any) -> None:
        with self._lock:
            self.filled()
            self._take({}, dataclasses.replace(self._meaning.read(), **changes), self.largest_label)

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
        self._set(*parse_state(found, repr(str(path))))
        return self

    def filled(self) -> tuple[Tensor, Tensor]:
        """Returns the encodings `[M, D]` and labels `[M]`.

        Raises:
            ValueError: If the bank is empty.
        """
        # From one state, whatever another thread does meanwhile.
        buffers = self._buffers
        encodings, labels = buffers["encodings"], buffers["labels"]
        if encodings is None or labels is None:
            raise ValueError("The memory bank is empty. Call timm_memwrap.build_memory_bank(model, data) first.")
        return encodings, labels

    def _state(self) -> dict[str, Tensor | None]:
        return {name: self._buffers[name] for name in BUFFERS}

    def _set(self, state: dict[str, Tensor | None], meaning: Meaning) -> None:
        """Checks a state and takes a copy of it: the bank must not change when the caller's tensors do."""
        check_state(state, meaning)
        # A bank on the meta device has no place of its own.
        device = None if self._anchor.is_meta else self._anchor.device
        # Inference tensors could not be part of a later gradient.
        with self._lock, torch.inference_mode(False):
            self._rows = {name: Rows(tensor.to(device)) for name, tensor in state.items() if tensor is not None}
            own = {name: self._rows[name].tensor if name in self._rows else None for name in BUFFERS}
            self._take(own, meaning, largest_label(state["labels"]))

    def _take(self, buffers: Mapping[str, Tensor | None], meaning: Meaning, largest_label: int) -> None:
        """Replaces the state in one step, so that no snapshot holds half of it."""
        with self._lock:
            self._buffers = {**self._buffers, **buffers}
            self._meaning = LiveMeaning(meaning)
            self._derived = [None]
            # Known beforehand, since asking a device for it makes a read wait.
            self.largest_label = largest_label

    def _apply(self, fn: Any, recurse: bool = True) -> "MemoryBank":
        """Moves the buffers, and leaves their dtype: half of an encoding's digits cannot be brought back."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        with self._lock:
            self._rows = {}
            self._buffers = {name: move(tensor) for name, tensor in self._buffers.items()}
            self._meaning, self._derived = LiveMeaning(self._meaning.read()), [None]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **_NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._derived, self._rows, self._lock = [None], {}, threading.RLock()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._lock:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            meaning = self.meaning
        if meaning is not None:
            destination[f"{prefix}meaning"] = meaning

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes buffers of any length."""
        found = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if not found:
            return
        unexpected = [prefix + name for name in found if name not in ENTRIES]
        missing = [prefix + name for name in REQUIRED if name not in found]
        unexpected_keys.extend(unexpected)
        missing_keys.extend(missing)
        if missing or (strict and unexpected):
            return
        try:
            entries = {name: tensor.detach() for name, tensor in found.items() if name in ENTRIES}
            self._set(*parse_state(entries, "the state dict"))
        except ValueError as error:
            error_msgs.append(str(error))
