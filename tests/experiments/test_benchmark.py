"""The benchmark measures what it says, of what it says, and its table and plot show it."""

import json
import statistics
import time
from pathlib import Path

import pytest

from timm_memwrap.cli import main
from timm_memwrap.experiments.benchmark import PARTS, benchmark
from timm_memwrap.experiments.plots import plot_rows
from timm_memwrap.experiments.timing import Row, measure, table


def test_every_part_is_measured_beside_its_anchor() -> None:
    parts = [part for part in PARTS if part != "push"]
    rows = benchmark(["test_resnet"], [32], [2], [100], parts, rounds=1, width=16)
    assert {row.part for row in rows} == set(parts)
    for row in rows:
        assert row.milliseconds > 0
        if row.what.endswith(row.anchor):
            assert row.ratio == pytest.approx(1)
    assert {"plain backbone", "wrapped classifier", "memorywrap, cached encodings"} <= {row.what for row in rows}


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    times = measure({"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}, 3)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert statistics.median(times["b"]) >= 10


def test_an_index_is_measured_with_what_it_finds() -> None:
    pytest.importorskip("faiss")
    rows = benchmark(parts=["read"], bank_sizes=[500], rounds=1, width=16, indexes=["flat", "ivf"])
    found = {row.what: row for row in rows}
    assert found["faiss flat"].recall == pytest.approx(1, abs=1e-4)
    assert 0 < found["faiss ivf"].recall <= 1 + 1e-4
    assert found["exact read"].recall is None
    assert "recall 100.0%" in table(rows)


def test_a_table_says_which_budget_is_missed() -> None:
    row = Row("read", "exact read", 12.5, 1.6, "matrix product", 1.5, batch_size=32, bank_size=1_000_000)
    text = table([row])
    assert "1,000,000" in text
    assert "1.5 MISSED" in text
    assert "1.5 met" in table([Row(**{**row.__dict__, "ratio": 1.4})])


def test_a_plot_and_a_file_are_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["--parts", "[read]", "--bank_sizes", "[50,100]", "--rounds", "1", "--width", "8"]
    assert main(["benchmark", *args, "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert {row["bank_size"] for row in rows if row["what"] == "exact read"} == {50, 100}
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "| exact read " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["speed"]}, "'speed'"),
        ({"dtype": "int8"}, "'int8'"),
        ({"rounds": 0}, "rounds=0"),
        ({"parts": ["push"], "models": ["test_resnet"]}, "loopback"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    with pytest.raises(ValueError, match=message):
        benchmark(**options)


def test_there_must_be_reads_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no read"):
        plot_rows([], tmp_path / "b.png")
