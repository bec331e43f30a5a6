"""What is remembered: encodings of training samples and what they mean, all of it in buffers.

Shapes: M memory samples, D width of an encoding.
"""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap._utils import check_choice, printable
from timm_memwrap.bank_format import (
    BUFFERS,
    DTYPES,
    REQUIRED,
    Meaning,
    Provenance,
    Reference,
    SampleId,
    check_state,
    parse_state,
    plain_ids,
    plain_names,
)
from timm_memwrap.fingerprint import Watch
from timm_memwrap.tensor_files import read_tensors, write_tensors

__all__ = ["MemoryBank", "Provenance", "Reference", "SampleId", "largest_label"]

_logger = logging.getLogger(__name__)


class MemoryBank(nn.Module):
    """Encodings of training samples with their labels, ids and, if wanted, small images.

    All of its state is in buffers, so a model's state dict carries it. An empty bank has no entry in the state dict;
    loading adapts the length of the buffers to the file, and a state dict without a bank leaves this one as it is.
    Encodings keep their precision when the model is cast.

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
    meaning: Tensor | None
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
        self._parsed: tuple[Watch, Meaning] | None = None
        # Known beforehand, since asking a device for it makes a read wait.
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
        return self._parsed_meaning().ids

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label; empty if unknown."""
        return self._parsed_meaning().class_names

    @property
    def provenance(self) -> Provenance:
        """Where the samples come from."""
        return self._parsed_meaning().provenance

    @property
    def reference(self) -> Reference:
        """How near the samples came to held-out images; of no images until `calibrate` is called."""
        return self._parsed_meaning().reference

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
        _check_integers(labels)
        meaning = Meaning(plain_ids(ids), plain_names(class_names), provenance or Provenance())
        self._set(
            {
                "encodings": encodings.detach().to(dtype),
                # A copy: the bank must not change when the caller's tensor does.
                "labels": labels.detach().to(torch.long, copy=True),
                "images": images,
            },
            meaning,
        )

    def append(self, encodings: Tensor, labels: Tensor, ids: Sequence[SampleId], images: Tensor | None = None) -> None:
        """Remembers more samples, behind those already there. Arguments as in `replace`.

        Raises:
            ValueError: If they do not fit each other or what is there. The bank is then unchanged.
        """
        if not len(self):
            return self.replace(encodings, labels, ids, images)
        _check_integers(labels)
        given = {"encodings": encodings, "labels": labels, "images": images}
        state: dict[str, Tensor | None] = {}
        for name, new in given.items():
            old = self._buffers[name]
            if (new is None) != (old is None) or (
                new is not None and old is not None and new.shape[1:] != old.shape[1:]
            ):
                expected = "none" if old is None else f"[{', '.join(map(str, ['N', *old.shape[1:]]))}]"
                raise ValueError(
                    f"{name} has shape {None if new is None else list(new.shape)}; expected {expected}, as the bank "
                    f"has. Encode the samples with the same model, and give images for all samples or for none."
                )
            state[name] = None if new is None or old is None else torch.cat([old, new.detach().to(old)])
        meaning = self._parsed_meaning()
        provenance = dataclasses.replace(meaning.provenance, appended=meaning.provenance.appended + len(labels))
        self._set(state, Meaning([*meaning.ids, *plain_ids(ids)], meaning.class_names, provenance))

    def remove(self, ids: Iterable[SampleId]) -> "MemoryBank":
        """Forgets the samples with these ids, and returns itself.

        Raises:
            ValueError: If an id is not in the bank, or none would be left. The bank is then unchanged.
        """
        position = {sample_id: i for i, sample_id in enumerate(self.ids)}
        wanted = [ids] if isinstance(ids, str | int) else list(ids)
        unknown = [sample_id for sample_id in wanted if sample_id not in position]
        if unknown:
            raise ValueError(
                f"No sample with id {', '.join(map(repr, unknown[:5]))}{' ...' if len(unknown) > 5 else ''} in "
                f"{self!r}. Its ids are in bank.ids, e.g. {self.ids[:3]}."
            )
        gone = {position[sample_id] for sample_id in wanted}
        if len(gone) == len(self):
            raise ValueError(f"Removing {len(gone)} ids would leave {self!r} empty. Call clear() to forget everything.")
        return self.select(i for i in range(len(self)) if i not in gone)

    def select(self, positions: Iterable[int]) -> "MemoryBank":
        """Keeps only the samples at these positions, in this order, and returns itself.

        Warns if a class has no sample any more.
        """
        device, meaning, kept = self.filled()[1].device, self._parsed_meaning(), list(positions)
        index = torch.tensor(kept, dtype=torch.long, device=device)
        state = {name: None if tensor is None else tensor[index] for name, tensor in self._state().items()}
        before, provenance = self.class_counts, meaning.provenance
        provenance = dataclasses.replace(provenance, removed=provenance.removed + len(self) - len(kept))
        self._set(state, Meaning([meaning.ids[i] for i in kept], meaning.class_names, provenance))
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
        encodings, _ = self.filled()
        self._set({**self._state(), "encodings": encodings.to(dtype)}, self._parsed_meaning())
        return self

    def clear(self) -> None:
        """Forgets everything."""
        self._buffers = {**self._buffers, **dict.fromkeys(BUFFERS)}
        self._derived = [None]

    def without_images(self) -> "MemoryBank":
        """Returns a bank of the same samples that holds no images."""
        bank = MemoryBank()
        bank._buffers = {**self._buffers, "images": None}
        return bank

    def snapshot(self) -> "MemoryBank":
        """Returns a bank of the same samples that stays so when this one changes, in this or another thread."""
        bank = MemoryBank()
        bank._buffers, bank._derived, bank._parsed = self._buffers, self._derived, self._parsed
        bank.largest_label = self.largest_label
        return bank

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Names the classes by label."""
        self.filled()
        names = plain_names(class_names)
        self._set(self._state(), dataclasses.replace(self._parsed_meaning(), class_names=names))

    def set_reference(self, reference: Reference) -> None:
        """Records how near the samples came to held-out images. It is dropped when samples come or go."""
        self.filled()
        self._set(self._state(), dataclasses.replace(self._parsed_meaning(), reference=reference))

    def set_encoder(self, encoder: str) -> None:
        """Records which encoder encoded the samples, by its fingerprint."""
        self.filled()
        provenance = dataclasses.replace(self.provenance, encoder=encoder)
        self._set(self._state(), dataclasses.replace(self._parsed_meaning(), provenance=provenance))

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
        """Returns all buffers but the meaning, which `_set` makes."""
        return {name: self._buffers[name] for name in BUFFERS if name != "meaning"}

    def _set(self, state: dict[str, Tensor | None], meaning: Meaning) -> None:
        """Checks a state and takes it over in one step, so that no thread sees half of it."""
        check_state(state, meaning)
        # A bank on the meta device has no place of its own.
        device = None if self._anchor.is_meta else self._anchor.device
        # Inference tensors could not be part of a later gradient.
        with torch.inference_mode(False):
            text = meaning.to_tensor().to(device)
            own = {
                name: None if tensor is None else (tensor.clone() if tensor.is_inference() else tensor).to(device)
                for name, tensor in state.items()
            }
            self._buffers = {**self._buffers, **own, "meaning": text}
            self._parsed = (Watch([text]), meaning)
            self._derived = [None]
            self.largest_label = largest_label(state["labels"])

    def _parsed_meaning(self) -> Meaning:
        """Parses the buffer when it has changed: a million ids take a while."""
        meaning, parsed = self.meaning, self._parsed
        if meaning is None:
            return Meaning()
        if parsed is None or not parsed[0].unchanged([meaning]):
            parsed = self._parsed = (Watch([meaning]), Meaning.from_tensor(meaning))
        return parsed[1]

    def _apply(self, fn: Any, recurse: bool = True) -> "MemoryBank":
        """Moves the buffers, and leaves their dtype: half of an encoding's digits cannot be brought back."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._buffers = {name: move(tensor) for name, tensor in self._buffers.items()}
        self._derived = [None]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": [None], "_parsed": None}

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
        unexpected = [prefix + name for name in found if name not in BUFFERS]
        missing = [prefix + name for name in REQUIRED if name not in found]
        unexpected_keys.extend(unexpected)
        missing_keys.extend(missing)
        if missing or (strict and unexpected):
            return
        try:
            # Copies: the bank must not change when the caller's dictionary does.
            copies = {name: tensor.detach().clone() for name, tensor in found.items() if name in BUFFERS}
            self._set(*parse_state(copies, "the state dict"))
        except ValueError as error:
            error_msgs.append(str(error))


def largest_label(labels: Tensor | None) -> int:
    """Returns the largest of labels `[M]`, or -1 if there is none to be seen."""
    return -1 if labels is None or labels.is_meta or not labels.numel() else int(labels.max())


def _check_integers(labels: Tensor) -> None:
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels are {labels.dtype}; expected integers, one class index per sample.")
