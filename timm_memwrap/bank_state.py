"""The state of a memory bank: replaced as a whole, seen as a whole, and part of a model's state dict.

Shapes: M memory samples, D width of an encoding.
"""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from timm_memwrap.bank_format import (
    BUFFERS,
    ENTRIES,
    REQUIRED,
    check_state,
    largest_label,
    layout_of,
    parse_state,
    reserved,
)
from timm_memwrap.meaning import LiveMeaning, Meaning
from timm_memwrap.rows import Rows

__all__ = ["BankState"]


class BankState(nn.Module):
    """Buffers and what they mean, as a bank has them; what is done with them is `MemoryBank`'s."""

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
        self._live = LiveMeaning(Meaning())
        self._layout: dict[str, Any] | None = None
        self._rows: dict[str, Rows] = {}
        # Held while the bank is changed: a change begins with what is there, and replaces several attributes.
        self._lock = threading.RLock()
        self.largest_label = -1

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    # An empty bank is still a bank: `bank or other` must not ask for its length.
    def __bool__(self) -> bool:
        return True

    @property
    def derived(self) -> Any:
        """What a model made of these samples, such as keys; dropped when they change, and never saved or copied."""
        return self._derived[0]

    @derived.setter
    def derived(self, derived: Any) -> None:
        self._derived[0] = derived

    @property
    def meaning(self) -> Tensor | None:
        """What of the bank is not a number, as bytes of JSON; `None` if the bank is empty."""
        with self._lock:
            # A buffer only until what a loader filled is taken.
            if "meaning" in self._buffers:
                return self._buffers["meaning"]
            return None if self.labels is None else self._live.text(self.labels.device)

    def layout(self) -> dict[str, Any]:
        """Returns dtype and shape of what a state dict of the bank holds, as `reserve` takes it; empty if it is."""
        with self._lock:
            tensors = {name: self._buffers[name] for name in BUFFERS}
            return layout_of({**tensors, "meaning": self.meaning}) if len(self) else {}

    def reserve(self, layout: dict[str, Any]) -> None:
        """Makes the bank's tensors, zero, for loaders that fill those of a model in place and know no state dict.

        transformers, accelerate and `torch.distributed.checkpoint` do. What they filled is checked when it is first
        asked for. The layout is kept true from then on, since transformers saves the arguments that a model was made
        with.

        Args:
            layout: What `layout` returned of the bank to be loaded.

        Raises:
            ValueError: If it is not the layout of a bank.
        """
        with self._lock:
            self._buffers = {**self._buffers, **reserved(layout)}
            self._layout = layout

    def snapshot(self) -> Self:
        """Returns a bank of the same samples that stays so when this one changes, in this or another thread."""
        bank = type(self)()
        with self._lock:
            self._settle()
            bank._buffers, bank._derived, bank._live = self._buffers, self._derived, self._live
            bank.largest_label = self.largest_label
        return bank

    def filled(self) -> tuple[Tensor, Tensor]:
        """Returns the encodings `[M, D]` and labels `[M]`, or `[M, C]` if they are multi-hot.

        Raises:
            ValueError: If the bank is empty.
        """
        self._settle()
        # From one state, whatever another thread does meanwhile.
        buffers = self._buffers
        encodings, labels = buffers["encodings"], buffers["labels"]
        if encodings is None or labels is None:
            raise ValueError("The memory bank is empty. Call timm_memwrap.build_memory_bank(model, data) first.")
        return encodings, labels

    def _describe(self, **changes: Any) -> None:
        with self._lock:
            self.filled()
            self._take({}, dataclasses.replace(self._meaning.read(), **changes), self.largest_label)

    @property
    def _meaning(self) -> LiveMeaning:
        self._settle()
        return self._live

    def _settle(self) -> None:
        """Takes what a loader filled in place."""
        if "meaning" not in self._buffers:
            return
        with self._lock:
            found = {name: tensor for name in ENTRIES if (tensor := self._buffers.get(name)) is not None}
            if "meaning" not in found:
                return  # another thread was first
            try:
                self._set(*parse_state(found, "the loaded weights"))
            except ValueError as error:
                raise ValueError(
                    f"The memory of {len(self)} samples that the model was made for is not there: {error} Load the "
                    f"model with timm_memwrap.from_pretrained, or call memory_bank.clear() and build another."
                ) from error

    def _state(self) -> dict[str, Tensor | None]:
        self._settle()
        return {name: self._buffers[name] for name in BUFFERS}

    def _set(self, state: dict[str, Tensor | None], meaning: Meaning, assign: bool = False) -> None:
        """Checks a state and takes it: a copy, since the bank must not change when the caller's tensors do.

        With `assign`, as of `torch.nn.Module.load_state_dict`, the tensors themselves become the bank's.
        """
        check_state(state, meaning)
        # A bank on the meta device has no place of its own.
        device = None if self._anchor.is_meta else self._anchor.device
        # Inference tensors could not be part of a later gradient.
        with self._lock, torch.inference_mode(False):
            there = {name: tensor.detach().to(device) for name, tensor in state.items() if tensor is not None}
            kept = {name: tensor for name, tensor in there.items() if assign and not tensor.is_inference()}
            self._rows = {name: Rows(tensor) for name, tensor in there.items() if name not in kept}
            own = kept | {name: rows.tensor for name, rows in self._rows.items()}
            self._take({name: own.get(name) for name in BUFFERS}, meaning, largest_label(state["labels"]))

    def _take(self, buffers: Mapping[str, Tensor | None], meaning: Meaning, largest_label: int) -> None:
        """Replaces the state. Whoever holds the lock does, so that no snapshot holds half of it."""
        self._buffers = {name: buffers.get(name, old) for name, old in self._buffers.items() if name != "meaning"}
        self._live = LiveMeaning(meaning)
        self._derived = [None]
        if self._layout is not None:
            for name in ENTRIES:
                self._layout.pop(name, None)
            self._layout.update(self.layout())
        # Known beforehand, since asking a device for it makes a read wait.
        self.largest_label = largest_label

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves the buffers, and leaves their dtype: half of an encoding's digits cannot be brought back."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        with self._lock:
            self._rows = {}
            self._buffers = {name: move(tensor) for name, tensor in self._buffers.items()}
            self._live, self._derived = LiveMeaning(self._live.read()), [None]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_derived", "_rows", "_lock")}

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
            self._set(*parse_state(entries, "the state dict"), local_metadata.get("assign_to_params_buffers", False))
        except ValueError as error:
            error_msgs.append(str(error))
