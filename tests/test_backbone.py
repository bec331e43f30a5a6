"""A backbone's own classifier, read through a memory: the weighted sum of what it says of the samples."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from entmax import sparsemax
from memory_models import CLASSES, EVIDENCE, closest, dense, fill, new_images, new_model
from torch import Tensor, nn

import timm_memwrap
from timm_memwrap import BaselineMemory, MemoryWrapModel
from timm_memwrap.backbone import OwnClassifier, classifies_affinely
from timm_memwrap.read_heads import CentredLogits

# Their classifiers are two, or more than `get_classifier` says.
NOT_AFFINE = ("levit_128s", "deit_tiny_distilled_patch16_224", "crossvit_tiny_240", "efficientvit_m0")
SIZES = {"levit_128s": 224, "deit_tiny_distilled_patch16_224": 32, "crossvit_tiny_240": 240, "efficientvit_m0": 224}


def _plain(name: str) -> Any:
    size = {"img_size": 32} if SIZES.get(name) == 32 or name == "test_vit" else {}
    plain = timm.create_model(name, num_classes=CLASSES, **size)
    if name in NOT_AFFINE:
        # Some are made with a classifier of zeros.
        for classifier in nn.ModuleList(_classifiers(plain)).modules():
            if isinstance(classifier, nn.Linear):
                nn.init.normal_(classifier.weight)
                nn.init.normal_(classifier.bias)
    return plain.eval()


def _classifiers(plain: Any) -> list[nn.Module]:
    found = plain.get_classifier()
    return list(found) if isinstance(found, tuple | nn.ModuleList) else [found]


def _plain_parts(plain: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-logits and logits of a plain timm model, as any user of timm gets them."""
    return plain.forward_head(plain.forward_features(images), pre_logits=True), plain(images)


def _naive_similarity(read_head: str, inputs: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor]) -> Tensor:
    """Similarities as the documentation says them, each by itself."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a[:, None], b[None], dim=-1)

    (features, logits), (memory_features, memory_logits) = inputs, memory
    if read_head == "logits":
        return cosine(logits - logits.mean(1, keepdim=True), memory_logits - memory_logits.mean(1, keepdim=True))
    if read_head == "pre_logits":
        return cosine(features, memory_features)
    if read_head.startswith("joint"):
        weight = 0.16 if read_head == "joint" else 1.0
        centred = (part - part.mean(1, keepdim=True) for part in (logits, memory_logits))
        return (cosine(features, memory_features) + weight * cosine(*centred)) / (1 + weight)
    probabilities = cosine(logits.softmax(dim=1), memory_logits.softmax(dim=1))
    return (probabilities + 4 * cosine(features, memory_features)) / 5


SCALES = {"logits": 10, "pre_logits": 10, "probabilities": 20}


def _naive_weights(read_head: str, inputs: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor]) -> Tensor:
    """Weights as the documentation says them."""
    if not read_head.startswith("joint"):
        return sparsemax(SCALES[read_head] * _naive_similarity(read_head, inputs, memory), dim=1)
    # Vectors of these similarities: a reconstruction depends on nothing else.
    vectors = tuple(map(torch.cat, zip(inputs, memory, strict=True)))
    factor = torch.linalg.cholesky(
        _naive_similarity(read_head, vectors, vectors).double() + 1e-12 * torch.eye(len(vectors[0]))
    )
    queries, keys = factor.split([len(inputs[0]), len(memory[0])])
    return torch.stack([closest(query, keys) for query in queries]).float()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("read_head", EVIDENCE)
def test_logits_are_the_weighted_sum_of_the_plain_models_logits_of_the_samples(read_head: str, name: str) -> None:
    """C(sum w f) == sum w C(f), for an affine classifier C."""
    plain = _plain(name)
    model = fill(timm_memwrap.wrap(plain, read_head=read_head))
    assert not model.encodes_logits
    assert model.encoding_size == plain.head_hidden_size
    with torch.no_grad():
        inputs, memory = _plain_parts(plain, new_images()), _plain_parts(plain, new_images(20, 2))
        weights = _naive_weights(read_head, inputs, memory)
        readout = model(new_images(), return_readout=True)
    torch.testing.assert_close(readout.logits, weights @ memory[1], atol=1e-4, rtol=1e-4)
    # A fresh model crowds its encodings, where weights that differ a little reconstruct the same.
    torch.testing.assert_close(
        dense(readout, 20), weights, atol=1e-3 if read_head.startswith("joint") else 1e-4, rtol=0
    )


@pytest.mark.parametrize("name", NOT_AFFINE)
@pytest.mark.parametrize("read_head", EVIDENCE)
def test_where_the_classifier_is_not_affine_logits_are_kept_behind_the_pre_logits(read_head: str, name: str) -> None:
    plain = _plain(name)
    assert not classifies_affinely(plain)
    model = timm_memwrap.wrap(plain, read_head=read_head)
    assert model.encodes_logits
    assert model.encoding_size == plain.head_hidden_size + CLASSES
    size = SIZES[name]
    images, samples = torch.randn(2, 3, size, size), torch.randn(5, 3, size, size)
    data = torch.utils.data.TensorDataset(samples, torch.arange(5) % CLASSES)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
    with torch.no_grad():
        inputs, memory = _plain_parts(plain, images), _plain_parts(plain, samples)
        torch.testing.assert_close(model.memory_bank.encodings, torch.cat(memory, dim=1), atol=1e-4, rtol=1e-4)
        weights = _naive_weights(read_head, inputs, memory)
        readout = model(images, return_readout=True)
        own = model.own_logits(torch.arange(5))
    torch.testing.assert_close(readout.logits, weights @ memory[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(dense(readout, 5), weights, atol=1e-3, rtol=0)
    torch.testing.assert_close(own, memory[1], atol=1e-3, rtol=1e-3)
    assert readout.logits.is_contiguous()
    # Trained heads have no use for them.
    assert not timm_memwrap.wrap(plain, read_head="linear").encodes_logits


def test_distilled_training_is_refused_with_the_fix() -> None:
    plain = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=32, depth=1)
    model = timm_memwrap.wrap(plain).train()
    plain.set_distilled_training(True)
    with pytest.raises(ValueError, match=r"distilled training.*set_distilled_training\(False\)"):
        model(torch.randn(2, 3, 32, 32))
    plain.set_distilled_training(False)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, CLASSES)


class _Backbone(nn.Module):
    """A backbone with a given classifier."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def get_classifier(self) -> Any:
        return self.classifier


@pytest.mark.parametrize(
    ("classifier", "affine"),
    [
        (nn.Linear(4, 3), True),
        (nn.Conv2d(4, 3, 1), True),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)), True),
        (nn.Identity(), True),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), False),
        (nn.LayerNorm(4), False),
        ((nn.Linear(4, 3), nn.Linear(4, 3)), False),
        (nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]), False),
    ],
)
def test_a_classifier_is_affine_if_all_of_its_parts_are(classifier: Any, affine: bool) -> None:
    assert classifies_affinely(_Backbone(classifier)) == affine


def test_the_logits_read_head_is_the_baseline_layer_on_the_pre_logits() -> None:
    plain = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    model = fill(timm_memwrap.wrap(plain, read_head="logits"))
    classifier = plain.get_classifier()
    layer = BaselineMemory(
        plain.head_hidden_size,
        CLASSES,
        head=CentredLogits(classifier),
        classifier=classifier,
        scale=10,
    )
    with torch.no_grad():
        (features, _), (memory_features, _) = _plain_parts(plain, new_images()), _plain_parts(plain, new_images(20, 2))
        expected, weights = layer(features, memory_features, return_weights=True)
        readout = model(new_images(), return_readout=True)
    torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dense(readout, 20), weights, atol=1e-5, rtol=0)


def test_an_own_classifier_is_convolutional_where_the_backbones_is() -> None:
    plain = timm.create_model("mobilenetv3_small_050", num_classes=CLASSES).eval()
    plain.classifier = nn.Conv2d(plain.head_hidden_size, CLASSES, 1)
    encoding = torch.randn(3, plain.head_hidden_size)
    expected = plain.classifier(encoding[..., None, None]).flatten(1)
    torch.testing.assert_close(OwnClassifier(plain, with_logits=False)(encoding), expected)


@pytest.mark.parametrize("variant", EVIDENCE)
def test_an_own_classifier_has_no_weights_beside_the_backbones(variant: str) -> None:
    state = new_model(variant).state_dict()
    assert {name.split(".")[0] for name in state} == {"backbone", "calibration"}
    assert len([name for name in state if name.endswith("fc.weight")]) == 1


def _copies(model: MemoryWrapModel) -> dict[str, MemoryWrapModel]:
    return {"deep copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("variant", EVIDENCE)
@pytest.mark.parametrize("way", ["deep copy", "pickle"])
def test_a_copy_reads_with_its_own_classifier(variant: str, way: str) -> None:
    model = fill(new_model(variant))
    with torch.no_grad():
        before = model(new_images())
        other = _copies(model)[way]
        assert torch.equal(other(new_images()), before)
        other.backbone.fc.weight.mul_(-2.0)
        other.backbone.fc.bias.add_(1.0)
        assert torch.equal(model(new_images()), before)
        _assert_reads_with_its_classifier(other)
        assert not torch.allclose(other(new_images()), before)


def _assert_reads_with_its_classifier(model: MemoryWrapModel) -> None:
    with torch.no_grad():
        readout = model(new_images(), return_readout=True)
        expected = dense(readout, 20) @ model.backbone.fc(model.memory_bank.encodings)
        torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
        # The read head sees with the classifier too.
        fresh = copy.deepcopy(model)(new_images(), return_readout=True)
    assert torch.equal(fresh.weights, readout.weights)
    assert torch.equal(fresh.logits, readout.logits)


@pytest.mark.parametrize("variant", EVIDENCE)
@pytest.mark.parametrize("way", ["model", "deep copy", "pickle"])
@pytest.mark.parametrize("change", ["reset_classifier of the backbone", "another layer", "reset_classifier"])
def test_a_read_follows_a_new_classifier_of_the_backbone(variant: str, way: str, change: str) -> None:
    model = fill(new_model(variant))
    with torch.no_grad():
        before = model(new_images())  # its keys were made with the old classifier
    model = model if way == "model" else _copies(model)[way]
    if change == "another layer":
        model.backbone.fc = nn.Linear(96, CLASSES)
    elif change == "reset_classifier":
        model.reset_classifier(CLASSES)
        fill(model)
    else:
        model.backbone.reset_classifier(CLASSES)
    _assert_reads_with_its_classifier(model)
    with torch.no_grad():
        assert not torch.allclose(model(new_images()), before)
