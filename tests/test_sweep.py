"""Every architecture: built on the meta device, run forward, its parameters grouped as the backbone's are.

Slow: one case takes a second or two, and there are more than a thousand. Run by hand with `pytest -m slow`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from timm_memwrap import MemoryWrapModel
from timm_memwrap.constants import BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PREFIXES = (PREFIX, BASELINE_PREFIX, EVIDENCE_PREFIX)
NUM_CLASSES = 7


def backbones() -> list[str]:
    """Returns all architectures that have a Memory Wrap name."""
    names = timm.list_models()
    return [name for name in names if not name.startswith(PREFIXES) and timm.is_model(PREFIX + name)]


def layer_ids(model: Any, coarse: bool) -> dict[str, int]:
    return group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)


@contextmanager
def no_initialisation() -> Iterator[None]:
    """Leaves out random numbers, which meta tensors do not hold: drawing none of them is most of a model's making."""
    with ExitStack() as stack:
        for name in ("uniform_", "normal_", "erfinv_", "clamp_"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, lambda self, *args, **kwargs: self))
        yield


def assert_names_real_parameters(model: nn.Module, cfg: Any) -> None:
    state_dict = model.state_dict()
    for names in (cfg["classifier"], cfg["first_conv"]):
        for name in (names,) if isinstance(names, str) else names:
            assert f"{name}.weight" in state_dict, f"{name} is not a parameter of the model"


@pytest.mark.parametrize("backbone", backbones())
def test_every_architecture_runs_on_the_meta_device(backbone: str) -> None:
    with torch.device("meta"), no_initialisation():
        plain: Any = timm.create_model(backbone, num_classes=NUM_CLASSES)
        encodings: dict[bool, Tensor] = {}
        for prefix in PREFIXES:
            model: Any = timm.create_model(prefix + backbone, num_classes=NUM_CLASSES)
            assert isinstance(model, MemoryWrapModel)
            assert model.memory_only == (prefix != PREFIX)
            assert model.keeps_classifier == (prefix == EVIDENCE_PREFIX)
            # Trained heads read the same encodings; a backbone that keeps its classifier computes its own.
            assert_runs(model, {} if model.keeps_classifier else encodings)
            assert_names_real_parameters(model, model.pretrained_cfg)
            for cfg in timm.models.get_arch_pretrained_cfgs(prefix + backbone).values():
                assert_names_real_parameters(model, cfg.to_dict())
            assert_groups_as(plain, model)


@torch.no_grad()
def assert_runs(model: Any, encodings: dict[bool, Tensor]) -> None:
    """Runs the model forward; the second of two with the same backbone takes the encodings of the first.

    In evaluation without a memory: how many samples a read keeps depends on data, which meta tensors lack.
    """
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    for training in (False, True):
        model.train(training)
        if training not in encodings:
            encodings[training] = model.encode(images)
        assert encodings[training].shape == (2, model.encoding_size)
        with mock.patch.object(model, "encode", return_value=encodings[training]):
            assert model(images).shape == (2, NUM_CLASSES)


def assert_groups_as(plain: Any, model: Any) -> None:
    """Asserts that the backbone's parameters have the layer ids that they have in the plain model; the head is last."""
    if not hasattr(plain, "group_matcher"):
        assert not hasattr(model, "group_matcher")
        return
    for coarse in (False, True):
        if coarse and isinstance(plain, timm.models.RDNet):
            with pytest.raises(AssertionError, match="coarse grouping is not implemented for RDNet"):
                layer_ids(model, coarse)
            continue
        expected, ids = layer_ids(plain, coarse), layer_ids(model, coarse)
        own = {name: layer_id for name, layer_id in ids.items() if name.startswith("backbone.")}
        assert {name: expected[name.removeprefix("backbone.")] for name in own} == own
        head = {layer_id for name, layer_id in ids.items() if name not in own}
        if model.keeps_classifier:
            assert not head
            assert len(own) == len(expected)
        else:
            # A few backbones put their own head into their last block's group; ours, which they do not know, follows.
            assert head in ({max(expected.values())}, {max(own.values()) + 1})
