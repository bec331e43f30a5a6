"""What a timm backbone gives to a memory: encodings of images, and its own trained classifier.

Shapes: N images, D width of the pre-logits, E of an encoding, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap.attention import wide

__all__ = [
    "OwnClassifier",
    "classes_of",
    "classifiers_of",
    "classifies_affinely",
    "encode_features",
    "last_layer",
    "replace_rows",
]

# Modules that are affine functions of their input in evaluation mode.
_AFFINE = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.Identity, nn.Dropout)
# Classes of timm's whose `forward_head` does more to the pre-logits than `get_classifier` says. Found by comparing the
# two over all architectures (tests/test_affine_classifiers.py).
_MORE_THAN_THEIR_CLASSIFIER = ("EfficientVitMsra", "SHViT", "VOLO")


def classifiers_of(backbone: Any) -> nn.ModuleList:
    """Returns the modules that make logits: one, and two in distilled models."""
    classifier = backbone.get_classifier()
    # No `tuple | nn.ModuleList`: this is compiled too, and torch 2.9 cannot compile a union of types.
    return nn.ModuleList(classifier if isinstance(classifier, (tuple, nn.ModuleList)) else [classifier])


def classes_of(backbone: Any) -> int:
    """Returns the number of classes that the backbone's classifier tells apart.

    `num_classes` does not know when the last layer was replaced in place, as in many recipes of fine-tuning.
    """
    layers = [module for module in classifiers_of(backbone).modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if backbone.num_classes == 0 or not layers:
        return backbone.num_classes
    return layers[-1].out_features if isinstance(layers[-1], nn.Linear) else layers[-1].out_channels


def classifies_affinely(backbone: Any) -> bool:
    """Returns whether the logits are an affine function of the pre-logits, computed by one classifier module.

    They are for 1,278 of the 1,364 architectures of timm 1.0.31. Not for those with two heads (distilled models,
    CrossViT), an MLP as the classifier, or one that pools or sees other features than the pre-logits.
    """
    classifiers = classifiers_of(backbone)
    if len(classifiers) > 1 or type(backbone).__name__ in _MORE_THAN_THEIR_CLASSIFIER:
        return False
    leaves = [module for module in classifiers.modules() if not any(module.children())]
    return all(isinstance(module, _AFFINE) for module in leaves)


def last_layer(backbone: Any) -> nn.Linear | nn.Conv2d | None:
    """Returns the layer that has a row of weights for each class; `None` if no single layer makes the logits."""
    if not classifies_affinely(backbone):
        return None
    leaves = [module for module in classifiers_of(backbone).modules() if not any(module.children())]
    layers = [module for module in leaves if not isinstance(module, nn.Identity | nn.Dropout)]
    several = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in layers) > 1
    return layers[-1] if not several and isinstance(layers[-1], nn.Linear | nn.Conv2d) else None


def replace_rows(backbone: Any, first: int, rows: Tensor, biases: Tensor) -> None:
    """Gives the classifier rows `[K, D]` and biases `[K]` for the classes from `first` on, however many it had.

    Its weights are then new parameters, of which an optimizer knows nothing.
    """
    layer = last_layer(backbone)
    assert layer is not None
    weight = torch.cat([layer.weight.detach()[:first], rows.to(layer.weight).reshape(-1, *layer.weight.shape[1:])])
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    if layer.bias is not None:
        bias = torch.cat([layer.bias.detach()[:first], biases.to(layer.bias)])
        layer.bias = nn.Parameter(bias, layer.bias.requires_grad)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(weight)
    else:
        layer.out_channels = len(weight)
    backbone.num_classes = len(weight)


def encode_features(backbone: Any, features: Any, with_logits: bool) -> Tensor:
    """Encodes images, from the backbone's unpooled features: its pre-logits `[N, D]`.

    With `with_logits` its logits stand behind them, `[N, D + C]`: where they are not an affine function of the
    pre-logits, the sum over memory samples has to be taken of the logits themselves.
    """
    pre_logits = backbone.forward_head(features, pre_logits=True)
    if not with_logits:
        return pre_logits
    logits = backbone.forward_head(features)
    if isinstance(logits, tuple):
        raise ValueError(
            "The backbone is in distilled training, where it returns the logits of two classifiers. Call "
            "model.backbone.set_distilled_training(False): a memory is read with their mean."
        )
    return torch.cat([pre_logits, logits], dim=-1)


class OwnClassifier(nn.Module):
    """A backbone's own classifier as a function of encodings `[N, E]`.

    Its weights stay the backbone's: this module has none, and follows when the backbone's are replaced.
    """

    def __init__(self, backbone: nn.Module, with_logits: bool) -> None:
        super().__init__()
        # In a list it is not a submodule, and a deep copy of the model still finds the copy's backbone.
        self._backbone: list[Any] = [backbone]
        self.with_logits = with_logits

    @property
    def is_meta(self) -> bool:
        """Whether the classifier's weights have no values yet."""
        return any(parameter.is_meta for parameter in self._backbone[0].get_classifier().parameters())

    def forward(self, encoding: Tensor) -> Tensor:
        """Returns logits `[N, C]`."""
        backbone = self._backbone[0]
        if self.with_logits:
            # As a part of the encoding, logits would keep it alive, and safetensors would refuse to write them.
            return encoding[..., backbone.head_hidden_size :].contiguous()
        classifier = backbone.get_classifier()
        parameter = next(classifier.parameters(), None)
        encoding = wide(encoding) if parameter is None else encoding.to(parameter)
        if isinstance(classifier, nn.Conv2d):
            return classifier(encoding[..., None, None]).flatten(1)
        return classifier(encoding)
