"""The costs of a memory by its size: what is measured, what is extrapolated, and from which encodings."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import timm_memwrap
from timm_memwrap.experiments.benchmark import benchmark, sizes
from timm_memwrap.experiments.benchmark.encodings import synthetic_encodings
from timm_memwrap.experiments.benchmark.extrapolation import extrapolated
from timm_memwrap.experiments.benchmark.peak import Needed, measure_peak
from timm_memwrap.experiments.benchmark.subjects import backbone, filled
from timm_memwrap.experiments.timing import Row, table


def test_each_size_is_measured_and_larger_ones_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would start a process for each size.
    monkeypatch.setattr(sizes, "measure_peak", lambda small, folder: Needed(1.2, 1.3, 400))
    rows = benchmark(["test_resnet"], [32], parts=["sizes"], rounds=1, sizes=["2x32", "2x1000000"], largest=32)
    small, large = ([row for row in rows if row.bank_size == size] for size in (32, 1_000_000))
    assert [row.what for row in small] == [row.what for row in large]
    names = {"save: model with its memory", "load: model with its memory", "state dict"}
    assert names | {"first read", "read", "explanation", "build"} <= {row.what for row in small}
    for row in rows:
        assert math.isfinite(row.ratio)
        assert row.milliseconds > 0
        assert (row.classes, row.width) == (2, 96)
        assert row.extrapolated is (row.bank_size != 32)
    assert [row.batch_size for row in small if row.what == "read"] == [1, 32, 256]
    loads = [row for row in rows if row.what.startswith("load: model")]
    assert [(row.bytes_per_sample, row.peak_ratio) for row in loads] == [(12.5, 1.2), (12.5, 1.2)]
    assert [row.budget for row in large if row.what == "read"] == [0.25, None, None]
    lines = table(rows).splitlines()
    assert sum("extrapolated" in line for line in lines) == sum("1,000,000" in line for line in lines) == len(large)


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [
        (10.0, 10.0, 10.0),
        (10.0, 40.0, 400.0),
        (10.0, 25.0, 205.0),
        (10.0, 160.0, 16_000.0),
        (10.0, 8.0, 8.0),
        (10.0, 44.0, 452.0),
    ],
    ids=["constant", "linear", "constant and linear", "quadratic", "faster by noise", "slower by noise"],
)
def test_times_are_extrapolated_as_the_process_time_grows(few: float, many: float, expected: float) -> None:
    def rows(size: int, milliseconds: float) -> list[Row]:
        # Wall time is disturbed: it is twice as long with few samples.
        wall = milliseconds * (2 if size == 100 else 1)
        setting = {"bank_size": size, "batch_size": 1, "cpu_ratio": 1.0}
        anchor = Row("sizes", "product", float(size), 1.0, "product", cpu_milliseconds=float(size), **setting)
        return [anchor, Row("sizes", "read", wall, 1.0, "product", cpu_milliseconds=milliseconds, **setting)]

    anchor, row = extrapolated(rows(100, few), rows(400, many), 4000)
    assert (anchor.milliseconds, anchor.ratio) == (pytest.approx(4000), 1)
    assert row.milliseconds == pytest.approx(expected)
    assert row.cpu_milliseconds == pytest.approx(expected)
    assert row.ratio == row.cpu_ratio == pytest.approx(expected / 4000)
    assert (row.bank_size, row.extrapolated) == (4000, True)


def test_wall_time_is_extrapolated_on_a_device() -> None:
    few, many = (Row("sizes", "read", size / 100, 1.0, "read", bank_size=size) for size in (100, 400))
    (row,) = extrapolated([few], [many], 1000)
    assert (row.milliseconds, row.cpu_milliseconds, row.cpu_ratio) == (pytest.approx(10), None, None)


def test_a_new_process_tells_what_it_needs(tmp_path: Path) -> None:
    model = filled(timm_memwrap.wrap(backbone("test_resnet", 32, 2)), 20_000, 2)
    folder = timm_memwrap.save_pretrained(model, tmp_path / "model")
    needed = measure_peak(folder, folder)
    # Encodings and keys, in whatever precision.
    assert needed.bytes >= 20_000 * 96
    if sys.platform == "linux":
        for peak in needed[:2]:
            assert peak is not None
            assert 0.5 < peak < 10


def _similarities(encodings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    found, same = F.normalize(encodings) @ F.normalize(encodings).T, labels.unsqueeze(1) == labels
    different = ~torch.eye(len(labels), dtype=torch.bool)
    return found[same & different], found[~same]


@pytest.mark.parametrize("width", [512, 1280])
def test_synthetic_encodings_are_like_real_ones(width: int) -> None:
    encodings, labels = synthetic_encodings(500, width, 10, seed=1)
    assert float(encodings.min()) == 0
    assert float((encodings == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    within, between = _similarities(encodings, labels)
    assert float(within.median()) == pytest.approx(0.43, abs=0.05)
    assert float(between.median()) == pytest.approx(0.37, abs=0.05)
    # Few directions hold most of the variance.
    variances = torch.linalg.svdvals(encodings - encodings.mean(dim=0)) ** 2
    assert float(variances[:50].sum() / variances.sum()) > 0.5


def test_synthetic_encodings_of_another_seed_are_of_the_same_classes() -> None:
    encodings, labels = synthetic_encodings(200, 256, 4, seed=1)
    others, _ = synthetic_encodings(200, 256, 4, seed=2)
    assert not torch.equal(encodings, others)
    assert torch.equal(encodings, synthetic_encodings(200, 256, 4, seed=1)[0])
    nearest = (F.normalize(others) @ F.normalize(encodings).T).argmax(dim=1)
    assert float((labels[nearest] == labels).float().mean()) > 0.5
