"""The training step of a Memory Wrap model as one of timm's tasks, so that any loop over tasks can use it."""

from typing import Any

from timm.task import ClassificationTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from timm_memwrap.encoding_queue import EncodingQueue
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.heads import FrozenMemory

__all__ = ["MemoryWrapTask"]


class MemoryWrapTask(ClassificationTask):
    """A `timm.task.ClassificationTask` whose model reads a memory.

    What it reads comes with the batch: `memory` are images drawn for this step (the paper's protocol, Section 3),
    `positions` reads the queue of recent encodings, and neither reads the rest of the batch, as in a loop that calls
    `task(images, labels)`.

    Args:
        model: A Memory Wrap model, or the head of one on encodings.
        *args: As for `ClassificationTask`.
        queue_size: Number of encodings that the queue keeps, for steps with `positions`.
        **kwargs: As for `ClassificationTask`.

    Raises:
        ValueError: If the model reads no memory.
    """

    def __init__(self, model: nn.Module, *args: Any, queue_size: int = 1024, **kwargs: Any) -> None:
        module = unwrap_model(model)
        if not isinstance(module, MemoryWrapModel | FrozenMemory):
            raise ValueError(
                f"{type(model).__name__} reads no memory. Pass a Memory Wrap model, or use timm's ClassificationTask."
            )
        super().__init__(model, *args, **kwargs)
        self.queue = EncodingQueue(queue_size, module.encoding_size, next(module.parameters()).device)

    def forward(
        self, input: Tensor, target: Tensor, memory: Tensor | None = None, positions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classifies a batch and computes the loss.

        Args:
            input: Images `[B, C, H, W]`.
            target: Labels `[B]`, or `[B, classes]` as Mixup makes them.
            memory: Images `[M, C, H, W]` to read, encoded with gradient.
            positions: Positions `[B]` of the samples in the training set: reads the queue, and appends to it.

        Returns:
            `loss` and `output`, the logits.
        """
        if positions is None:
            output = self.trainable_module(input, memory=memory)
        else:
            output = self._read_queue(input, positions.to(input.device))
        return {"loss": self.criterion(output, target), "output": output}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Returns the queue, which belongs to a checkpoint but not to the model."""
        return {} if ema else self.queue.state_dict()

    def load_task_state(self, state: dict[str, Any] | None, *args: Any, ema: bool = False, **kwargs: Any) -> None:
        """Restores the queue."""
        if not ema and state:
            self.queue.load_state_dict(state)

    def _read_queue(self, input: Tensor, positions: Tensor) -> Tensor:
        read: dict[str, Tensor] = {}
        # The first step has no earlier encodings, so it reads the rest of its batch.
        if len(self.queue):
            # A copy, because the backward pass needs what is overwritten below.
            read = {"memory": self.queue.encodings.clone(), "hidden": self.queue.hidden_from(positions)}
        readout = self.trainable_module(input, return_readout=True, **read)
        self.queue.append(readout.encoding.detach(), positions)
        return readout.logits
