"""Correspondences against pictures into which a patch of a sample was pasted, so that the answer is known."""

import json
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import explain
from timm_memwrap.explaining.correspondences import Correspondence
from timm_memwrap.model import MemoryWrapModel

# Channels first, channels last, and tokens with and without a prefix.
BACKBONES = {
    "test_resnet": {},
    "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    "test_vit": {},
    "test_vit_relpos": {},
}
SIZE = 4


def _scenes(count: int, side: int, seed: int) -> torch.Tensor:
    """Makes images of large spots, of which no two places look alike."""
    coarse = torch.randn(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    return 2 * F.interpolate(coarse, (side, side), mode="bicubic")


def _model(name: str = "test_resnet", **kwargs: Any) -> tuple[MemoryWrapModel, dict[int, torch.Tensor]]:
    """Returns a model with a bank, and the model inputs that the bank was built from, by id."""
    torch.manual_seed(0)
    model = timm_memwrap.wrap(timm.create_model(name, num_classes=2, **BACKBONES[name])).eval()
    memory = _scenes(SIZE, model.pretrained_cfg["input_size"][-1], seed=1)
    data = TensorDataset(memory, torch.arange(SIZE) % 2)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False, **kwargs)
    return model, dict(enumerate(memory))


def _matches(model: MemoryWrapModel, image: torch.Tensor, memory: Any, count: int = 5) -> tuple[Correspondence, ...]:
    """Returns the correspondences with the first sample of those that the prediction used."""
    return explain(model, image, correspondences=count, dataset=memory)[0].samples[0].correspondences


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("position", range(SIZE))
def test_a_pasted_patch_is_found_where_it_came_from(name: str, position: int) -> None:
    model, memory = _model(name)
    model.memory_bank.select([position])
    # Two fifths of the picture or so, moved by one or two: to whole patches and windows of each backbone.
    side = memory[0].shape[-1]
    step = side // 5 // 16 * 16
    image = _scenes(1, side, seed=2 + position)
    image[..., 2 * step : 4 * step, 2 * step : 4 * step] = memory[position][:, : 2 * step, step : 3 * step]
    found = _matches(model, image, memory, count=50)
    match = max(found, key=lambda match: match.similarity)
    assert all(2 * step / side <= edge <= 4 * step / side for edge in match.box)
    moved = [edge - before for edge, before in zip(match.box, match.sample_box, strict=True)]
    assert moved == pytest.approx([step / side, 2 * step / side] * 2)


def _places(model: MemoryWrapModel, image: torch.Tensor) -> torch.Tensor:
    """Returns unit features `[h * w, D]` of what the boxes of a `test_resnet` at 160 pixels hold, one by one."""
    with torch.no_grad():
        stages = model.backbone.forward_intermediates(image[None], intermediates_only=True)
    (stage,) = [stage[0] for stage in stages if stage.shape[-1] == 10]
    return torch.stack([stage[:, i, j] / stage[:, i, j].norm() for i in range(10) for j in range(10)])


def test_pairs_are_each_others_nearest_and_their_similarity_is_the_cosine() -> None:
    model, memory = _model()
    image = _scenes(1, 160, seed=2)
    (explanation,) = explain(model, image, SIZE, correspondences=6, dataset=memory)
    assert explanation.samples
    for sample in explanation.samples:
        similarity = _places(model, image[0]) @ _places(model, memory[sample.position]).T
        assert 1 < len(sample.correspondences) <= 6
        for match in sample.correspondences:
            place, other = (round(10 * box[1]) * 10 + round(10 * box[0]) for box in (match.box, match.sample_box))
            assert match.similarity == pytest.approx(float(similarity[place, other]), abs=1e-5)
            assert similarity[place].max() == similarity[:, other].max() == similarity[place, other]


@pytest.mark.parametrize("name", BACKBONES)
def test_boxes_are_in_the_picture_and_apart(name: str) -> None:
    model, memory = _model(name)
    for explanation in explain(model, _scenes(3, memory[0].shape[-1], 2), SIZE, correspondences=20, dataset=memory):
        for sample in explanation.samples:
            for boxes in ([m.box for m in sample.correspondences], [m.sample_box for m in sample.correspondences]):
                for i, (left, top, right, bottom) in enumerate(boxes):
                    assert 0 <= left < right <= 1
                    assert 0 <= top < bottom <= 1
                    assert right - left == pytest.approx(1 / 7, abs=0.05)
                    # None starts before another ends.
                    assert all(
                        max(abs(left - other[0]), abs(top - other[1])) > right - left - 1e-6 for other in boxes[:i]
                    )


def test_they_are_those_of_an_image_alone_and_of_any_run() -> None:
    model, memory = _model()
    batch = _scenes(3, 160, seed=2)
    together = explain(model, batch, SIZE, correspondences=5, dataset=memory)
    for image, expected in zip(batch, together, strict=True):
        for found in (
            explain(model, image, SIZE, correspondences=5, dataset=memory)[0],
            explain(model, torch.stack([_scenes(1, 160, 9)[0], image]), SIZE, correspondences=5, dataset=memory)[1],
        ):
            matches = {sample.position: sample.correspondences for sample in found.samples}
            assert matches == {sample.position: sample.correspondences for sample in expected.samples}
            assert any(matches.values())


def test_each_sample_shown_has_them_and_they_change_nothing_else() -> None:
    model, memory = _model()
    batch = _scenes(2, 160, seed=2)
    for plain, found in zip(
        explain(model, batch, 2), explain(model, batch, 2, correspondences=3, dataset=memory), strict=True
    ):
        for kind in ("samples", "examples", "counterfactuals"):
            for before, after in zip(getattr(plain, kind), getattr(found, kind), strict=True):
                assert before.correspondences == ()
                assert after.correspondences
                assert {**after.to_dict(), "correspondences": []} == before.to_dict()
        first = json.loads(found.to_json())["samples"][0]["correspondences"][0]
        expected = found.samples[0].correspondences[0]
        assert first == {
            "similarity": expected.similarity,
            "box": list(expected.box),
            "sample_box": list(expected.sample_box),
        }


def test_what_both_images_show_comes_before_a_background_that_is_more_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = _model()
    model.memory_bank.select([0])
    image = _scenes(1, 160, seed=2)

    def features(x: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
        stage = torch.zeros(1, 3, 10, 10)
        # A weak background, the same in both, and the strong part of an object, of which the images differ a little.
        stage[:, 0] = 0.1
        stage[:, 1, 6, 5] = 1.0
        stage[:, 2, 6, 5] = 0.5 if torch.equal(x, image) else 0.0
        return [stage]

    monkeypatch.setattr(model.backbone, "forward_intermediates", features, raising=False)
    thing, background = _matches(model, image, memory, count=2)
    assert thing.box == thing.sample_box == (0.5, 0.6, 0.6, 0.7)
    assert thing.similarity < background.similarity == pytest.approx(1)


def test_the_banks_own_pictures_do_where_there_are_no_others() -> None:
    model, memory = _model(store_images=True)
    (from_bank,) = explain(model, memory[0], SIZE, correspondences=5)
    assert from_bank.samples[0].position == 0
    # The image itself, which is small and out of focus there.
    matches = from_bank.samples[0].correspondences
    assert sum(match.box == match.sample_box for match in matches) >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"correspondences": -1}, r"correspondences=-1 .* at least 0"),
        ({"correspondences": True}, r"correspondences=True .* at least 0"),
        ({"correspondences": 5}, r"bank holds none.*dataset.*store_images"),
        ({"correspondences": 5, "dataset": {}}, r"The memory sample \d is not in dict"),
    ],
)
def test_what_cannot_be_found_is_said(arguments: dict[str, Any], message: str) -> None:
    model, memory = _model()
    with pytest.raises(ValueError, match=message):
        explain(model, memory[0], **arguments)


def test_a_backbone_without_features_by_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = _model()
    kind = type(model.backbone)
    monkeypatch.setattr(kind, "forward_intermediates", lambda *args, **kwargs: [torch.ones(1, 8)])
    with pytest.raises(ValueError, match=r"shapes \[\[1, 8\]\].*correspondences=0"):
        _matches(model, memory[0], memory)
    monkeypatch.delattr(kind, "forward_intermediates")
    with pytest.raises(ValueError, match=r"ResNet has no forward_intermediates.*correspondences=0"):
        _matches(model, memory[0], memory)
    assert explain(model, memory[0])
