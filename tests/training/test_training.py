import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from training_images import write_images

import timm_memwrap
from timm_memwrap.explaining import evaluate_explanations
from timm_memwrap.training import training as module
from timm_memwrap.training.configuration import DataConfig, MemoryConfig, ModelConfig, Recipe, TrainingConfig
from timm_memwrap.training.creation import image_config
from timm_memwrap.training.evaluation import evaluate
from timm_memwrap.training.loaders import eval_loader
from timm_memwrap.training.processes import Processes
from timm_memwrap.training.recipes import load_recipe, write_recipe
from timm_memwrap.training.training import check_recipe, open_data, train

Make = Callable[..., Recipe]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _assert_same_bits(first: Path, second: Path) -> None:
    a, b = _weights(first), _weights(second)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def _command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "timm_memwrap.cli", "train", f"--config={recipe}", f"--out={out}", *more]


def _env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize("frozen", [False, True], ids=["whole", "frozen"])
@pytest.mark.parametrize("mode", ["none", "batch", "sample", "queue"])
def test_every_mode_leaves_the_same_files(tmp_path: Path, digits: Make, mode: str, frozen: bool) -> None:
    recipe = digits(memory={"mode": mode}, training={"freeze_backbone": frozen})
    report = train(recipe, tmp_path / "out", progress=False)
    expected = {"model.safetensors", "config.json", "README.md", "recipe.yaml", "metrics.csv", "summary.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected | {"curves.png", "checkpoints"}

    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert len(model.memory_bank) == 40
    assert model.memory_bank.class_names == list("0123456789")
    assert not model.memory_is_stale()
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(model(images), report.model.eval()(images))

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy"] == report.accuracy
    assert (summary["plain_accuracy"] is None) == (mode != "none")
    assert summary["memory_mode"] == mode
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["val_accuracy"]) == pytest.approx(report.history[-1]["val_accuracy"])
    assert f"{report.accuracy}" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_accuracy_on_the_card_is_what_the_saved_model_has(tmp_path: Path, digits: Make) -> None:
    recipe = digits()
    report = train(recipe, tmp_path / "out", progress=False)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    _, held_out = open_data(recipe, progress=False)
    assert evaluate_explanations(model, held_out, progress=False).accuracy == pytest.approx(report.accuracy)


@pytest.mark.parametrize(
    ("sections", "fitted"),
    [
        ({}, True),
        ({"memory": {"calibrate": False}}, False),
        ({"model": {"temperature": 1.0}}, False),
        ({"memory": {"mode": "batch"}}, False),
        ({"memory": {"mode": "batch", "calibrate": True}}, True),
    ],
    ids=str,
)
def test_a_classifier_that_is_read_through_gets_its_temperature(
    tmp_path: Path, digits: Make, sections: dict, fitted: bool
) -> None:
    recipe = digits(**sections)
    report = train(recipe, tmp_path / "out", progress=False)
    assert (report.model.temperature != 1.0) == fitted
    _, held_out = open_data(recipe, progress=False)
    loader = eval_loader(held_out, recipe.data, image_config(report.model))
    before = report.model.temperature
    best = timm_memwrap.calibrate(report.model, loader, progress=False)
    assert (before == pytest.approx(best, rel=1e-4)) == fitted


def test_a_temperature_that_would_be_replaced_is_refused(digits: Make) -> None:
    with pytest.raises(ValueError, match=re.escape("model.temperature=2.0")):
        check_recipe(digits(model={"temperature": 2.0}, memory={"calibrate": True}))


def test_channels_last_is_a_layout_and_changes_no_result(tmp_path: Path, digits: Make) -> None:
    reports = [
        train(digits(training={"channels_last": last}), tmp_path / str(last), progress=False) for last in (False, True)
    ]
    convolutions = [
        next(m for m in r.model.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 1) for r in reports
    ]
    layouts = [conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions]
    assert layouts == [False, True]
    first, second = (r.history[-1]["train_loss"] for r in reports)
    assert second == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("frozen", [False, True], ids=["whole", "frozen"])
@pytest.mark.parametrize("selection", ["balanced", "kmeans", "random"])
def test_evaluation_in_training_reads_a_bank_of_these_weights(
    tmp_path: Path, digits: Make, selection: str, frozen: bool
) -> None:
    memory = {"mode": "batch", "selection": selection, "size": 20}
    recipe = digits(memory=memory, model={"memory_only": True, "scale": 10.0}, training={"freeze_backbone": frozen})
    report = train(recipe, tmp_path / "out", progress=False)
    # The last epoch was evaluated with the weights and the bank that are saved.
    assert report.history[-1]["val_accuracy"] == pytest.approx(report.accuracy)
    _, held_out = open_data(recipe, progress=False)
    loader = eval_loader(held_out, recipe.data, image_config(report.model))
    found = evaluate(report.model, loader, Processes(torch.device("cpu")))
    assert report.history[-1]["val_loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path, digits: Make) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(digits(training={"seed": seed, "epochs": 1}), tmp_path / name, progress=False)
    _assert_same_bits(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        _assert_same_bits(tmp_path / "a", tmp_path / "c")


class _Stop(Exception):
    """Stands for what ends a process in the middle of an epoch."""


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"memory": {"mode": "queue"}},
        {"memory": {"mode": "sample"}, "data": {"workers": 2}},
        {"training": {"model_ema": True, "model_ema_decay": 0.9, "keep": "best"}, "data": {"mixup": 0.2}},
        {"training": {"freeze_backbone": True, "opt": "momentum", "lr": 0.1}},
        {"training": {"grad_accum_steps": 2, "clip_grad": 1.0, "opt": "lamb"}, "memory": {"mode": "batch"}},
    ],
    ids=["plain", "queue", "sample", "ema", "frozen", "accumulated"],
)
def test_a_resumed_training_is_one_without_interruption_bit_for_bit(
    tmp_path: Path, digits: Make, sections: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = digits(**{**sections, "training": {**sections.get("training", {}), "epochs": 3}})
    whole = train(recipe, tmp_path / "whole", progress=False)

    epochs = []

    def stop(rows: list) -> None:
        epochs.append(len(rows))
        if len(rows) == 2:
            # Its checkpoint is not written yet, so epoch 2 is lost.
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_metrics", lambda rows, out: stop(rows))
        with pytest.raises(_Stop):
            train(recipe, tmp_path / "cut", progress=False)
    resumed = train(recipe, tmp_path / "cut", resume=True, progress=False)
    assert epochs == [1, 2]
    _assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    timeless = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]
                for rows in (whole.history, resumed.history)]  # fmt: skip
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_process_that_is_stopped_leaves_what_resumes(tmp_path: Path, digits: Make, how: signal.Signals) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    write_recipe(digits(training={"epochs": 40}), recipe)
    process = subprocess.Popen(_command(recipe, out), env=_env(), stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if how != signal.SIGKILL else -9)
    if how != signal.SIGKILL:
        assert "--resume" in errors
        assert "Traceback" not in errors
    assert not (out / "model.safetensors").exists()
    done = subprocess.run(_command(recipe, out, "--resume"), env=_env(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Going on after epoch" in done.stderr
    assert len(list(csv.DictReader(metrics.open()))) == 40


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path: Path, digits: Make) -> None:
    write_recipe(digits(), tmp_path / "recipe.yaml")
    # No file may grow beyond this once the first checkpoint is there: writing fails in the middle, as on a full disk.
    code = f"""
import resource, signal, sys
from timm_memwrap.cli import main
from timm_memwrap.training import training
write = training.write_metrics
def full(rows, out):
    if len(rows) == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return write(rows, out)
training.write_metrics = full
sys.exit(main(["train", "--config", {str(tmp_path / "recipe.yaml")!r}, "--out", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=_env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Free some space on the disk" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {
        "checkpoint-0.safetensors",
        "last.safetensors",
        "model_best.safetensors",
    }
    report = train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out", resume=True, progress=False)
    assert len(report.history) == 2


def test_resuming_before_the_first_epoch_and_after_the_last_works(tmp_path: Path, digits: Make) -> None:
    recipe = digits(training={"epochs": 1})
    first = train(recipe, tmp_path / "out", resume=True, progress=False)
    before = _weights(tmp_path / "out")
    again = train(recipe, tmp_path / "out", resume=True, progress=False)
    assert again.accuracy == first.accuracy
    assert all(torch.equal(tensor, before[name]) for name, tensor in _weights(tmp_path / "out").items())


def test_a_training_is_not_overwritten_unasked(tmp_path: Path, digits: Make) -> None:
    train(digits(training={"epochs": 1}), tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="holds a training already"):
        train(digits(training={"epochs": 1}), tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"training\.epochs=1, now it is 2"):
        train(digits(training={"epochs": 2}), tmp_path / "out", resume=True, progress=False)
    report = train(digits(training={"epochs": 2}), tmp_path / "out", overwrite=True, progress=False)
    assert len(report.history) == 2


def test_what_does_not_change_the_result_may_change_on_resumption(tmp_path: Path, digits: Make) -> None:
    train(digits(training={"epochs": 1}), tmp_path / "out", progress=False)
    recipe = digits(training={"epochs": 1}, data={"workers": 1}, hub={"license": "mit"})
    train(recipe, tmp_path / "out", resume=True, progress=False)
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_the_best_epoch_is_kept_on_request(tmp_path: Path, digits: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.9, 0.1, 0.5])
    monkeypatch.setattr(module._Run, "_validate", lambda self, model: {"loss": 1.0, "accuracy": next(accuracies)})
    train(digits(training={"epochs": 3, "keep": "best"}), tmp_path / "out", progress=False)
    best = load_file(tmp_path / "out" / "checkpoints" / "model_best.safetensors")
    last = load_file(tmp_path / "out" / "checkpoints" / "last.safetensors")
    first = _first_weight(tmp_path / "out")
    saved = _weights(tmp_path / "out")[first]
    name = "/state_dict/" + first.removeprefix("backbone.")
    assert torch.equal(saved, best[name])
    assert not torch.equal(saved, last[name])


def _first_weight(folder: Path) -> str:
    return next(name for name, tensor in _weights(folder).items() if name.startswith("backbone.") and tensor.ndim == 4)


def test_the_average_is_what_is_evaluated_and_saved(tmp_path: Path, digits: Make) -> None:
    recipe = digits(training={"model_ema": True, "model_ema_decay": 0.5})
    train(recipe, tmp_path / "out", progress=False)
    state = load_file(tmp_path / "out" / "checkpoints" / "last.safetensors")
    name = _first_weight(tmp_path / "out")
    saved = _weights(tmp_path / "out")[name]
    plain = name.removeprefix("backbone.")
    assert torch.equal(saved, state[f"/state_dict_ema/{plain}"])
    assert not torch.equal(saved, state[f"/state_dict/{plain}"])


@pytest.mark.parametrize("mode", ["none", "batch"])
def test_mixed_precision_trains(tmp_path: Path, digits: Make, mode: str) -> None:
    report = train(digits(training={"amp": True}, memory={"mode": mode}), tmp_path / "out", progress=False)
    assert report.history[-1]["train_loss"] < report.history[0]["train_loss"]
    assert {tensor.dtype for name, tensor in _weights(tmp_path / "out").items() if name.startswith("backbone.")} <= {
        torch.float32,
        torch.int64,
    }


def test_a_compiled_training_is_saved_like_any(tmp_path: Path, digits: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # The backend that compiles nothing: what is tested is the wrapping, not the compiler.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compile_(model, backend="eager"))
    for mode in ("none", "batch"):
        recipe = digits(training={"torchcompile": True, "epochs": 1}, memory={"mode": mode})
        train(recipe, tmp_path / mode, progress=False)
        assert not [name for name in _weights(tmp_path / mode) if "_orig_mod" in name]


def test_the_papers_evaluation_is_repeated_as_often_as_asked(tmp_path: Path, digits: Make) -> None:
    recipe = digits(memory={"mode": "sample", "train_size": 20, "sampled_evaluations": 3})
    report = train(recipe, tmp_path / "out", progress=False)
    assert len(report.sampled_accuracies) == 3
    assert all(0 <= accuracy <= 1 for accuracy in report.sampled_accuracies)


def test_an_image_folder_trains_and_a_share_can_be_held_out(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", 20)
    recipe = Recipe(
        ModelConfig(name="test_resnet"),
        DataConfig(
            data_dir=str(folder),
            train_split="",
            val_split=None,
            val_fraction=0.25,
            img_size=32,
            batch_size=15,
            workers=0,
            color_jitter=0.0,
        ),
        TrainingConfig(epochs=8, lr=5e-3),
        MemoryConfig(size=None, selection="all"),
    )
    report = train(recipe, tmp_path / "out", progress=False)
    assert report.accuracy > 0.9
    assert len(report.model.memory_bank) == 45
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["train_images"], summary["val_images"]) == (45, 15)


def test_two_processes_give_the_bank_and_the_accuracy_of_one(tmp_path: Path, digits: Make) -> None:
    """Two processes of half the batch each make the steps of one."""
    common = {"training": {"freeze_backbone": True, "epochs": 6, "lr": 0.05, "opt": "momentum", "device": "cpu"}}
    recipes = {}
    for name, batch_size in (("one", 50), ("two", 25)):
        recipes[name] = digits(**common, data={"batch_size": batch_size})
        write_recipe(recipes[name], tmp_path / f"{name}.yaml")
    one = train(recipes["one"], tmp_path / "one", progress=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*torchrun, *_command(tmp_path / "two.yaml", tmp_path / "two")[2:]]
    done = subprocess.run(command, env=_env(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in") == 1

    a, b = (timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True) for name in ("one", "two"))
    assert a.memory_bank.ids == b.memory_bank.ids
    assert torch.equal(a.memory_bank.labels, b.memory_bank.labels)
    accuracy = json.loads((tmp_path / "two" / "summary.json").read_text())["accuracy"]
    assert accuracy == pytest.approx(one.accuracy, abs=0.1)
    # The same weights give the same bank, whoever encodes what.
    images, _ = open_data(recipes["one"], progress=False)
    fresh = timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True)
    from timm.data import create_transform, resolve_model_data_config

    import timm_memwrap

    data = images.with_transform(create_transform(**resolve_model_data_config(fresh)))
    bank = timm_memwrap.build_memory_bank(fresh, data, size=40, progress=False)
    assert bank.ids == b.memory_bank.ids
    torch.testing.assert_close(bank.encodings, b.memory_bank.encodings)


@pytest.mark.parametrize("mode", ["batch", "queue"])
def test_two_processes_train_all_weights_alike(tmp_path: Path, digits: Make, mode: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    write_recipe(digits(data={"batch_size": 25}, memory={"mode": mode}, training={"device": "cpu"}), recipe)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*torchrun, *_command(recipe, tmp_path / "out")[2:]]
    done = subprocess.run(command, env=_env(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert not model.memory_is_stale()
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert float(rows[-1]["val_accuracy"]) == pytest.approx(
        json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "resnet19"}}, r"resnet19"),
        ({"model": {"name": "memwrap_resnet18"}}, r"Name the backbone, 'resnet18'"),
        ({"model": {"pretrained_path": "w.pth"}}, r"w\.pth.*safetensors"),
        ({"model": {"in_chans": 5}}, r"in_chans=5"),
        ({"model": {"read_head": "linear"}}, r"read_head='linear' needs training"),
        ({"model": {"classifier": "vote"}, "memory": {"mode": "batch"}}, r"'vote' has no layer to train"),
        ({"model": {"classifier": "mlp"}}, r"classifier='mlp'"),
        ({"training": {"epochs": 0}}, r"training\.epochs=0"),
        ({"memory": {"size": 0}}, r"memory\.size=0"),
        ({"data": {"mixup": 0.1}, "training": {"freeze_backbone": True}}, r"Mixup cannot mix"),
        ({"hub": {"push": "no repo id"}}, r"no repo id"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused_before_data_is_read(
    digits: Make, sections: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(digits(**sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"memory": {"size": 201}}, r"memory\.size=201.*200 training images"),
        ({"data": {"batch_size": 300}}, r"batch_size=300"),
        ({"memory": {"mode": "sample", "train_size": 180}}, r"train_size=180"),
        ({"training": {"device": "warp"}}, r"training\.device='warp'"),
        ({"training": {"lr": 1e30, "opt": "sgd"}}, r"loss is .* in epoch"),
        ({"model": {"kwargs": {"nonsense": 1}}}, r"nonsense"),
        ({"data": {"mean": [0.1, 0.2]}}, r"data\.mean.*2 values for 1 channels"),
    ],
)
def test_what_does_not_fit_the_data_is_one_clear_line(
    tmp_path: Path, digits: Make, sections: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(digits(**sections), tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 4, ("cat",))
    recipe = Recipe(ModelConfig("test_resnet"), DataConfig(data_dir=str(tmp_path), val_split=None, workers=0))
    with pytest.raises(ValueError, match="one class only, 'cat'"):
        train(recipe, tmp_path / "out", progress=False)


@pytest.mark.parametrize("unreadable", ["fail", "skip"])
def test_an_unreadable_image_stops_or_is_left_out_with_a_count(
    tmp_path: Path, folder: Path, unreadable: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "train" / "dog" / "001.png").write_bytes(b"no image")
    data = DataConfig(data_dir=str(folder), img_size=32, batch_size=5, workers=0, unreadable=unreadable)
    recipe = Recipe(ModelConfig("test_resnet"), data, TrainingConfig(epochs=1), MemoryConfig(size=10))
    if unreadable == "fail":
        with pytest.raises(ValueError, match=r"dog/001\.png"):
            train(recipe, tmp_path / "out", progress=False)
    else:
        report = train(recipe, tmp_path / "out", progress=False)
        assert "1 of 36 images" in caplog.text
        assert report.model.memory_bank.provenance.population == 35


@pytest.mark.parametrize("other", ["architecture", "classes"])
@pytest.mark.parametrize("mode", ["none", "batch"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, digits: Make, other: str, mode: str) -> None:
    from safetensors.torch import save_file

    if other == "classes":
        save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    else:
        save_file({"nothing.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="do not fit"):
        train(
            digits(model={"pretrained_path": str(tmp_path / "w.safetensors")}, memory={"mode": mode}),
            tmp_path / "out",
            progress=False,
        )


def test_pretrained_weights_come_from_a_file_and_a_new_classifier_starts_from_zero(
    tmp_path: Path, digits: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    source = timm.create_model("test_resnet")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    recipe = digits(model={"pretrained_path": str(tmp_path / "w.safetensors"), "in_chans": 3})
    recipe.data.mean = recipe.data.std = None
    model = module.create_model(recipe.model, recipe.data, "none", 10, 3)
    assert not model.get_classifier().weight.any()
    a, b = source.state_dict(), model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a if not name.startswith("fc"))
    recipe.model.head_init_scale = 1.0
    assert module.create_model(recipe.model, recipe.data, "none", 10, 3).get_classifier().weight.any()


def test_events_are_written_for_tensorboard(tmp_path: Path, digits: Make) -> None:
    pytest.importorskip("tensorboard")
    train(digits(training={"epochs": 1, "tensorboard": True}), tmp_path / "out", progress=False)
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))


def test_the_recipe_that_is_left_trains_the_same(tmp_path: Path, digits: Make) -> None:
    train(digits(training={"epochs": 1}), tmp_path / "a", progress=False)
    train(load_recipe(tmp_path / "a" / "recipe.yaml"), tmp_path / "b", progress=False)
    _assert_same_bits(tmp_path / "a", tmp_path / "b")
