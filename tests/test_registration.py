"""The names in timm's registry, what `pretrained=True` loads by them, and `wrap`."""

import importlib
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg, register_model
from torch import Tensor, nn

import timm_memwrap
from timm_memwrap import BaselineMemory, MemoryWrapModel, register_backbones, registration, wrap
from timm_memwrap.registration import backbone_name

PREFIXES = ("memwrap_", "memwrap_baseline_")
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


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the names are those of timm 1.0.31")
def test_the_rule_leaves_out_the_encoders_and_nothing_else() -> None:
    assert sorted(name for name in timms_own(timm.list_models()) if not timm.is_model(f"memwrap_{name}")) == sorted(
        ENCODERS
    )
    assert len(timms_own(timm.list_models())) == 1371


def test_two_names_for_every_classification_architecture() -> None:
    own = timms_own(timm.list_models())
    left_out = [name for name in own if not timm.is_model(f"memwrap_{name}")]
    # The rule itself: what timm calls an encoder cannot be given a classifier.
    assert all(name.endswith("_enc") for name in left_out)
    assert not [name for name in own if name.endswith("_enc") and name not in left_out]
    assert len(timm.list_models("memwrap_*")) == 2 * (len(own) - len(left_out))
    assert len(timm.list_models("memwrap_baseline_*")) == len(own) - len(left_out)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("backbone", ["resnet18", "vit_base_patch16_224", "convnext_tiny", "test_vit", "resnet10t"])
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
        compare_cfgs(ours[prefix + key], cfg, key)
        compare_cfgs(timm.get_pretrained_cfg(prefix + key), timm.get_pretrained_cfg(key), key)
    assert timm.models.get_pretrained_cfg_value(name, "input_size") == timm.models.get_pretrained_cfg_value(
        backbone, "input_size"
    )


def compare_cfgs(ours: Any, theirs: Any, key: str) -> None:
    """Asserts that two cfgs differ by names of parameters alone, and by a completed Hub id."""
    ours, theirs = ours.to_dict(), theirs.to_dict()
    assert ours.pop("classifier") == "head.classifier.fc2"
    assert theirs.pop("classifier")
    assert ours.pop("first_conv") == f"backbone.{theirs.pop('first_conv')}"
    ours.pop("architecture", None)
    theirs.pop("architecture", None)
    if theirs.get("hf_hub_id") == "timm/":
        theirs["hf_hub_id"] = f"timm/{key}"
    assert ours == theirs


def test_a_backbone_of_several_convs_and_classifiers_gets_all_names_prefixed() -> None:
    cfg = timm.get_pretrained_cfg("memwrap_crossvit_tiny_240")
    assert cfg.first_conv == tuple(
        f"backbone.{name}" for name in timm.get_pretrained_cfg("crossvit_tiny_240").first_conv
    )


@pytest.mark.parametrize("tag", ["resnet18.a1_in1k", "vit_base_patch16_clip_224.openai", "resnet18"])
def test_data_config_is_the_backbones(tag: str) -> None:
    with torch.device("meta"):
        ours, theirs = timm.create_model(f"memwrap_{tag}", num_classes=3), timm.create_model(tag, num_classes=3)
    assert timm.data.resolve_model_data_config(ours) == timm.data.resolve_model_data_config(theirs)


def test_pretrained_cfg_of_a_created_model_is_its_own() -> None:
    model = timm.create_model("memwrap_test_resnet.r160_in1k", num_classes=3)
    assert model.pretrained_cfg["architecture"] == "memwrap_test_resnet"
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    assert model.pretrained_cfg["hf_hub_id"] == "timm/test_resnet.r160_in1k"


def test_backbone_name() -> None:
    assert {backbone_name(prefix + "resnet18") for prefix in PREFIXES} == {"resnet18"}


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
        "importlib.reload(timm_memwrap.registration)\n"
        "importlib.reload(timm_memwrap)\n"
        "del sys.modules['timm_memwrap.registration'], sys.modules['timm_memwrap']\n"
        "import timm_memwrap\n"
        "assert timm.list_models() == before\n"
        "assert timm.create_model('memwrap_test_resnet', num_classes=3).num_classes == 3\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# -- an architecture that is registered later -------------------------------------------------------------------------


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
    registry = timm.models._registry
    for name in names:
        registry._model_entrypoints.pop(name, None)
        module = registry._model_to_module.pop(name, None)
        if module:
            registry._module_to_models[module].discard(name)
        for known in (registry._model_default_cfgs, registry._model_pretrained_cfgs):
            for key in [key for key in known if key.split(".")[0] == name]:
                known.pop(key)
        for key in [key for key in registry._model_has_pretrained if key.split(".")[0] == name]:
            registry._model_has_pretrained.discard(key)
        registration.default_cfgs.pop(name, None)


def test_an_architecture_registered_later(late_architecture: str) -> None:
    assert not timm.is_model(f"memwrap_{late_architecture}")
    assert register_backbones([late_architecture]) == [prefix + late_architecture for prefix in PREFIXES]
    assert register_backbones([late_architecture]) == []
    model = timm.create_model(f"memwrap_{late_architecture}", num_classes=3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert timm.list_models(f"memwrap_{late_architecture}") == [f"memwrap_{late_architecture}"]


def test_all_that_timm_has_by_now_is_registered(late_architecture: str) -> None:
    assert register_backbones() == [prefix + late_architecture for prefix in PREFIXES]


def test_register_backbones_refuses_what_it_cannot_register() -> None:
    with pytest.raises(ValueError, match="'no_such_net' is not in timm's registry"):
        register_backbones(["no_such_net"])
    with pytest.raises(ValueError, match="'gemma4_vit_167m_enc' is a bare encoder"):
        register_backbones(["gemma4_vit_167m_enc"])


# -- pretrained=True, from a file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> Any:
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=1000).eval()
    # Running statistics of their own, so that nothing matches by being new.
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))
    return model


@pytest.fixture(scope="module")
def resnet_file(resnet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(resnet.state_dict(), path, metadata={"format": "pt"})
    return path


def load(name: str, file: Path, **kwargs: Any) -> Any:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs)


def without_classifier(state_dict: dict[str, Tensor], classifier: str = "fc") -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(f"{classifier}.")}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("num_classes", [None, 1000, 10, 0])
def test_pretrained_loads_the_backbones_weights(
    prefix: str, num_classes: int | None, resnet: Any, resnet_file: Path
) -> None:
    kwargs = {} if num_classes is None else {"num_classes": num_classes}
    model = load(f"{prefix}test_resnet.r160_in1k", resnet_file, **kwargs)
    assert model.num_classes == (1000 if num_classes is None else num_classes)
    assert equal(model.backbone.state_dict(), without_classifier(resnet.state_dict()))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_pretrained_keeps_the_classifier_as_read_head(prefix: str, resnet: Any, resnet_file: Path) -> None:
    model = load(f"{prefix}test_resnet", resnet_file, read_head="classifier", classifier="linear").eval()
    assert equal(model.backbone.state_dict(), resnet.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.encode(x), resnet(x))
    # Nothing of its own: every weight is the backbone's.
    assert not list(model.head.parameters())


def test_a_kept_classifier_of_other_classes_is_new(resnet: Any, resnet_file: Path) -> None:
    model = load("memwrap_baseline_test_resnet", resnet_file, read_head="classifier", num_classes=4)
    assert equal(without_classifier(model.backbone.state_dict()), without_classifier(resnet.state_dict()))
    assert model.get_classifier().out_features == 4


def test_pretrained_with_one_channel(resnet: Any, resnet_file: Path) -> None:
    model = load("memwrap_test_resnet", resnet_file, in_chans=1, num_classes=7)
    plain = timm.create_model(
        "test_resnet", pretrained=True, pretrained_cfg_overlay={"file": str(resnet_file)}, in_chans=1, num_classes=0
    )
    assert model.in_chans == 1
    assert equal(model.backbone.state_dict(), plain.state_dict())
    assert model.backbone.state_dict()["conv1.0.weight"].shape[1] == 1
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_pretrained_with_another_input_size(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit", num_classes=1000)
    file = tmp_path / "test_vit.safetensors"
    save_file(vit.state_dict(), file)
    same, larger = (load("memwrap_test_vit", file, num_classes=5, **kwargs) for kwargs in ({}, {"img_size": 192}))
    assert equal(same.backbone.state_dict(), without_classifier(vit.state_dict(), "head"))
    plain = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=192, num_classes=0
    )
    assert equal(larger.backbone.state_dict(), plain.state_dict())
    assert larger.backbone.pos_embed.shape != same.backbone.pos_embed.shape
    assert larger(torch.randn(2, 3, 192, 192)).shape == (2, 5)


def test_features_only_loads_the_backbones_weights(resnet: Any, resnet_file: Path) -> None:
    extractor = load("memwrap_test_resnet", resnet_file, features_only=True)
    assert torch.equal(extractor.state_dict()["layer1.0.conv1.weight"], resnet.state_dict()["layer1.0.conv1.weight"])


@pytest.mark.parametrize("num_classes", [1000, 10, 0])
@pytest.mark.parametrize("read_head", ["linear", "classifier"])
@pytest.mark.parametrize("key", ["layer1.0.conv1.weight", "layer4.0.bn2.running_var", "fc.bias"])
def test_a_missing_key_is_an_error(
    num_classes: int, read_head: str, key: str, resnet: Any, resnet_file: Path, tmp_path: Path
) -> None:
    tensors = load_file(resnet_file)
    del tensors[key]
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=key):
        load("memwrap_test_resnet", tmp_path / "damaged.safetensors", num_classes=num_classes, read_head=read_head)


@pytest.mark.parametrize("num_classes", [1000, 10, 0])
def test_an_unexpected_key_is_an_error(num_classes: int, resnet_file: Path, tmp_path: Path) -> None:
    save_file({**load_file(resnet_file), "layer9.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"layer9\.weight"):
        load("memwrap_test_resnet", tmp_path / "other.safetensors", num_classes=num_classes)


@pytest.mark.parametrize("read_head", ["linear", "classifier"])
def test_weights_of_another_number_of_classes(read_head: str, tmp_path: Path) -> None:
    """Loaded strictly when their number is said, and refused when it is not."""
    own = timm.create_model("test_resnet", num_classes=10)
    file = tmp_path / "ten.safetensors"
    save_file(own.state_dict(), file)
    overlay = {"file": str(file), "num_classes": 10}
    model = timm.create_model("memwrap_test_resnet", True, pretrained_cfg_overlay=overlay, read_head=read_head)
    assert model.num_classes == 10
    expected = own.state_dict() if read_head == "classifier" else without_classifier(own.state_dict())
    assert equal(model.backbone.state_dict(), expected)
    with pytest.raises(ValueError, match=r"size mismatch for fc\.weight(.|\n)*num_classes=\.\.\."):
        load("memwrap_test_resnet", file, read_head=read_head)

    tensors = load_file(file)
    del tensors["bn1.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"bn1\.weight"):
        timm.create_model("memwrap_test_resnet", True, pretrained_cfg_overlay=overlay, read_head=read_head)


@pytest.mark.parametrize("num_classes", [1000, 10])
def test_a_memory_wrap_file_is_no_backbone_file(num_classes: int, tmp_path: Path) -> None:
    model = timm.create_model("memwrap_test_resnet", num_classes=10)
    file = tmp_path / "memwrap.safetensors"
    save_file(model.state_dict(), file)
    with pytest.raises(ValueError, match=r"whole Memory Wrap model.*from_pretrained"):
        load("memwrap_test_resnet", file, num_classes=num_classes)


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("memwrap_test_resnet", {"classifier": "vote"}, "memory alone"),
        ("memwrap_baseline_test_resnet", {"read_head": "classifier", "classifier": "mlp"}, "classifier='linear'"),
        ("memwrap_test_resnet", {"read_head": "mlp"}, "Unknown read_head='mlp'"),
        ("memwrap_test_resnet", {"classifier": "knn"}, "Unknown classifier='knn'"),
        ("memwrap_test_resnet", {"distance": "l1"}, "Unknown distance='l1'"),
        ("memwrap_test_resnet", {"scale": -1.0}, "scale=-1.0"),
        ("memwrap_test_resnet", {"global_pool": ""}, "global_pool=''"),
        ("memwrap_test_vit", {"global_pool": ""}, "global_pool=''"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, num_classes=3, **kwargs)


@pytest.mark.parametrize("kwargs", [{"memory_size": 3}, {"disttance": "l2"}])
def test_unknown_arguments_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        timm.create_model("memwrap_test_resnet", num_classes=3, **kwargs)


def test_arguments_reach_the_head() -> None:
    model = timm.create_model(
        "memwrap_baseline_test_resnet", num_classes=3, distance="l2", scale=2.5, read_head="identity", classifier="vote"
    )
    assert (model.head.distance, model.head.scale, type(model.head.head)) == ("l2", 2.5, nn.Identity)
    assert model.memory_only
    assert isinstance(timm.create_model("memwrap_baseline_test_resnet", num_classes=3).head, BaselineMemory)


def test_arguments_of_the_backbone_reach_it() -> None:
    model = timm.create_model("memwrap_test_vit", num_classes=3, img_size=96, global_pool="avg", drop_path_rate=0.1)
    assert model.backbone.global_pool == "avg"
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 3)


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_cfg_in_hand(as_dict: bool, prefix: str) -> None:
    cfg: Any = timm.get_pretrained_cfg(f"{prefix}test_resnet.r160_in1k")
    assert isinstance(cfg, PretrainedCfg)
    model = timm.create_model(
        f"{prefix}test_resnet", pretrained_cfg=cfg.to_dict() if as_dict else cfg, num_classes=3, scale=2.0
    )
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    assert model.pretrained_cfg["first_conv"] == "backbone.conv1.0"
    assert model.head.scale == 2.0


def test_a_cfg_in_hand_that_names_a_file(resnet: Any, resnet_file: Path) -> None:
    cfg = timm.get_pretrained_cfg("memwrap_test_resnet.r160_in1k").to_dict()
    model = timm.create_model(
        "memwrap_test_resnet", pretrained=True, pretrained_cfg={**cfg, "file": str(resnet_file)}, num_classes=3
    )
    assert equal(model.backbone.state_dict(), without_classifier(resnet.state_dict()))


# -- wrap -------------------------------------------------------------------------------------------------------------


def test_wrap_keeps_weights_and_classifier(resnet: Any) -> None:
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    model = wrap(resnet)
    assert isinstance(model, MemoryWrapModel)
    assert model.backbone is resnet
    assert equal(model.backbone.state_dict(), before)
    assert model.memory_only
    assert model.memory_args == {
        "distance": "cosine",
        "scale": 20.0,
        "read_head": "probabilities",
        "classifier": "linear",
        "temperature": 1.0,
    }
    assert model.pretrained_cfg["architecture"] == "memwrap_baseline_test_resnet"
    assert model.training == resnet.training
    assert f"{model.pretrained_cfg['classifier']}.weight" in model.state_dict()
    assert f"{model.pretrained_cfg['first_conv']}.weight" in model.state_dict()


@pytest.mark.parametrize("memory_only", [True, False])
def test_wrap_with_a_new_head_leaves_the_given_model_untouched(resnet: Any, memory_only: bool) -> None:
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    model = wrap(resnet, num_classes=5, memory_only=memory_only)
    assert model.backbone is not resnet
    assert equal(model.backbone.state_dict(), without_classifier(before))
    assert equal(resnet.state_dict(), before)
    assert resnet.num_classes == 1000
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    assert equal(resnet.state_dict(), before)
    assert model.train()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_wrap_a_model_without_classifier() -> None:
    bare = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match=r"num_classes=0.*Pass num_classes"):
        wrap(bare)
    assert wrap(bare, num_classes=4).num_classes == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"read_head": "classifier", "num_classes": 4}, "keeps the model's classifier of 1000 classes"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"distance": "l1"}, "Unknown distance='l1'"),
        ({"classifier": "mlp"}, "classifier='linear'"),
        ({"classifier": "vote", "memory_only": False}, "memory alone"),
    ],
)
def test_wrap_refuses_arguments_that_do_not_fit(resnet: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(resnet, **kwargs)


def test_wrap_refuses_what_is_no_timm_classifier(resnet: Any) -> None:
    with pytest.raises(ValueError, match=r"Memory Wrap model already.*model\.backbone"):
        wrap(wrap(resnet))
    with pytest.raises(ValueError, match=r"Linear lacks .*forward_features"):
        wrap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="without features_only"):
        wrap(timm.create_model("test_resnet", features_only=True))


# -- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_import_costs_at_most_150_ms() -> None:
    code = "import timm, time; t = time.perf_counter(); import timm_memwrap; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert statistics.median(times) <= 0.15, times
