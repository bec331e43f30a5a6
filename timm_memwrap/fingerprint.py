"""Whether weights are still the same: a fingerprint that can be stored, and a cheap watch within a process."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Watch", "fingerprint"]


def fingerprint(module: nn.Module) -> str:
    """Hashes the parameters and persistent buffers of `module`, their names and shapes, with SHA-256.

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
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Watch:
    """Says whether tensors have changed since it was made: replaced, moved, cast, or written to in place.

    It sees everything but a write through `tensor.data`, which PyTorch hides from its own version counter too.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # The aliases keep the storages alive, so that a later tensor cannot get the address of an earlier one.
        self._seen = [(tensor, tensor.detach(), *self._state(tensor)) for tensor in tensors]
        # Inference tensors have no version counter, so nothing can be promised for them.
        self._trackable = not any(tensor.is_inference() for tensor, *_ in self._seen)

    @staticmethod
    def _state(tensor: Tensor) -> tuple[int, int, torch.dtype]:
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype

    def unchanged(self, tensors: Iterable[Tensor]) -> bool:
        """Returns whether these are the same tensors with the same content."""
        tensors = list(tensors)
        return (
            self._trackable
            and len(tensors) == len(self._seen)
            and all(
                tensor is seen and self._state(tensor) == tuple(state)
                for tensor, (seen, _, *state) in zip(tensors, self._seen, strict=True)
            )
        )
