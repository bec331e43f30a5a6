"""What `timm.create_model` makes of a Memory Wrap name, and which weights it loads with `pretrained=True`."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from resnet_weights import equal, make_resnet, without_classifier
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg
from torch import nn

from timm_memwrap import BaselineMemory
from timm_memwrap.constants import BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX

PREFIXES = (PREFIX, BASELINE_PREFIX, EVIDENCE_PREFIX)
TRAINED, EVIDENCE = "memwrap_test_resnet", "memwrap_evidence_test_resnet"


@pytest.fixture(scope="module")
def resnet() -> Any:
    return make_resnet()


@pytest.fixture(scope="module")
def resnet_file(resnet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(resnet.state_dict(), path, metadata={"format": "pt"})
    return path


def load(name: str, file: Path, **kwargs: Any) -> Any:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("num_classes", [None, 1000, 10, 0])
def test_pretrained_loads_the_backbones_weights(
    prefix: str, num_classes: int | None, resnet: Any, resnet_file: Path
) -> None:
    kwargs = {} if num_classes is None else {"num_classes": num_classes}
    model = load(f"{prefix}test_resnet.r160_in1k", resnet_file, **kwargs)
    assert model.num_classes == (1000 if num_classes is None else num_classes)
    assert equal(without_classifier(model.backbone.state_dict()), without_classifier(resnet.state_dict()))
    keeps = prefix == EVIDENCE_PREFIX and num_classes != 0
    assert any(name.startswith("fc.") for name in model.backbone.state_dict()) == keeps


@pytest.mark.parametrize("read_head", [None, "joint", "probabilities", "pre_logits", "logits"])
@pytest.mark.parametrize("classifier", [None, "own", "vote"])
def test_pretrained_keeps_the_classifier_of_an_evidence_model(
    read_head: str | None, classifier: str | None, resnet: Any, resnet_file: Path
) -> None:
    if (read_head, classifier) == ("pre_logits", "vote"):
        pytest.skip("a vote that compares pre-logits has no use for the classifier")
    arguments = {"read_head": read_head, "classifier": classifier}
    given = {name: value for name, value in arguments.items() if value is not None}
    model = load(f"{EVIDENCE}.r160_in1k", resnet_file, **given).eval()
    assert equal(model.backbone.state_dict(), resnet.state_dict())
    assert model.memory_args["read_head"] == (read_head or "joint")
    assert model.memory_args["classifier"] == (classifier or "own")
    assert model.memory_only
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.encode(x), resnet.forward_head(resnet.forward_features(x), pre_logits=True))
        assert torch.equal(model.own_classifier(model.encode(x)), resnet(x))
    # Nothing of its own: every weight is the backbone's.
    assert not list(model.head.parameters())
    assert model.get_classifier() is model.backbone.fc


def test_a_kept_classifier_of_other_classes_is_new(resnet: Any, resnet_file: Path) -> None:
    model = load(EVIDENCE, resnet_file, num_classes=4)
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
@pytest.mark.parametrize("name", [TRAINED, EVIDENCE])
@pytest.mark.parametrize("key", ["layer1.0.conv1.weight", "layer4.0.bn2.running_var", "fc.bias"])
def test_a_missing_key_is_an_error(
    num_classes: int, name: str, key: str, resnet: Any, resnet_file: Path, tmp_path: Path
) -> None:
    tensors = load_file(resnet_file)
    del tensors[key]
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=key):
        load(name, tmp_path / "damaged.safetensors", num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [1000, 10, 0])
@pytest.mark.parametrize("name", [TRAINED, EVIDENCE])
def test_an_unexpected_key_is_an_error(num_classes: int, name: str, resnet_file: Path, tmp_path: Path) -> None:
    save_file({**load_file(resnet_file), "layer9.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"layer9\.weight"):
        load(name, tmp_path / "other.safetensors", num_classes=num_classes)


@pytest.mark.parametrize("name", [TRAINED, EVIDENCE])
def test_weights_of_another_number_of_classes(name: str, tmp_path: Path) -> None:
    """Loaded strictly when their number is said, and refused when it is not."""
    own = timm.create_model("test_resnet", num_classes=10)
    file = tmp_path / "ten.safetensors"
    save_file(own.state_dict(), file)
    overlay = {"file": str(file), "num_classes": 10}
    model = timm.create_model(name, True, pretrained_cfg_overlay=overlay)
    assert model.num_classes == 10
    expected = own.state_dict() if name == EVIDENCE else without_classifier(own.state_dict())
    assert equal(model.backbone.state_dict(), expected)
    with pytest.raises(ValueError, match=r"size mismatch for fc\.weight(.|\n)*num_classes=\.\.\."):
        load(name, file)

    tensors = load_file(file)
    del tensors["bn1.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"bn1\.weight"):
        timm.create_model(name, True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("num_classes", [1000, 10])
def test_a_memory_wrap_file_is_no_backbone_file(num_classes: int, tmp_path: Path) -> None:
    model = timm.create_model("memwrap_test_resnet", num_classes=10)
    file = tmp_path / "memwrap.safetensors"
    save_file(model.state_dict(), file)
    with pytest.raises(ValueError, match=r"whole Memory Wrap model.*from_pretrained"):
        load("memwrap_test_resnet", file, num_classes=num_classes)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("memwrap_test_resnet", {"classifier": "vote"}, "memory alone"),
        ("memwrap_test_resnet", {"read_head": "probabilities"}, "Create 'memwrap_evidence_<name>'"),
        (
            "memwrap_baseline_test_resnet",
            {"read_head": "logits"},
            "does not fit 'memwrap_baseline_<name>'.*as 'memwrap_ev",
        ),
        ("memwrap_baseline_test_resnet", {"classifier": "own"}, "classifier='own' keeps the backbone's classifier"),
        (
            "memwrap_evidence_test_resnet",
            {"read_head": "linear"},
            "does not fit 'memwrap_evidence_<name>'.*pre_logits.*trained",
        ),
        ("memwrap_evidence_test_resnet", {"classifier": "mlp"}, "classifier='own' or 'vote'"),
        ("memwrap_evidence_test_resnet", {"global_pool": ""}, "global_pool=''"),
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
        f"{prefix}test_resnet",
        pretrained_cfg=cfg.to_dict() if as_dict else cfg,
        num_classes=3,
        scale=2.0,
        read="sparsemax",
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
