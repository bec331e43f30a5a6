"""The names in timm's registry, and the pretrained cfgs behind them."""

import importlib
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

import timm_memwrap
from timm_memwrap import register_backbones, registry
from timm_memwrap.constants import BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX
from timm_memwrap.registry import split_name

# In the order in which they are registered: the shortest is the start of the others.
PREFIXES = (BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX)
ENCODERS = (
    "deepseek_vit_412m_enc",
    "gemma4_vit_167m_enc",
    "gemma4_vit_570m_enc",
    "mobilenetv5_300m_enc",
    "qwen3_vit_88m_enc",
    "qwen3_vit_306m_enc",
    "qwen3_vit_416m_enc",
)


def timms_own(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(PREFIXES)]


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the names are those of timm 1.0.31")
def test_the_rule_leaves_out_the_encoders_and_nothing_else() -> None:
    assert sorted(name for name in timms_own(timm.list_models()) if not timm.is_model(f"memwrap_{name}")) == sorted(
        ENCODERS
    )
    assert len(timms_own(timm.list_models())) == 1371


def test_three_names_for_every_classification_architecture() -> None:
    own = timms_own(timm.list_models())
    left_out = [name for name in own if not timm.is_model(f"memwrap_{name}")]
    # The rule itself: what timm calls an encoder cannot be given a classifier.
    assert all(name.endswith("_enc") for name in left_out)
    assert not [name for name in own if name.endswith("_enc") and name not in left_out]
    assert len(timm.list_models("memwrap_*")) == 3 * (len(own) - len(left_out))
    assert len(timm.list_models("memwrap_baseline_*")) == len(own) - len(left_out)
    assert len(timm.list_models("memwrap_evidence_*")) == len(own) - len(left_out)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "backbone", ["resnet18", "vit_base_patch16_224", "convnext_tiny", "test_vit", "resnet10t", "crossvit_tiny_240"]
)
def test_tags_and_cfgs_carry_over(prefix: str, backbone: str) -> None:
    name = prefix + backbone
    assert timm.is_model(name)
    assert timm.list_pretrained(f"{name}.*") == [prefix + tag for tag in timm.list_pretrained(f"{backbone}.*")]
    assert timm.list_models(f"{name}*", pretrained=True) == [
        prefix + tag for tag in timm.list_models(f"{backbone}*", pretrained=True)
    ]
    assert timm.models.is_model_pretrained(name) == timm.models.is_model_pretrained(backbone)
    ours, theirs = timm.models.get_arch_pretrained_cfgs(name), timm.models.get_arch_pretrained_cfgs(backbone)
    assert list(ours) == [prefix + key for key in theirs]
    for key, cfg in theirs.items():
        compare_cfgs(ours[prefix + key], cfg, prefix, key)
        compare_cfgs(timm.get_pretrained_cfg(prefix + key), timm.get_pretrained_cfg(key), prefix, key)
    assert timm.models.get_pretrained_cfg_value(name, "input_size") == timm.models.get_pretrained_cfg_value(
        backbone, "input_size"
    )


def with_prefix(names: Any) -> Any:
    return f"backbone.{names}" if isinstance(names, str) else tuple(f"backbone.{name}" for name in names)


def compare_cfgs(ours: Any, theirs: Any, prefix: str, key: str) -> None:
    """Asserts that two cfgs differ by names of parameters alone, and by a completed Hub id."""
    ours, theirs = ours.to_dict(), theirs.to_dict()
    classifier = theirs.pop("classifier")
    assert ours.pop("classifier") == (with_prefix(classifier) if prefix == EVIDENCE_PREFIX else "head.classifier.fc2")
    assert ours.pop("first_conv") == with_prefix(theirs.pop("first_conv"))
    ours.pop("architecture", None)
    theirs.pop("architecture", None)
    if theirs.get("hf_hub_id") == "timm/":
        theirs["hf_hub_id"] = f"timm/{key}"
    assert ours == theirs


def test_a_backbone_of_several_convs_and_classifiers_gets_all_names_prefixed() -> None:
    ours, theirs = (
        timm.get_pretrained_cfg(name) for name in ("memwrap_evidence_crossvit_tiny_240", "crossvit_tiny_240")
    )
    assert len(theirs.first_conv) == len(theirs.classifier) == 2
    assert ours.first_conv == tuple(f"backbone.{name}" for name in theirs.first_conv)
    assert ours.classifier == tuple(f"backbone.{name}" for name in theirs.classifier)


@pytest.mark.parametrize("tag", ["resnet18.a1_in1k", "vit_base_patch16_clip_224.openai", "resnet18"])
def test_data_config_is_the_backbones(tag: str) -> None:
    with torch.device("meta"):
        ours, theirs = timm.create_model(f"memwrap_{tag}", num_classes=3), timm.create_model(tag, num_classes=3)
    assert timm.data.resolve_model_data_config(ours) == timm.data.resolve_model_data_config(theirs)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_pretrained_cfg_of_a_created_model_is_its_own(prefix: str) -> None:
    model = timm.create_model(f"{prefix}test_resnet.r160_in1k", num_classes=3)
    assert model.pretrained_cfg["architecture"] == f"{prefix}test_resnet"
    assert model.default_cfg == model.pretrained_cfg
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    assert model.pretrained_cfg["hf_hub_id"] == "timm/test_resnet.r160_in1k"


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("backbone", ["resnet18", "memwrap_resnet18", "net_baseline_evidence"])
def test_a_name_is_split_into_prefix_and_backbone(prefix: str, backbone: str) -> None:
    assert split_name(prefix + backbone) == (prefix, backbone)


def test_a_name_of_timms_is_not_split() -> None:
    with pytest.raises(ValueError, match=r"'resnet18' is not a Memory Wrap architecture.*'memwrap_'"):
        split_name("resnet18")


def test_the_cfg_of_the_backbone_is_found_again() -> None:
    for name in ("test_resnet.r160_in1k", "crossvit_tiny_240.in1k", "test_vit.r160_in1k"):
        for prefix in PREFIXES:
            ours, theirs = (timm.get_pretrained_cfg(key).to_dict() for key in (prefix + name, name))
            found = registry.backbone_cfg({**ours, "architecture": prefix + name}, name.split(".")[0])
            assert {**found, "hf_hub_id": ""} == {**theirs, "architecture": name.split(".")[0], "hf_hub_id": ""}


def test_importing_twice_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = timm.list_models()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert register_backbones() == []
        importlib.reload(timm_memwrap)
    assert timm.list_models() == before
    assert not caplog.records


def test_a_module_that_is_reloaded_warns_of_nothing() -> None:
    """In a process of its own, since other tests hold on to the module's classes."""
    code = (
        "import importlib, sys, timm, timm_memwrap\n"
        "before = timm.list_models()\n"
        "importlib.reload(timm_memwrap.registry)\n"
        "importlib.reload(timm_memwrap)\n"
        "del sys.modules['timm_memwrap.registry'], sys.modules['timm_memwrap']\n"
        "import timm_memwrap\n"
        "assert timm.list_models() == before\n"
        "assert timm.create_model('memwrap_test_resnet', num_classes=3).num_classes == 3\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def late_architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Registers an architecture after the package was imported, and takes it out again."""
    name = "late_resnet"

    def late_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return timm.create_model("test_resnet", pretrained=pretrained, **kwargs)

    module = sys.modules[__name__]
    late_resnet.__module__ = __name__
    monkeypatch.setattr(module, "__all__", [], raising=False)
    default = timm.models._registry.generate_default_cfgs(
        {f"{name}.mine": dict(timm.get_pretrained_cfg("test_resnet").to_dict())}
    )
    monkeypatch.setattr(module, "default_cfgs", default, raising=False)
    register_model(late_resnet)
    yield name
    forget(name, *(prefix + name for prefix in PREFIXES))


def forget(*names: str) -> None:
    known = timm.models._registry
    for name in names:
        known._model_entrypoints.pop(name, None)
        module = known._model_to_module.pop(name, None)
        if module:
            known._module_to_models[module].discard(name)
        for cfgs in (known._model_default_cfgs, known._model_pretrained_cfgs):
            for key in [key for key in cfgs if key.split(".")[0] == name]:
                cfgs.pop(key)
        for key in [key for key in known._model_has_pretrained if key.split(".")[0] == name]:
            known._model_has_pretrained.discard(key)
        registry.default_cfgs.pop(name, None)


def test_an_architecture_registered_later(late_architecture: str) -> None:
    assert not timm.is_model(f"memwrap_{late_architecture}")
    assert register_backbones([late_architecture]) == [prefix + late_architecture for prefix in PREFIXES]
    assert register_backbones([late_architecture]) == []
    for prefix in PREFIXES:
        model = timm.create_model(prefix + late_architecture, num_classes=3)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert timm.list_models(f"memwrap_{late_architecture}") == [f"memwrap_{late_architecture}"]


def test_all_that_timm_has_by_now_is_registered(late_architecture: str) -> None:
    assert register_backbones() == [prefix + late_architecture for prefix in PREFIXES]


def test_register_backbones_refuses_what_it_cannot_register() -> None:
    with pytest.raises(ValueError, match="'no_such_net' is not in timm's registry"):
        register_backbones(["no_such_net"])
    with pytest.raises(ValueError, match="'gemma4_vit_167m_enc' is a bare encoder"):
        register_backbones(["gemma4_vit_167m_enc"])


@pytest.mark.slow
def test_import_costs_at_most_150_ms() -> None:
    code = "import timm, time; t = time.perf_counter(); import timm_memwrap; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert statistics.median(times) <= 0.15, times
