"""Giving a timm model in hand a memory: its weights stay, bit for bit, and so does the model itself."""

from typing import Any

import pytest
import timm
import torch
from resnet_weights import equal, make_resnet, without_classifier
from torch import nn
from torch.utils.data import TensorDataset

from timm_memwrap import MemoryWrapModel, build_memory_bank, wrap


@pytest.fixture(scope="module")
def resnet() -> Any:
    return make_resnet()


def test_wrap_keeps_weights_and_classifier(resnet: Any) -> None:
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    model = wrap(resnet)
    assert isinstance(model, MemoryWrapModel)
    assert model.backbone is resnet
    assert equal(model.backbone.state_dict(), before)
    assert model.memory_only
    assert model.memory_args == {
        "distance": "cosine",
        "scale": 1.0,
        "read_head": "joint",
        "classifier": "own",
        "read": "reconstruction",
    }
    assert model.temperature == 1.0
    assert model.pretrained_cfg["architecture"] == "memwrap_evidence_test_resnet"
    assert model.training == resnet.training
    assert f"{model.pretrained_cfg['classifier']}.weight" in model.state_dict()
    assert f"{model.pretrained_cfg['first_conv']}.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("kwargs", "name", "read_head", "classifier"),
    [
        ({}, "memwrap_evidence_test_resnet", "joint", "own"),
        ({"classifier": "vote"}, "memwrap_evidence_test_resnet", "joint", "vote"),
        ({"read_head": "logits"}, "memwrap_evidence_test_resnet", "logits", "own"),
        ({"read_head": "identity"}, "memwrap_test_resnet", "identity", "mlp"),
        ({"num_classes": 5, "classifier": "vote"}, "memwrap_baseline_test_resnet", "identity", "vote"),
        ({"read_head": "identity", "classifier": "vote"}, "memwrap_baseline_test_resnet", "identity", "vote"),
        ({"num_classes": 5}, "memwrap_test_resnet", "linear", "mlp"),
        ({"num_classes": 5, "memory_only": True}, "memwrap_baseline_test_resnet", "linear", "mlp"),
    ],
)
def test_a_wrapped_model_is_the_one_that_its_name_creates(
    resnet: Any, kwargs: dict[str, Any], name: str, read_head: str, classifier: str
) -> None:
    """The name and the arguments that a saved model has for timm are all that it takes to make it again."""
    model = wrap(resnet, **kwargs).eval()
    assert model.pretrained_cfg["architecture"] == name
    assert (model.memory_args["read_head"], model.memory_args["classifier"]) == (read_head, classifier)
    assert model.memory_only == (name != "memwrap_test_resnet")
    created = timm.create_model(name, **model._model_args).eval()
    created.load_state_dict(model.state_dict())
    assert created.memory_args == model.memory_args
    assert created.pretrained_cfg["classifier"] == model.pretrained_cfg["classifier"]
    images, memory = torch.randn(2, 3, 32, 32), torch.randn(5, 3, 32, 32)
    if classifier != "vote":
        with torch.no_grad():
            assert torch.equal(created(images, memory=memory), model(images, memory=memory))


def test_a_wrapped_classifier_predicts_what_its_memory_makes_of_it(resnet: Any) -> None:
    """With one sample to read, the logits are those that the plain model gives for that sample."""
    model, sample = wrap(resnet).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = model(torch.randn(4, 3, 64, 64), memory=sample)
        torch.testing.assert_close(logits, resnet(sample).expand(4, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["deit_tiny_distilled_patch16_224", "test_vit3", "test_efficientnet_gn"])
def test_wrapping_takes_backbones_of_all_kinds(backbone: str) -> None:
    small = {"depth": 2, "img_size": 32} if backbone.startswith("deit") else {}
    plain = timm.create_model(backbone, num_classes=6, **small).eval()
    model, images = wrap(plain), torch.randn(3, *((3, 32, 32) if small else plain.pretrained_cfg["input_size"]))
    assert not model.training
    with torch.no_grad():
        encodings = model.encode(images)
        torch.testing.assert_close(model.own_classifier(encodings), plain(images), rtol=1e-4, atol=1e-5)
        own = model(images[:1], memory=images[:1])
        torch.testing.assert_close(own, plain(images[:1]), rtol=1e-4, atol=1e-4)


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
        ({"read_head": "logits", "num_classes": 4}, "keeps the model's classifier of 1000 classes"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"distance": "l1"}, "Unknown distance='l1'"),
        ({"classifier": "mlp"}, "classifier='own' or 'vote'"),
        ({"read_head": "linear", "classifier": "own"}, "classifier='own' keeps the backbone's classifier"),
        ({"memory_only": False}, "from the memory alone"),
        ({"classifier": "vote", "memory_only": False}, "memory alone"),
    ],
)
def test_wrap_refuses_arguments_that_do_not_fit(resnet: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(resnet, **kwargs)


@pytest.mark.parametrize(
    "layer", [nn.Linear(96, 3), nn.Sequential(nn.Dropout(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))]
)
def test_a_classifier_that_was_replaced_is_counted(layer: nn.Module) -> None:
    backbone = timm.create_model("test_resnet").eval()
    backbone.fc = layer.eval()
    model = wrap(backbone)
    assert model.num_classes == backbone.num_classes == model.pretrained_cfg["num_classes"] == 3
    x = torch.randn(6, 3, 32, 32)
    build_memory_bank(model, TensorDataset(x, torch.arange(6) % 3), size=None, progress=False)
    assert model(x).shape == (6, 3)
    torch.testing.assert_close(model.own_logits(torch.arange(6)), backbone(x))


def test_a_classifier_in_another_place_is_refused_with_the_line_to_write() -> None:
    backbone = timm.create_model("test_convnext", num_classes=3)
    backbone.head = nn.Linear(64, 3)
    with pytest.raises(ValueError, match=r"'head\.fc'.*Linear has no.*model\.head\.fc = torch\.nn\.Linear\("):
        wrap(backbone)


@pytest.mark.parametrize("around", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_what_stands_around_a_model_is_taken_off(resnet: Any, around: Any) -> None:
    assert wrap(around(resnet)).backbone is resnet


def test_wrap_refuses_what_is_no_timm_classifier(resnet: Any) -> None:
    with pytest.raises(ValueError, match=r"Memory Wrap model already.*model\.backbone"):
        wrap(wrap(resnet))
    with pytest.raises(ValueError, match=r"Linear lacks .*forward_features"):
        wrap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="without features_only"):
        wrap(timm.create_model("test_resnet", features_only=True))
