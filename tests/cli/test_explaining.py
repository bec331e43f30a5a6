"""The commands explain, evaluate and report: what they print and write, and that an error is one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from training_images import write_noise

import timm_memwrap
from timm_memwrap import explain
from timm_memwrap.cli import main
from timm_memwrap.data import open_source
from timm_memwrap.explaining import evaluate_explanations, evaluate_unknown, memory_report, ticked
from timm_memwrap.jobs.explain import describe, find_images

CLASSES = ["ant", "bee", "cow"]
DIVISORS = {"ant": 1, "bee": 2, "cow": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model`, and images in `data/train`, of which its memory is, and in `data/test`."""
    root = tmp_path_factory.mktemp("place")
    write_noise(root / "data" / "train", DIVISORS, 4, seed=0)
    write_noise(root / "data" / "test", {name: DIVISORS[name] for name in CLASSES[1:]}, 3, seed=1)
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    torch.nn.init.normal_(backbone.get_classifier().weight)
    model = timm_memwrap.wrap(backbone).eval()
    timm_memwrap.build_memory_bank(model, open_source(root / "data", "train"), size=None, progress=False)
    timm_memwrap.save_pretrained(model, root / "model")
    return root


@pytest.fixture
def model(place: Path) -> timm_memwrap.MemoryWrapModel:
    return timm_memwrap.from_pretrained(place / "model").eval()


def test_explain_prints_a_table_and_writes_a_report(
    place: Path, model: timm_memwrap.MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [place / "data/test/bee/0.png", place / "data/test/cow/2.png"]
    out, file = tmp_path / "new" / "report.html", tmp_path / "report.json"
    args = ["explain", str(place / "model"), *map(str, files), "--top_k", "2", "--out", str(out)]
    args += ["--json", str(file), "--memory_data", str(place / "data/train")]
    assert main(args) == 0
    printed = " ".join(capsys.readouterr().out.split())
    expected = explain(model, files, top_k=2)
    for name, explanation in zip(("0.png", "2.png"), expected, strict=True):
        assert f"{name}: {explanation.class_name} ({explanation.probability:.0%})" in printed
        for sample in explanation.samples:
            assert f"{sample.weight:.1%} {sample.id} {sample.class_name}" in printed
    found = json.loads(file.read_text())
    assert found == [
        {"image": name, **explanation.to_dict()} for name, explanation in zip(("0.png", "2.png"), expected, strict=True)
    ]
    html = out.read_text(encoding="utf-8")
    # Pictures come from the memory's data: the model holds none.
    assert "no picture" not in html
    assert str(place) not in html
    assert f"Written: {out}" in printed


def test_how_likely_a_prediction_is_right_is_said_once_it_is_fitted(
    place: Path, model: timm_memwrap.MemoryWrapModel
) -> None:
    image = place / "data/test/bee/0.png"
    assert "likely right" not in describe(model, "0.png", explain(model, [image])[0])
    model.calibration.confidence[0] = 1.0
    explanation = explain(model, [image])[0]
    assert f"({explanation.probability:.0%}, 73% likely right)" in describe(model, "0.png", explanation)


@pytest.mark.parametrize("contenders", [0, 1, 2])
def test_explain_shows_as_many_contenders_as_asked_for(
    place: Path,
    model: timm_memwrap.MemoryWrapModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    contenders: int,
) -> None:
    out, image = tmp_path / "report.html", place / "data/test/bee/0.png"
    args = ["explain", str(place / "model"), str(image), "--contenders", str(contenders), "--out", str(out)]
    # Also with heatmaps, which are of explanations of their own.
    args += ["--memory_data", str(place / "data/train"), "--heatmaps", "saliency", "--progress", "false"]
    assert main(args) == 0
    printed = " ".join(capsys.readouterr().out.split())
    (expected,) = explain(model, [image], contenders=contenders)
    assert len(expected.contenders) == contenders
    assert ("may be" in printed) == (contenders > 0)
    html = out.read_text(encoding="utf-8")
    assert ('<ol class="contenders">' in html) == (contenders > 0)
    assert html.count('<div class="near">') == contenders
    for contender in expected.contenders:
        near = ", ".join(f"{sample.id} {sample.similarity:.2f}" for sample in contender.samples)
        mark = "most alike: " if contender == expected.most_alike else ""
        row = f"{contender.class_name} {contender.probability:.1%} {contender.similarity:.3f} {mark}{near}"
        assert row in printed


def test_explain_shows_heatmaps(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    args = ["explain", str(place / "model"), str(place / "data/test"), "--heatmaps", "saliency", "--out", str(out)]
    assert main([*args, "--memory_data", str(place / "data/train"), "--progress", "false"]) == 0
    assert "of the heat" in out.read_text(encoding="utf-8")
    # Files of a folder are named by their place in it.
    assert "cow/2.png: " in capsys.readouterr().out
    out.unlink()
    assert main(args) == 1
    assert "pass --memory_data and --out" in capsys.readouterr().err
    assert not out.exists()


def test_explain_shows_correspondences(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "report.html", tmp_path / "report.json"
    args = ["explain", str(place / "model"), str(place / "data/test"), "--correspondences", "2", "--out", str(out)]
    assert main(args) == 1
    assert "--memory_data" in capsys.readouterr().err
    args += ["--memory_data", str(place / "data/train"), "--json", str(file), "--heatmaps", "saliency"]
    assert main([*args, "--progress", "false"]) == 0
    html = out.read_text(encoding="utf-8")
    assert "Where they match" in html
    assert "of the heat" in html
    found = [match for image in json.loads(file.read_text()) for match in image["samples"][0]["correspondences"]]
    assert 6 <= len(found) <= 12


def test_json_alone_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(place / "data"), "--progress", "false"]
    for args in (
        ["explain", str(place / "model"), str(place / "data/test")],
        *([command, str(place / "model"), *data] for command in ("evaluate", "report")),
    ):
        assert main([*args, "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_evaluate_prints_and_writes_the_metrics_by_the_names_of_the_classes(
    place: Path, model: timm_memwrap.MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test folder has two of the three classes, so that its own numbers are not the model's."""
    file = tmp_path / "metrics.json"
    args = ["evaluate", str(place / "model"), "--data", str(place / "data"), "--split", "test"]
    assert main([*args, "--json", str(file), "--progress", "false"]) == 0
    by_hand = [(Image.open(path), CLASSES.index(path.parent.name)) for path, _ in find_images([place / "data/test"])]
    expected = evaluate_explanations(model, by_hand, progress=False)
    assert capsys.readouterr().out == f"{expected}\n\nWritten: {file}\n"
    found = json.loads(file.read_text())
    assert found["accuracy"] == expected.accuracy
    assert found["count"] == 6
    # The classes stand in the folder itself.
    assert main(["evaluate", str(place / "model"), "--data", str(place / "data/test"), "--split", ""]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_evaluate_tells_known_from_unknown_images(
    place: Path, model: timm_memwrap.MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = tmp_path / "unknown" / "stripes"
    unknown.mkdir(parents=True)
    pictures = [Image.linear_gradient("L").resize((32, 32)).rotate(30 * i).convert("RGB") for i in range(3)]
    for i, picture in enumerate(pictures):
        picture.save(unknown / f"{i}.png")
    args = ["evaluate", str(place / "model"), "--data", str(place / "data"), "--split", "test"]
    assert main([*args, "--unknown", str(unknown.parent), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_hand = [(Image.open(path), CLASSES.index(path.parent.name)) for path, _ in find_images([place / "data/test"])]
    expected = evaluate_unknown(model, by_hand, pictures, progress=False).to_dict()
    assert {name: found[name] for name in expected} == expected
    assert (found["known"], found["unknown"]) == (6, 3)
    assert main([*args, "--unknown", str(tmp_path / "none")]) != 0
    assert "There is no" in capsys.readouterr().err


def test_explain_calls_images_unfamiliar_if_asked_to(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(tmp_path / "noise.png")
    Image.effect_noise((32, 32), 250).convert("RGB").save(photo)
    assert main(["explain", str(place / "model"), photo, "--abstain", "1"]) == 0
    assert ": unfamiliar (" in capsys.readouterr().out
    assert main(["explain", str(place / "model"), photo]) == 0
    assert ": unfamiliar (" not in capsys.readouterr().out


def test_report_prints_and_draws(
    place: Path, model: timm_memwrap.MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.png"
    args = ["report", str(place / "model"), "--data", str(place / "data"), "--out", str(out)]
    assert main([*args, "--memory_data", str(place / "data/train"), "--progress", "false"]) == 0
    by_hand = [(Image.open(path), CLASSES.index(path.parent.name)) for path, _ in find_images([place / "data/test"])]
    expected = f"{memory_report(model, by_hand, progress=False)}\n\nWritten: {out}"
    assert capsys.readouterr().out.strip() == expected.strip()
    with Image.open(out) as picture:
        assert picture.format == "PNG"


def test_report_writes_a_table_and_a_page_of_the_memory_alone(
    place: Path, model: timm_memwrap.MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "report.csv", tmp_path / "report.html"]
    args = ["report", str(place / "model"), "--out", f"[{files[0]}, {files[1]}]", "--progress", "false"]
    assert main([*args, "--memory_data", str(place / "data/train")]) == 0
    expected = memory_report(model, progress=False)
    assert capsys.readouterr().out.startswith(str(expected))
    assert ticked(files[0]) == ([], {})
    assert files[0].read_text(encoding="utf-8-sig").count("\n") == 1 + len(expected.findings)
    assert 'class="absent"' not in files[1].read_text(encoding="utf-8")


def test_report_names_the_images_of_the_memory_in_the_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["report", str(place / "model"), "--data", str(place / "data"), "--split", "train", "--json", "-"]
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["leaked"] == found["count"] == 12
    leaks = {finding["id"]: finding["neighbours"] for finding in found["findings"] if finding["kind"] == "leak"}
    assert len(leaks) == 12
    assert all(sample_id in near for sample_id, near in leaks.items())


@pytest.mark.parametrize("command", ["explain", "evaluate", "report"])
def test_device_batch_size_and_workers_change_no_result(
    place: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [str(place / "data/test")] if command == "explain" else ["--data", str(place / "data")]
    args = [command, str(place / "model"), *data, "--progress", "false"]
    assert main(args) == 0
    expected = capsys.readouterr().out
    sizes = []
    encode = timm_memwrap.MemoryWrapModel.encode
    monkeypatch.setattr(
        timm_memwrap.MemoryWrapModel, "encode", lambda self, x: (sizes.append(len(x)), encode(self, x))[1]
    )
    assert main([*args, "--device", "cpu", "--batch-size", "4", "--workers", "1"]) == 0
    # A batch of another size changes the last digits of encodings, and so of numbers.
    assert _words(capsys.readouterr().out) == [
        pytest.approx(word, rel=1e-3) if isinstance(word, float) else word for word in _words(expected)
    ]
    assert sizes[:2] == [4, 2]


def _words(text: str) -> list[str | float]:
    return [float(word) if re.fullmatch(r"-?\d+\.\d+", word) else word for word in text.split()]


def test_names_do_not_steer_the_terminal(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm_memwrap.from_pretrained(place / "model").eval()
    model.memory_bank.set_class_names(["\x1b[31mred", "\x9b2J", "\u202eback"])
    timm_memwrap.save_pretrained(model, tmp_path / "hostile")
    data = tmp_path / "data"
    for name, kept in (("\x1b[31mred", "ant"), ("\x9b2J", "bee")):
        (data / name).mkdir(parents=True)
        (data / name / "\x1b.png").write_bytes((place / f"data/train/{kept}/0.png").read_bytes())
    source = str(tmp_path / "hostile")
    assert main(["explain", source, str(data)]) == 0
    assert main(["report", source, "--data", str(data), "--split", "", "--progress", "false"]) == 0
    assert main(["explain", source, str(data), "--json", "-"]) == 0
    printed = capsys.readouterr().out
    assert all(char.isprintable() for char in printed.replace("\n", ""))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain", "{0}/model", "{0}/nothing.png"], "There is no '{0}/nothing.png'"),
        (["explain", "{0}/model", "{0}/model"], "holds no images. Expected files ending in .bmp"),
        (["explain", "{0}/nothing", "{0}/data"], "is neither a directory nor a repo id"),
        (["explain", "{0}/model", "{0}/data/test", "--top_k", "0"], "top_k=0"),
        (["explain", "{0}/model", "{0}/model/config.json"], "config.json' cannot be read"),
        (["evaluate", "{0}/model"], "No data"),
        (["evaluate", "{0}/model", "--data", "{0}/data", "--device", "warp"], "device='warp' cannot be used"),
        (["explain", "{0}/model", "{0}/data", "--batch_size", "0"], "batch_size=0"),
        (["report", "{0}/model", "--data", "{0}/data", "--workers", "-1"], "workers=-1"),
        (["report", "{0}/model", "--out", "r.json"], "Unknown suffix of out='.json'. Pass one of '.csv'"),
        (["evaluate", "{0}/model", "--data", "{0}/data", "--split", "nope"], "There is no folder 'nope'"),
        (["report", "{0}/model", "--data", "{0}/others", "--split", ""], "does not know: 'elk'"),
    ],
)
def test_an_error_is_one_line(place: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "others/elk").mkdir(parents=True, exist_ok=True)
    (place / "others/elk/0.png").write_bytes((place / "data/train/ant/0.png").read_bytes())
    assert main([arg.format(place) for arg in args]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("timm-memwrap: ")
    assert message.format(place) in error[-1]


def test_a_file_whose_name_begins_as_an_option_is_a_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("--odd.png").write_bytes((place / "data/test/bee/0.png").read_bytes())
    assert main(["explain", str(place / "model"), "--top_k", "1", "--", "--odd.png"]) == 0
    assert capsys.readouterr().out.startswith("--odd.png: ")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("command", ["explain", "evaluate", "report", "wrap"])
def test_an_image_that_cannot_be_read_is_one_line_or_left_out(
    command: str,
    workers: int,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    (data / "test" / "bee" / "1.png").write_bytes((place / "data" / "test" / "bee" / "1.png").read_bytes()[:-60])
    args = {
        "explain": [str(data / "test")],
        "wrap": ["--data", str(data), "--split", "test", "--out", str(tmp_path / "out")],
    }.get(command, ["--data", str(data), "--split", "test"])
    if command == "wrap":
        # Its model has all classes.
        (data / "test" / "ant").mkdir()
        shutil.copy(data / "train" / "ant" / "0.png", data / "test" / "ant")
    args = [command, str(place / "model"), *args, "--workers", str(workers)]
    assert main(args) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert "1.png" in error[-1]
    assert "cannot be read" in error[-1]
    assert "Traceback" not in "".join(error)
    caplog.clear()
    assert main([*args, "--unreadable", "skip"]) == 0
    assert "1.png" in caplog.text
