"""Whether a backbone's logits are an affine function of its pre-logits, compared with what it computes."""

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_memwrap.backbone import OwnClassifier, classifies_affinely, encode_features
from timm_memwrap.checks import without_values
from timm_memwrap.constants import PREFIX

NUM_CLASSES = 7
# Of each kind of classifier that timm has, and whether the logits are an affine function of the pre-logits.
KINDS = {
    "test_resnet": True,
    "test_vit": True,
    "test_convnext": True,
    "test_mambaout": True,
    "mobilenetv3_small_050": True,
    "resnetv2_18": True,  # a convolution
    "repvit_m1": True,  # batch norm before it
    "crossvit_tiny_240": False,  # two heads
    "levit_128s": False,
    "deit_tiny_distilled_patch16_224": False,
    "pit_ti_distilled_224": False,
    "volo_d1_224": False,  # a second head reads other features
    "efficientvit_m0": False,
    "shvit_s1": False,
    "caformer_s18": False,  # an MLP
    "samvit_base_patch16_224": False,
    "efficientvim_m1": False,
}


def architectures() -> list[str]:
    """Returns all architectures that have a Memory Wrap name."""
    names = timm.list_models()
    return [name for name in names if not name.startswith(PREFIX) and timm.is_model(PREFIX + name)]


@pytest.mark.parametrize("backbone", KINDS)
def test_kinds_of_classifiers_are_told_apart(backbone: str) -> None:
    model, features = with_real_head(backbone)
    assert classifies_affinely(model) == is_affine(model, features) == KINDS[backbone]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backbone", architectures())
def test_classifiers_of_all_architectures_are_told_apart(backbone: str) -> None:
    """Compares `forward_head` with the classifier on the pre-logits, on random features and weights."""
    model, features = with_real_head(backbone)
    assert classifies_affinely(model) == is_affine(model, features)


@pytest.mark.parametrize("backbone", KINDS)
def test_encodings_hold_all_that_the_logits_are_made_of(backbone: str) -> None:
    model, features = with_real_head(backbone)
    with_logits = not classifies_affinely(model)
    with torch.no_grad():
        encoding = encode_features(model, deepcopy(features), with_logits)
        assert encoding.shape == (2, model.head_hidden_size + (NUM_CLASSES if with_logits else 0))
        logits = model.forward_head(deepcopy(features))
        torch.testing.assert_close(OwnClassifier(model, with_logits)(encoding), logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def with_real_head(backbone: str) -> tuple[Any, Any]:
    """Returns a model on the meta device but for what its `forward_head` uses, and random features for that."""
    with torch.device("meta"), without_values():
        model: Any = timm.create_model(backbone, num_classes=NUM_CLASSES).eval()
        features = model.forward_features(torch.zeros(2, *model.pretrained_cfg["input_size"]))
    used: set[nn.Module] = {model}
    hooks = [part.register_forward_pre_hook(lambda part, _: used.add(part)) for part in model.modules()]
    model.forward_head(deepcopy(features))
    for hook in hooks:
        hook.remove()
    for part in used:
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(0.1 * torch.randn(parameter.shape)))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, (0.5 + torch.rand(buffer.shape)).to(buffer.dtype))
    return model, materialised(features)


def materialised(features: Any) -> Any:
    if isinstance(features, Tensor):
        return torch.randn(features.shape).to(features.dtype) if features.is_meta else features
    if isinstance(features, dict):
        return {name: materialised(part) for name, part in features.items()}
    if isinstance(features, tuple | list):
        return type(features)(materialised(part) for part in features)
    return features


@torch.no_grad()
def is_affine(model: Any, features: Any) -> bool:
    if not isinstance(model.get_classifier(), nn.Module) or isinstance(model.get_classifier(), nn.ModuleList):
        return False
    classifier = OwnClassifier(model, False)
    pre_logits = model.forward_head(deepcopy(features), pre_logits=True)
    logits = model.forward_head(features)
    assert logits.shape == (2, NUM_CLASSES)
    try:
        found = classifier(pre_logits)
    except (RuntimeError, IndexError):
        # The classifier takes other features than these.
        return False
    between = classifier(pre_logits.mean(dim=0, keepdim=True))
    tolerance = 1e-4 * logits.abs().max()
    return bool(
        (found - logits).abs().max() <= tolerance and (between - found.mean(dim=0)).abs().max() <= 10 * tolerance
    )
