"""The layer that a model reads its memory with, made from its arguments."""

from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap.backbone import OwnClassifier
from timm_memwrap.constants import HEAD
from timm_memwrap.layers import BaselineMemory, LabelVote, MemoryWrapLayer
from timm_memwrap.memory_args import OWN_READ_HEADS
from timm_memwrap.memory_layer import MemoryLayer
from timm_memwrap.read_heads import CentredLogits, Joint, PreLogits, Probabilities

__all__ = ["CLASSIFIER_NAMES", "Calibration", "new_head"]

# Names of the last layer in the state dict by `classifier`, where it is not the backbone's.
CLASSIFIER_NAMES = {"mlp": f"{HEAD}.classifier.fc2", "linear": f"{HEAD}.classifier", "vote": None}


def new_head(
    memory_args: dict[str, Any], memory_only: bool, width: int, num_classes: int, features: int, own: OwnClassifier
) -> MemoryLayer:
    """Makes a layer for encodings of `width`, which begin with the pre-logits of width `features`."""
    name, classifier_name = memory_args["read_head"], memory_args["classifier"]
    read_heads: dict[str, nn.Module] = {
        "identity": nn.Identity(),
        "pre_logits": PreLogits(features),
        "probabilities": Probabilities(features, own),
        "logits": CentredLogits(own),
        "joint": Joint(features, own),
        "joint_equal": Joint(features, own, Joint.EQUAL_WEIGHT),
    }
    common = {"head": read_heads.get(name), **{arg: memory_args[arg] for arg in ("distance", "scale", "read")}}
    if classifier_name == "vote":
        return LabelVote(width, num_classes, **common)
    classifier: nn.Module | None = own if name in OWN_READ_HEADS else None
    if classifier_name == "linear":
        classifier = nn.Linear(width if memory_only else 2 * width, num_classes)
    layer: type[BaselineMemory] | type[MemoryWrapLayer] = BaselineMemory if memory_only else MemoryWrapLayer
    return layer(width, num_classes, classifier=classifier, **common)


class Calibration(nn.Module):
    """Divides logits by a temperature (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    It is a buffer, so that it travels with the weights, as do the coefficients of how likely a prediction is right: an
    intercept and a weight for each feature (`explaining/confidence.py`), all 0 until they are fitted.
    """

    temperature: Tensor
    confidence: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("confidence", torch.zeros(4))

    def forward(self, logits: Tensor) -> Tensor:
        """Calibrates logits `[B, C]`."""
        return logits / self.temperature.to(logits.dtype)

    def set_temperature(self, temperature: float) -> None:
        """Sets the temperature, and forgets the coefficients, which were fitted at another."""
        self.temperature.fill_(temperature)
        self.confidence.zero_()
