"""Measures the accuracy of a model over a data set, in one process or several."""

from typing import Any

import torch
import torch.distributed as dist
from timm.task.evaluator import ClassificationEvaluator, MultiLabelClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from timm_memwrap._utils import evaluating
from timm_memwrap.labels import present
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.processes import Processes

__all__ = ["evaluate", "sampled_accuracy"]


def evaluate(
    model: nn.Module, loader: Any, processes: Processes, multi_label: bool = False, **kwargs: Any
) -> dict[str, float]:
    """Returns the mean cross-entropy `loss` and the `accuracy`, from 0 to 1, over the batches of all processes.

    With `multi_label`, the loss is binary, the accuracy that of all classes of all images, and there is the
    `mean_average_precision` of the classes that an image has.
    """
    evaluator = _SeveralClasses(processes.device) if multi_label else ClassificationEvaluator(processes.device)
    with evaluating(model):
        for inputs, labels in loader:
            evaluator.update(model(inputs.to(processes.device), **kwargs), labels.to(processes.device))
    found = evaluator.compute(processes.distributed)
    if isinstance(evaluator, _SeveralClasses):
        right, decisions, classes, known = evaluator.totals(processes.distributed)
        # timm's mean has a 0 for each class that no image has.
        ranked = found["map"] / 100 * classes / max(known, 1)
        return {"loss": found["loss"], "accuracy": right / max(decisions, 1), "mean_average_precision": ranked}
    return {"loss": found["loss"], "accuracy": found["top1"] / 100}


class _SeveralClasses(MultiLabelClassificationEvaluator):
    """timm's evaluator, which also counts right decisions on all classes, and the classes that an image has."""

    # Of each class: right decisions, images that have it, and images, [3, C].
    found: Tensor | None

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Counts a batch."""
        super().update(output, target)
        has = target.bool()
        counts = torch.stack([each.sum(dim=0) for each in (present(output) == has, has, torch.ones_like(has))])
        self.found = counts if self.found is None else self.found + counts

    def reset(self) -> None:
        """Forgets all batches."""
        super().reset()
        self.found = None

    def totals(self, distributed: bool) -> tuple[int, int, int, int]:
        """Returns how many decisions were right of how many, and how many classes there are and an image has."""
        found = self.found
        if found is None:
            raise ValueError("There are no images to evaluate with. Check the validation split.")
        if distributed:
            dist.all_reduce(found)
        right, known, images = found.cpu()
        return int(right.sum()), int(images.sum()), len(known), int((known > 0).sum())


def sampled_accuracy(
    model: MemoryWrapModel,
    loader: DataLoader,
    memory: Any,
    size: int,
    draws: int,
    seed: int = 0,
    multi_label: bool = False,
) -> list[float]:
    """Evaluates `draws` times by the paper's protocol (Section 4): each batch reads `size` images drawn at random."""
    if size > len(memory):
        raise ValueError(f"memory.train_size={size}, but there are {len(memory)} training images to draw from.")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)

    class Drawing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            drawn = torch.randperm(len(memory), generator=generator)[:size].tolist()
            return model(images, memory=default_collate([memory[i][0] for i in drawn]).to(device))

    with evaluating(model):
        processes = Processes(device)
        return [evaluate(Drawing(), loader, processes, multi_label)["accuracy"] for _ in range(draws)]
