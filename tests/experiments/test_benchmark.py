"""The benchmark measures what it says, of what it says, and its table and plot show it."""

import json
import logging
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from timm_memwrap.cli import main
from timm_memwrap.experiments.benchmark import PARTS, benchmark, compiling, importing, subjects
from timm_memwrap.experiments.benchmark.disk import read_raw
from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.plots import plot_rows
from timm_memwrap.experiments.timing import Row, Seconds, table

# Those of tiny models, in a second each.
QUICK = ("inference", "read", "stateless", "explain", "save", "training")


@pytest.mark.parametrize("part", QUICK)
def test_a_part_is_measured_beside_its_anchor(part: str) -> None:
    rows = benchmark(["test_resnet"], [32], [2], [100], [part], rounds=1, width=16, training_batch_sizes=[4])
    check_rows(rows, part)


def test_a_prediction_is_beside_the_plain_and_the_published_one() -> None:
    rows = benchmark(["test_resnet"], [32], [2], [100], ["inference"], rounds=1)
    assert {"plain backbone", "wrapped classifier", "memorywrap, cached encodings"} <= {row.what for row in rows}
    anchors = {row.anchor for row in rows if row.what.endswith("gradients enabled")}
    assert anchors == {"plain backbone, gradients enabled"}


def test_every_part_is_described_and_quick_ones_are_tested() -> None:
    elsewhere = ("compiled", "onnx", "sizes", "import", "push")
    assert set(PARTS) == {*QUICK, *elsewhere}
    assert Options.__doc__ is not None
    described = Options.__doc__.partition("parts: What to measure: ")[2].partition(";")[0]
    assert {name.strip() for name in described.split(",")} == set(PARTS)


def test_compiled_models_are_compared_without_the_time_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        """Stands for a compiled model: its first calls take long."""

        def __init__(self, model: torch.nn.Module) -> None:
            self.model, self.calls = model, 0

        def __call__(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls < 3:
                time.sleep(0.2)
            return self.model(images)

    monkeypatch.setattr(torch, "compile", Compiled)
    rows = benchmark(["test_resnet"], [32], bank_sizes=[100], parts=["compiled"], rounds=1)
    check_rows(rows, "compiled")
    assert all(row.milliseconds < 200 for row in rows)


def test_without_a_compiler_compiled_models_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert benchmark(parts=["compiled"]) == []
    assert "no-such-compiler" in caplog.text


def test_exported_models_are_compared_with_what_the_memory_adds_to_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def write(path: Path, extra: int) -> None:
        value = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])
        output = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])
        node = onnx.helper.make_node("Relu", ["image"], ["logits"])
        constant = onnx.helper.make_tensor("memory", onnx.TensorProto.INT8, [extra], bytes(extra), raw=True)
        graph = onnx.helper.make_graph([node], "g", [value], [output], [constant])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)

    # An export takes seconds, and has its own tests.
    monkeypatch.setattr(compiling, "export_plain", lambda model, size, path: write(path, 1))
    monkeypatch.setattr(compiling, "export_model", lambda model, path, **options: write(path, 5001))
    rows = benchmark(["test_resnet"], [32], bank_sizes=[100], parts=["onnx"], rounds=1)
    check_rows(rows, "onnx")
    assert [row.batch_size for row in rows] == [1, 1, 8, 8]
    assert rows[1].bytes_per_sample == pytest.approx(50, abs=1)


def test_imports_are_timed_in_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = importing.run("import json.decoder", before="import time")
    assert timed.process is not None
    assert 0 < timed.process <= 2 * timed.wall
    lines: list[str] = []

    def stub(timed: str, before: str = "") -> Seconds:
        lines.append(f"{before}\n{timed}")
        return Seconds(float(len(timed)), 1.0)

    monkeypatch.setattr(importing, "run", stub)
    check_rows(benchmark(parts=["import"], rounds=1), "import")
    for line in lines:
        compile(line, "timed", "exec")


def test_what_is_not_installed_is_named_once_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    subjects.missing_of.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(subjects, "find_spec", lambda name: None)
        rows = benchmark(parts=["read", "stateless"], batch_sizes=[2], bank_sizes=[50, 100], rounds=1, width=16)
    subjects.missing_of.cache_clear()
    assert [row.what for row in rows] == ["matrix product", "exact read"] * 2
    own = [record for record in caplog.records if record.levelno == logging.WARNING]
    own = [record for record in own if record.name.startswith("timm_memwrap")]
    named = [record.message.partition(": ")[2] for record in own]
    assert named == ["sklearn, pytorch_metric_learning, milvus_lite.", "faiss.", "memorywrap."]


def test_the_raw_read_of_a_bank_touches_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "bank.safetensors"
    save_file({"encodings": torch.arange(10_000.0)}, file)
    found = read_raw(file)
    with open(file, "r+b") as written:
        # Of a file that is only mapped, this would be seen.
        written.seek(-40_000, 2)
        written.write(bytes(40_000))
    assert torch.equal(found["encodings"], torch.arange(10_000.0))


def check_rows(rows: list[Row], part: str) -> None:
    """Checks that there is something beside each anchor, and that the ratios are numbers."""
    assert {row.part for row in rows} == {part}
    for row in rows:
        assert row.milliseconds > 0
        assert math.isfinite(row.ratio)
        if row.what == row.anchor:
            assert row.ratio == pytest.approx(1)
        assert any(other.anchor == row.anchor and other.what != row.anchor for other in rows)


def test_an_index_is_measured_with_what_it_finds() -> None:
    pytest.importorskip("faiss")
    rows = benchmark(parts=["read"], batch_sizes=[2], bank_sizes=[500], rounds=1, width=16, peers=["flat", "ivf"])
    found = {row.what: row for row in rows}
    assert found["faiss flat"].recall == pytest.approx(1, abs=1e-4)
    assert 0 < found["faiss ivf"].recall <= 1 + 1e-4
    assert found["exact read"].recall is None
    assert "recall 100.0%" in table(rows)


def test_a_plot_and_a_file_are_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = [
        "--parts",
        "[read]",
        "--bank_sizes",
        "[50,100]",
        "--batch-sizes",
        "[1,4]",
        "--rounds",
        "1",
        "--width",
        "8",
        "--peers",
        "[]",
    ]
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
        ({"peers": ["pq"]}, "'pq'"),
        ({"sizes": ["10000"]}, "'10000'"),
        ({"sizes": ["100x10"]}, "'100x10'"),
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
