"""A step of training beside that of the plain backbone."""

from itertools import product
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor

from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.benchmark.subjects import CLASSES, PUBLISHED_MEMORY, backbone
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.task import MemoryWrapTask

__all__ = ["measure_training"]

_BUDGET = 1.03


def measure_training(options: Options) -> list[Row]:
    """Times steps that read the batch, the queue, or images drawn for the step as the paper has it."""
    combinations = product(options.trained_backbones, options.img_sizes, options.training_batch_sizes)
    return [row for each in combinations for row in _compare(options, *each)]


def _compare(options: Options, name: str, img_size: int, batch_size: int) -> list[Row]:
    device = options.device
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    memory = torch.randn(PUBLISHED_MEMORY, 3, img_size, img_size, device=device)
    labels = torch.arange(batch_size, device=device) % CLASSES

    def step(prefix: str = "", second: Tensor | None = None, **extra: Tensor) -> Call:
        torch.manual_seed(0)
        model = backbone(name, img_size, prefix=prefix).train().to(device)
        kind = MemoryWrapTask if isinstance(model, MemoryWrapModel) else ClassificationTask
        task = kind(model, device=torch.device(device), verbose=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

        def run() -> None:
            loss = task(images, labels, **extra)["loss"]
            if second is not None:
                # The memory images are encoded with gradient, so their pass is forward and backward.
                loss = loss + model(second).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    setting: dict[str, Any] = {"model": name, "img_size": img_size, "batch_size": batch_size}
    protocol = f"paper's protocol, {PUBLISHED_MEMORY} images"
    rows = []
    for calls in (
        {
            "plain backbone": step(),
            "memory from the batch": step("memwrap_"),
            "memory from the queue": step("memwrap_", positions=torch.arange(batch_size, device=device)),
        },
        {
            f"plain backbone, and a pass of {PUBLISHED_MEMORY} images": step(second=memory),
            protocol: step("memwrap_", memory=memory),
        },
    ):
        budgets = dict.fromkeys(list(calls)[1:], _BUDGET)
        rows += compare_calls(calls, "training", options.rounds, device, budgets, **setting)
    return rows
