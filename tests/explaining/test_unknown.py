"""Telling known images from unknown ones, one image at a time."""

from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, TensorDataset

import timm_memwrap
from timm_memwrap.explaining import evaluate_unknown
from timm_memwrap.model import MemoryWrapModel


def _known(make_images: Callable[..., torch.Tensor], count: int = 10) -> TensorDataset:
    return TensorDataset(make_images(count, seed=5), torch.arange(count) % 4)


@torch.no_grad()
def test_it_agrees_with_a_naive_implementation(
    model: MemoryWrapModel, make_images: Callable[..., torch.Tensor]
) -> None:
    known, unknown = make_images(10, seed=5), 0.3 * make_images(7, seed=6) + 1
    metrics = evaluate_unknown(model, _known(make_images), unknown.split(3), progress=False)
    rows: dict[str, list[float]] = {name: [] for name in ("familiarity", "max_softmax", "energy", "neighbours")}
    stopped = []
    for image in (*known, *unknown):
        encoding = model.encode(image[None])
        readout = model.read(encoding)
        logits = model.backbone.get_classifier()(encoding) if model.keeps_classifier else readout.logits
        rows["familiarity"].append(-float(readout.remainder))
        rows["max_softmax"].append(float(logits.softmax(dim=1).max()))
        rows["energy"].append(float(logits.exp().sum().log()))
        # There are fewer than fifty samples, so it is the furthest.
        rows["neighbours"].append(float(cosine_similarity(encoding, model.memory_bank.encodings).min()))
        stopped.append(timm_memwrap.explain(model, image)[0].familiarity < 0.05)
    assert (metrics.known, metrics.unknown) == (10, 7)
    assert metrics.stopped_known == pytest.approx(sum(stopped[:10]) / 10)
    assert metrics.stopped_unknown == pytest.approx(sum(stopped[10:]) / 7)
    for name, scores in rows.items():
        found = getattr(metrics, name)
        assert found.auroc == pytest.approx(roc_auc_score([1] * 10 + [0] * 7, scores), abs=0.03), name
        assert found.fpr_at_95 == pytest.approx(sum(score >= min(scores[:10]) - 1e-6 for score in scores[10:]) / 7)


@pytest.mark.parametrize("count", [1, 3, 50])
@torch.no_grad()
def test_of_the_neighbours_the_last_one_counts(
    count: int,
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The nearest of what is remembered is itself, so that it alone would tell all."""
    monkeypatch.setattr("timm_memwrap.explaining.unknown._NEIGHBOURS", count)
    model, images = make_model("wrapped"), torch.cat([make_images(12, seed=1), make_images(12, seed=6)])
    remembered = TensorDataset(images[:12], torch.arange(12) % 4)
    found = evaluate_unknown(model, remembered, [images[12:]], progress=False).neighbours
    similarities = cosine_similarity(model.encode(images)[:, None], model.memory_bank.encodings[None], dim=2)
    scores = similarities.sort(dim=1, descending=True).values[:, min(count, 12) - 1]
    expected = roc_auc_score([1] * 12 + [0] * 12, scores)
    assert (expected == 1.0) == (count == 1)
    assert found.auroc == pytest.approx(expected, abs=0.01)


def test_images_may_come_in_any_form(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, known, unknown = make_model("wrapped"), _known(make_images), make_images(6, seed=8)
    expected = evaluate_unknown(model, known, [unknown], progress=False)
    for form in (unknown.split(2), list(unknown), DataLoader(unknown, batch_size=4)):
        assert str(evaluate_unknown(model, known, form, progress=False)) == str(expected)


@pytest.mark.parametrize(("known", "unknown"), [([], [1]), ([1], [])])
def test_nothing_to_compare_is_refused(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    known: list[int],
    unknown: list[int],
) -> None:
    data = _known(make_images) if known else []
    with pytest.raises(ValueError, match=r"empty|no unknown images"):
        evaluate_unknown(make_model("wrapped"), data, [make_images(2)] if unknown else [], progress=False)


def test_noise_is_less_familiar_than_images_like_those_remembered(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped", size=24)
    near = make_images(24, seed=1) + 0.05 * make_images(24, seed=2)
    timm_memwrap.calibrate(model, TensorDataset(near[:12], torch.arange(12) % 4), progress=False)
    metrics = evaluate_unknown(
        model, TensorDataset(near[12:], torch.arange(12) % 4), [3 * make_images(12, seed=3)], progress=False
    )
    assert metrics.familiarity.auroc == 1.0
    assert metrics.stopped_unknown == 1.0
    assert "familiarity below 0.05" in str(metrics)
