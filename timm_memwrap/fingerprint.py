"""Whether weights are still the same: a fingerprint that can be stored, and a cheap watch within a process."""

import hashlib
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap._utils import plain_state

__all__ = ["Watch", "WatchedFingerprint", "fingerprint"]

# An EMA may average the bytes of two fingerprints in a bank: those of neighbouring letters stay letters, and JSON.
_LETTERS = str.maketrans("0123456789abcdef", "bcdefghijklmnopq")


def fingerprint(module: nn.Module) -> str:
    """Hashes the state of `module` that its outputs depend on: names, shapes, and values as float32.

    It tells weights apart, not forgeries: values are hashed with CRC-32, which reads at twice the speed of SHA-256.
    Neither the device nor the precision that holds the numbers matters: weights come back from a file in float32. Where
    a cast rounds them, as that of trained weights to half precision does, it changes the fingerprint.
    """
    # How often a norm layer was trained changes no output, and a frozen one does not know it.
    state = {name: value for name, value in plain_state(module).items() if not name.endswith("num_batches_tracked")}
    text = "".join(_describe(name, state[name]) for name in sorted(state))
    return hashlib.sha256(text.encode()).hexdigest().translate(_LETTERS)


def _describe(name: str, value: Any) -> str:
    # Quantised layers keep tuples of tensors.
    if isinstance(value, tuple | list):
        return "".join(_describe(f"{name}.{i}", part) for i, part in enumerate(value))
    if not isinstance(value, Tensor):
        return f"{name}={value!r};"
    value = value.detach().dequantize() if value.is_quantized else value.detach()
    value = value.float() if value.is_floating_point() else value
    line = f"{name}:{value.dtype}:{list(value.shape)};"
    if not value.numel() or value.is_meta:
        return line
    # reshape: a tensor without dimensions has no view as bytes.
    content = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{line}{zlib.crc32(content):08x}"


class Watch:
    """Tells whether tensors may have changed since it was made: replaced, moved, cast, written to, or trained.

    A gradient that reaches one of them counts as a change: fused optimizers and CUDA graphs write weights without a
    trace in PyTorch's version counters, but not before a gradient is there. A write through `tensor.data` is not seen.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # The aliases keep the storages alive, so that a later tensor cannot get the address of an earlier one.
        self._seen = [(tensor, tensor.detach(), _state(tensor)) for tensor in tensors]
        self._reached = reached = [False]

        def note(_tensor: Tensor) -> None:
            reached[0] = True

        self._handles: list[Any] = [
            tensor.register_post_accumulate_grad_hook(note)
            for tensor, *_ in self._seen
            if tensor.requires_grad and tensor.is_leaf
        ]

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()

    def unchanged(self, tensors: Iterable[Tensor]) -> bool:
        """Returns whether these are the same tensors with the same content."""
        tensors = list(tensors)
        return (
            not self._reached[0]
            and len(tensors) == len(self._seen)
            and all(
                tensor is seen and not tensor.is_inference() and _state(tensor) == state
                for tensor, (seen, _, state) in zip(tensors, self._seen, strict=True)
            )
        )


def _state(tensor: Tensor) -> tuple[int, int, torch.dtype, bool]:
    # Inference tensors have no version counter, so that they count as changed.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.requires_grad


class WatchedFingerprint:
    """The fingerprint of a module, computed again only after its weights may have changed."""

    def __init__(self) -> None:
        self._known: tuple[Watch, str] | None = None

    def of(self, module: nn.Module) -> str:
        """Returns `fingerprint(module)`."""
        state = plain_state(module)
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        # What is no tensor cannot be watched.
        if self._known is None or len(tensors) < len(state) or not self._known[0].unchanged(tensors):
            self._known = (Watch(tensors), fingerprint(module))
        return self._known[1]

    def forget(self) -> None:
        """Makes the next call compute it."""
        self._known = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not watch the original's tensors.
        return {"_known": None}
