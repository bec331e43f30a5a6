"""The table against the standard library's statistics, and what is drawn."""

import json
import logging
import statistics
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from timm_memwrap.experiments.plots import plot_frontier, plot_growth
from timm_memwrap.experiments.table import ComparisonReport, Statistic

ACCURACIES = {"linear": {0: 0.5, 1: 0.6, 2: 0.9}, "batch": {0: 0.52, 1: 0.58, 2: 0.94}, "knn": {1: 0.4}}


def _grown(accuracy: float) -> dict:
    measures = {"explanation_accuracy": 0.9, "identical_class_rate": 0.8, "support_size": 5.0, "calibration_error": 0.1}
    growth = [
        {"selection": selection, "samples_per_class": each, "memory_size": 10 * each, "accuracy": accuracy / 2}
        | measures
        for selection in ("balanced", "herding")
        for each in (1, 10)
    ]
    return {"accuracy": accuracy, "train_seconds": 2.0, "memory_size": 1000, "growth": growth, **measures}


def _report(folder: Path) -> ComparisonReport:
    plain = {head: {seed: {"accuracy": a, "train_seconds": 4.0} for seed, a in by_seed.items()}
             for head, by_seed in ACCURACIES.items()}  # fmt: skip
    return ComparisonReport(folder, {**plain, "bank": {0: _grown(0.7), 1: _grown(0.8)}}, {"knn": 1.25})


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    difference = _report(tmp_path).difference("batch")
    assert difference is not None
    pairs = [ACCURACIES["batch"][seed] - ACCURACIES["linear"][seed] for seed in range(3)]
    assert difference.mean == pytest.approx(statistics.mean(pairs))
    assert difference.deviation == pytest.approx(statistics.stdev(pairs))
    one = _report(tmp_path).difference("knn")
    assert one == Statistic(pytest.approx(-0.2), None)


def test_without_the_reference_there_is_no_difference(tmp_path: Path) -> None:
    report = ComparisonReport(tmp_path, {"knn": {0: {"accuracy": 0.5}}}, {})
    assert report.difference("knn") is None
    assert report.difference("mlp") is None
    assert "50.00" in str(report)


def test_the_table_says_means_deviations_and_differences(tmp_path: Path) -> None:
    lines = {line.split("|")[1].strip(): line for line in reversed(str(_report(tmp_path)).splitlines()) if line}
    mean, deviation = statistics.mean(ACCURACIES["batch"].values()), statistics.stdev(ACCURACIES["batch"].values())
    assert f"{100 * mean:.2f} ± {100 * deviation:.2f}" in lines["batch"]
    assert "+1.33" in lines["batch"]
    assert "1.25x" in lines["knn"]
    assert "0.50x" in lines["bank"]
    assert len({line.count("|") for line in str(_report(tmp_path)).split("\n\n")[0].splitlines()}) == 1


def test_the_json_holds_all_that_was_measured(tmp_path: Path) -> None:
    heads = json.loads(json.dumps(_report(tmp_path).to_dict()))["heads"]
    assert heads["batch"]["seeds"]["2"]["accuracy"] == 0.94
    assert heads["bank"]["summary"]["accuracy"]["mean"] == pytest.approx(0.75)
    assert "growth" not in heads["bank"]["summary"]
    assert heads["knn"]["accuracy_difference"]["to"] == "linear"


def test_growth_is_averaged_step_by_step(tmp_path: Path) -> None:
    report = _report(tmp_path)
    rows = report.growth("bank")
    assert [(row["selection"], row["memory_size"]) for row in rows] == [
        ("balanced", 10),
        ("balanced", 100),
        ("herding", 10),
        ("herding", 100),
        ("all", 1000),
    ]
    assert [row["accuracy"] for row in rows] == pytest.approx([0.375] * 4 + [0.75])
    assert report.growth("batch") == []


def test_growth_is_drawn_where_there_is_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _report(tmp_path)
    path = plot_growth(report, tmp_path / "growth.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (
        plot_growth(ComparisonReport(tmp_path, {"linear": report.measures["linear"]}, {}), tmp_path / "x.png") is None
    )
    monkeypatch.setattr("timm_memwrap.experiments.plots.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert plot_growth(report, tmp_path / "growth.png") is None
    assert "timm-memwrap[plot]" in caplog.text


def _frontier(folder: Path) -> ComparisonReport:
    follows = {
        "knn": None,
        "joint:logit_weight=1.0": 0.8,
        "logits": 0.9,
        "joint:logit_weight=0.25": 0.1,
        "nadaraya_watson": None,
        "logits:classifier=vote": 0.2,
    }
    measures: dict = {"linear": {0: {"accuracy": 0.5}, 1: {"accuracy": 0.6}}}
    for head, follow in follows.items():
        measures[head] = {seed: {"accuracy": 0.6 + seed / 20, "follows_exchanged_answer": follow} for seed in (0, 1)}
    # Measured before there was the measure.
    measures["batch"] = {0: {"accuracy": 0.9}}
    return ComparisonReport(folder, measures, {})


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved, in order."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


def test_the_frontier_has_a_labelled_point_for_each_head(tmp_path: Path, figures: list[Figure]) -> None:
    report = _frontier(tmp_path)
    path = plot_frontier(report, tmp_path / "frontier.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes[0]
    assert sorted(text.get_text() for text in axes.texts) == sorted(
        ["knn", "nadaraya_watson", "logits", "logits:classifier=vote", "0.25", "1"]
    )
    places = {text.get_text(): text.xy for text in axes.texts}
    assert places["knn"] == places["nadaraya_watson"] == pytest.approx((0.0, 7.5))
    assert places["0.25"] == pytest.approx((10.0, 7.5))
    assert axes.get_title(loc="left")
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    # Heads of one option are joined in its order, and those without an answer have a marker of their own.
    joined = [list(container.lines[0].get_xdata()) for container in axes.containers]
    assert any(x == pytest.approx([10.0, 80.0]) for x in joined)
    markers = {container.lines[0].get_marker() for container in axes.containers}
    assert len(markers) == 2


def test_the_frontier_is_drawn_where_heads_and_the_reference_are_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures = _frontier(tmp_path).measures
    for names in (
        ["knn", "logits", "linear"],
        ["logits", "logits:classifier=vote"],
        ["linear", "knn", "nadaraya_watson"],
    ):
        few = ComparisonReport(tmp_path, {name: measures[name] for name in names}, {})
        assert plot_frontier(few, tmp_path / "frontier.png") is None
    assert not (tmp_path / "frontier.png").exists()
    monkeypatch.setattr("timm_memwrap.experiments.plots.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert plot_frontier(_frontier(tmp_path), tmp_path / "frontier.png") is None
    assert "timm-memwrap[plot]" in caplog.text


def test_what_does_not_apply_is_an_empty_cell_and_null(tmp_path: Path) -> None:
    report = _frontier(tmp_path)
    assert report.values("knn", "follows_exchanged_answer") == []
    heads = json.loads(json.dumps(report.to_dict()))["heads"]
    assert heads["knn"]["seeds"]["0"]["follows_exchanged_answer"] is None
    assert "follows_exchanged_answer" not in heads["knn"]["summary"]
    assert heads["logits"]["summary"]["follows_exchanged_answer"]["mean"] == 0.9
    header, _, *rows = str(report).split("\n\n")[0].splitlines()
    column = [title.strip() for title in header.split("|")].index("follows exchanged answer")
    cells = {row.split("|")[1].strip(): row.split("|")[column].strip() for row in rows}
    assert cells["logits"] == "90.0"
    assert cells["knn"] == cells["linear"] == ""
