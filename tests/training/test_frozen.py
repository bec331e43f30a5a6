import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from timm_memwrap.training.heads import FrozenClassifier, FrozenMemory, encode_images, freeze


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"])
def test_the_classifier_on_encodings_is_the_model(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(4, 3, *[model.pretrained_cfg["input_size"][-1]] * 2)
    head = freeze(model)
    assert isinstance(head, FrozenClassifier)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
        torch.testing.assert_close(head.eval()(head.encode(images)), model(images))
    assert {id(p) for p in head.parameters()} == {id(p) for p in model.get_classifier().parameters()}


def test_a_new_classifier_starts_from_zero() -> None:
    model = timm.create_model("test_efficientnet", num_classes=3)
    freeze(model)
    assert not any(parameter.any() for parameter in model.get_classifier().parameters())


@pytest.mark.parametrize("name", ["memwrap_test_resnet", "memwrap_baseline_test_vit"])
def test_the_memory_head_on_encodings_is_the_model(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    size = model.pretrained_cfg["input_size"][-1]
    images, memory = torch.randn(4, 3, size, size), torch.randn(5, 3, size, size)
    model.backbone.eval()
    head = freeze(model)
    assert isinstance(head, FrozenMemory)
    torch.testing.assert_close(head(head.encode(images), memory=head.encode(memory)), model(images, memory=memory))
    assert {n for n, p in head.named_parameters() if p.requires_grad} == {
        f"memory_model.head.{n}" for n, _ in model.head.named_parameters()
    }


def test_what_has_several_classifiers_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="several classifiers"):
        freeze(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3))


def test_the_own_classifier_cannot_be_trained_through_its_memory() -> None:
    model = timm.create_model("memwrap_evidence_test_resnet", num_classes=3, read_head="logits")
    with pytest.raises(ValueError, match=r"memory\.mode=none"):
        freeze(model)


def test_a_classifier_that_is_not_the_last_layer_is_noticed() -> None:
    model = timm.create_model("test_resnet", num_classes=3).eval()
    head = freeze(model)
    forward_head = model.forward_head
    model.forward_head = lambda x, pre_logits=False: forward_head(x, pre_logits) + (0 if pre_logits else 1)
    with pytest.raises(ValueError, match="cannot be frozen"):
        head.encode(torch.randn(2, 3, 32, 32))


def test_encodings_come_in_the_order_of_the_images() -> None:
    model = timm.create_model("test_resnet", num_classes=3).eval()
    data = TensorDataset(torch.randn(7, 3, 32, 32), torch.arange(7) % 3)
    encoded = encode_images(freeze(model), model, DataLoader(data, 3), "cpu", progress=False)
    assert torch.equal(encoded.tensors[1], data.tensors[1])
    expected = model.forward_head(model.forward_features(data.tensors[0]), pre_logits=True)
    torch.testing.assert_close(encoded.tensors[0], expected)
