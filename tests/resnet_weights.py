"""A small backbone with weights of its own, and comparisons of weights."""

from typing import Any

import timm
import torch
from torch import Tensor


def make_resnet() -> Any:
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=1000).eval()
    # Running statistics of their own, so that nothing matches by being new.
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))
    return model


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_classifier(state_dict: dict[str, Tensor], classifier: str = "fc") -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(f"{classifier}.")}
