"""The training step of a Memory Wrap model as one of timm's tasks, so that any loop on tasks can take it.

Shapes: B inputs, N samples in the queue, D width of an encoding.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

__all__ = ["EncodingQueue", "MemoryWrapTask"]


class EncodingQueue:
    """The most recent encodings and the positions of their samples, without gradient.

    Args:
        size: How many are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.encodings: Tensor | None = None
        self.positions = torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.positions)

    def hidden_from(self, positions: Tensor) -> Tensor:
        """Returns for samples `[B]` which entries are their own earlier encodings, a mask `[B, N]`."""
        return positions.unsqueeze(1) == self.positions.unsqueeze(0)

    def append(self, encodings: Tensor, positions: Tensor) -> None:
        """Adds encodings `[B, D]` of samples `[B]`, and drops the oldest beyond the size."""
        encodings = encodings.detach()
        if self.encodings is not None:
            encodings = torch.cat([self.encodings, encodings.to(self.encodings.dtype)])
            positions = torch.cat([self.positions, positions])
        self.encodings, self.positions = encodings[-self.size :], positions[-self.size :]

    def clear(self) -> None:
        """Forgets all."""
        self.encodings, self.positions = None, torch.zeros(0, dtype=torch.long)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what is in the queue."""
        return {} if self.encodings is None else {"encodings": self.encodings, "positions": self.positions}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Fills the queue with what `state_dict` returned."""
        self.clear()
        if state:
            self.encodings, self.positions = state["encodings"].clone(), state["positions"].clone()


class MemoryWrapTask(ClassificationTask):
    """A `timm.task.ClassificationTask` whose model reads a memory.

    What it reads is given with the batch: nothing more for the rest of the batch, `memory` for images drawn for this
    step (the paper's protocol, Section 3), `positions` for the queue of recent encodings. A loop that knows only
    `task(images, labels)` trains with the rest of the batch.

    Args:
        model: A Memory Wrap model.
        criterion: Loss function; created by timm from `criterion_kwargs` when `None`.
        criterion_kwargs: Arguments for `timm.loss.create_classification_loss`.
        queue_size: How many encodings the queue keeps, for steps with `positions`.
        device: Device of the loss.
        dtype: Dtype of the loss.
        verbose: Whether timm logs the loss function.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        queue_size: int = 1024,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not hasattr(unwrap_model(model), "memory_bank") and not hasattr(unwrap_model(model), "memory_model"):
            raise ValueError(
                f"{type(model).__name__} reads no memory. Pass a Memory Wrap model, or use timm's ClassificationTask."
            )
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        self.queue = EncodingQueue(queue_size)

    def forward(
        self, input: Tensor, target: Tensor, memory: Tensor | None = None, positions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classifies a batch and computes the loss.

        Args:
            input: Images `[B, C, H, W]`.
            target: Labels `[B]`, or `[B, classes]` as Mixup makes them.
            memory: Images `[M, C, H, W]` to read, encoded with gradient.
            positions: Positions `[B]` of the samples in the training set: reads the queue, and adds to it.

        Returns:
            `loss` and `output`, the logits.
        """
        if positions is None:
            output = self.trainable_module(input, memory=memory) if memory is not None else self.trainable_module(input)
        else:
            output = self._read_queue(input, positions.to(input.device))
        return {"loss": self.criterion(output, target), "output": output}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Returns the queue, which belongs to a checkpoint but not to the model."""
        return {} if ema else self.queue.state_dict()

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Restores the queue."""
        if not ema:
            self.queue.load_state_dict(state or {})

    def _read_queue(self, input: Tensor, positions: Tensor) -> Tensor:
        if len(self.queue):
            assert self.queue.encodings is not None
            readout = self.trainable_module(
                input,
                memory_encoding=self.queue.encodings,
                hidden=self.queue.hidden_from(positions),
                return_readout=True,
            )
        else:
            # The very first step has no earlier encodings, so it reads the rest of its batch.
            readout = self.trainable_module(input, return_readout=True)
        self.queue.append(readout.encoding, positions)
        return readout.logits
