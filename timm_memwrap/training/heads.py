"""What is trained in place of a whole model: its head on encodings, or a head with nothing to read.

Shapes: B inputs, M memory samples, D width of an encoding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from timm_memwrap._utils import evaluating
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["FrozenClassifier", "FrozenMemory", "WithoutMemory", "encode_images", "freeze"]

# Largest relative difference between a model's logits and those of its classifier on its own pre-logits.
_TOLERANCE = 1e-4


class FrozenClassifier(nn.Module):
    """A plain timm model's classifier on encodings `[B, D]`, which are `forward_head(x, pre_logits=True)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        classifier = model.get_classifier()  # type: ignore[operator]
        if not isinstance(classifier, nn.Module):
            raise ValueError(
                f"{type(model).__name__} has several classifiers, so its backbone cannot be frozen. Train all of it."
            )
        self.classifier = classifier
        # With fewer images than features, what a random start has outside the span of the encodings is never unlearnt:
        # 10 points of accuracy with the range that timm's EfficientNets start from (1,000 CIFAR-10 images).
        for parameter in classifier.parameters():
            nn.init.zeros_(parameter)
        self.drop_rate = float(getattr(model, "drop_rate", 0.0) or 0.0)
        # In a function, so that the model is not a submodule: its other weights are not trained.
        self._model: Callable[[], Any] = lambda: model

    def encode(self, x: Tensor) -> Tensor:
        """Encodes images, and raises if the classifier on encodings is not the model."""
        model = self._model()
        features = model.forward_features(x)
        encoding = model.forward_head(features, pre_logits=True)
        logits, expected = self.classifier(encoding), model.forward_head(features)
        if logits.shape != expected.shape or (logits - expected).abs().max() > _TOLERANCE * (1 + expected.abs().max()):
            raise ValueError(
                "The model's classifier is not a layer on its pooled features, so its backbone cannot be frozen. "
                "Train all of it."
            )
        return encoding

    def forward(self, encoding: Tensor) -> Tensor:
        """Classifies encodings `[B, D]`."""
        return self.classifier(F.dropout(encoding, self.drop_rate, self.training))


class FrozenMemory(nn.Module):
    """A Memory Wrap model's head on encodings `[B, D]`."""

    def __init__(self, model: MemoryWrapModel) -> None:
        super().__init__()
        if model.keeps_classifier:
            raise ValueError(
                f"read_head={model.memory_args['read_head']!r} reads with the backbone's own classifier, which is "
                f"frozen. Pass memory.mode=none, which trains the classifier and wraps it afterwards."
            )
        self.memory_model = model
        self.encoding_size = model.encoding_size
        model.backbone.requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """Encodes images."""
        return self.memory_model.encode(x)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, hidden: Tensor | None = None, return_readout: bool = False
    ) -> Tensor | MemoryReadout:
        """Classifies encodings `x`; `memory` are encodings `[M, D]` too."""
        readout = self.memory_model.read(x, memory, hidden)
        return readout if return_readout else readout.logits


class WithoutMemory(nn.Module):
    """Classifies images or encodings with nothing to read: the control for a head with a memory.

    The layers and parameters are the same, only the memory vector is always zero.
    """

    def __init__(self, model: MemoryWrapModel | FrozenMemory) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Classifies what the model takes."""
        return self.model(x, memory=x.new_zeros(0, self.model.encoding_size))


def freeze(model: nn.Module) -> FrozenClassifier | FrozenMemory:
    """Returns the part of a model that is trained while its backbone is frozen."""
    return FrozenMemory(model) if isinstance(model, MemoryWrapModel) else FrozenClassifier(model)


def encode_images(
    head: FrozenClassifier | FrozenMemory, whole: nn.Module, loader: DataLoader, device: Any, progress: bool = True
) -> TensorDataset:
    """Encodes all images once, in evaluation mode, to a data set of `(encoding, label)`."""
    encodings, labels = [], []
    with evaluating(whole):
        for images, targets in tqdm(loader, desc="Encoding", unit="batch", disable=not progress):
            encodings.append(head.encode(images.to(device)).float().cpu())
            labels.append(targets)
    return TensorDataset(torch.cat(encodings), torch.cat(labels))
