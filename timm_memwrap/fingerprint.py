"""Whether weights are still the same: a fingerprint that can be stored, and a cheap watch within a process."""

import hashlib
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Watch", "WatchedFingerprint", "fingerprint"]


def fingerprint(module: nn.Module) -> str:
    """Hashes the parameters and persistent buffers of `module`, their names and shapes.

    It tells weights apart, not forgeries: values are hashed with CRC-32, which reads at twice the speed of SHA-256.
    Neither the device nor the precision that holds the numbers matters: weights saved in half precision come back in
    float32 with the same values. Rounding to half precision changes the values, and so the fingerprint.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        if tensor.numel():
            # reshape: a tensor without dimensions has no view as bytes.
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(f"{zlib.crc32(content):08x}".encode())
    return digest.hexdigest()


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
        tensors = list(module.state_dict(keep_vars=True).values())
        if self._known is None or not self._known[0].unchanged(tensors):
            self._known = (Watch(tensors), fingerprint(module))
        return self._known[1]

    def forget(self) -> None:
        """Makes the next call compute it."""
        self._known = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not watch the original's tensors.
        return {"_known": None}
