"""The most recent encodings seen in training.

Shapes: B inputs, N entries, D width of an encoding.
"""

import torch
from torch import Tensor

__all__ = ["QUEUE_SIZE", "EncodingQueue"]

QUEUE_SIZE = 1024


class EncodingQueue:
    """A ring of the most recent `size` encodings, without gradient. No step of it waits for the device."""

    def __init__(self, size: int, width: int, device: torch.device | str | None = None) -> None:
        self.encodings = torch.zeros(size, width, device=device)
        # Of the samples in the training set, where they are known; below 0 where there is no entry yet.
        self.positions = torch.full((size,), -1, dtype=torch.long, device=device)
        self._next = torch.zeros((), dtype=torch.long, device=device)

    def __len__(self) -> int:
        return int((self.positions >= 0).sum())

    def append(self, encodings: Tensor, positions: Tensor | None = None) -> None:
        """Adds encodings `[B, D]` in place of the oldest, of samples at `positions` `[B]` of the training set."""
        size = len(self.encodings)
        encodings = encodings.detach()[-size:]
        places = (self._next + torch.arange(len(encodings), device=self._next.device)) % size
        if positions is None:
            positions = torch.zeros_like(places)
        with torch.no_grad():
            self.encodings.index_copy_(0, places, encodings.to(self.encodings))
            self.positions.index_copy_(0, places, positions[-size:].to(places))
            self._next += len(encodings)

    def empty_entries(self, rows: int) -> Tensor:
        """Returns which entries hold nothing yet, a mask `[rows, N]`."""
        return (self.positions < 0).expand(rows, -1)

    def hidden_from(self, positions: Tensor) -> Tensor:
        """Returns for samples `[B]` which entries are empty or their own earlier encodings, a mask `[B, N]`."""
        return self.empty_entries(len(positions)) | (positions.unsqueeze(1) == self.positions.unsqueeze(0))

    def to(self, device: torch.device) -> "EncodingQueue":
        """Moves the entries to a device, and returns itself."""
        self.encodings, self.positions = self.encodings.to(device), self.positions.to(device)
        self._next = self._next.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what `load_state_dict` takes."""
        return {"encodings": self.encodings, "positions": self.positions, "next": self._next}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the entries of a queue of the same size."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])
