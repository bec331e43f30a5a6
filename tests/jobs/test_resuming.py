import csv
import json
import os
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

import timm_memwrap
from timm_memwrap.jobs.train import train
from timm_memwrap.training import fitting as module
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.fitting import open_data
from timm_memwrap.training.recipes import load_recipe, write_recipe

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
    recipe, out, ready = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "ready"
    write_recipe(digits(training={"epochs": 4}), recipe)
    # It waits for the signal in the middle of the training, whatever the speed of the machine.
    code = f"""
import pathlib, signal, sys, time
from timm_memwrap.cli import main
from timm_memwrap.training import fitting
# A shell that starts the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
write = fitting.write_metrics
def wait(rows, out):
    write(rows, out)
    if len(rows) == 2:
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(600)
fitting.write_metrics = wait
sys.exit(main(["train", "--config", {str(recipe)!r}, "--out", {str(out)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=_env(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ready.exists():
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
    assert "Resuming after epoch 1 of 4" in done.stderr
    assert len(list(csv.DictReader((out / "metrics.csv").open()))) == 4


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path: Path, digits: Make) -> None:
    write_recipe(digits(), tmp_path / "recipe.yaml")
    # No file may grow beyond this once the first checkpoint is there: writing fails in the middle, as on a full disk.
    code = f"""
import resource, signal, sys
from timm_memwrap.cli import main
from timm_memwrap.training import fitting
write = fitting.write_metrics
def full(rows, out):
    if len(rows) == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return write(rows, out)
fitting.write_metrics = full
sys.exit(main(["train", "--config", {str(tmp_path / "recipe.yaml")!r}, "--out", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=_env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "free some space" in done.stderr.splitlines()[-1]
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
    with pytest.raises(ValueError, match="already holds a training"):
        train(digits(training={"epochs": 1}), tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"training\.opt='adamw', now it is 'sgd'"):
        train(digits(training={"epochs": 1, "opt": "sgd"}), tmp_path / "out", resume=True, progress=False)
    report = train(digits(training={"epochs": 2}), tmp_path / "out", overwrite=True, progress=False)
    assert len(report.history) == 2


def test_a_finished_training_goes_on_with_more_epochs(tmp_path: Path, digits: Make) -> None:
    first = train(digits(training={"epochs": 2}), tmp_path / "out", progress=False)
    longer = train(digits(training={"epochs": 4}), tmp_path / "out", resume=True, progress=False)
    assert longer.history[:2] == first.history
    assert [row["epoch"] for row in longer.history] == [1, 2, 3, 4]
    # The schedule is that of four epochs from there on, which ends at 0 once more.
    assert longer.history[2]["lr"] > longer.history[3]["lr"] == 0.0
    assert load_recipe(tmp_path / "out" / "recipe.yaml").training.epochs == 4
    with pytest.raises(ValueError, match=r"has 4 epochs already, more than training\.epochs=3"):
        train(digits(training={"epochs": 3}), tmp_path / "out", resume=True, progress=False)


def test_what_does_not_change_the_result_may_change_on_resumption(tmp_path: Path, digits: Make) -> None:
    train(digits(training={"epochs": 1}), tmp_path / "out", progress=False)
    recipe = digits(training={"epochs": 1}, data={"workers": 1}, hub={"license": "mit"})
    train(recipe, tmp_path / "out", resume=True, progress=False)
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_the_recipe_that_is_left_trains_the_same(tmp_path: Path, digits: Make) -> None:
    train(digits(training={"epochs": 1}), tmp_path / "a", progress=False)
    train(load_recipe(tmp_path / "a" / "recipe.yaml"), tmp_path / "b", progress=False)
    _assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path, digits: Make) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(digits(training={"seed": seed, "epochs": 1}), tmp_path / name, progress=False)
    _assert_same_bits(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        _assert_same_bits(tmp_path / "a", tmp_path / "c")


def test_two_processes_give_the_bank_and_the_accuracy_of_one(tmp_path: Path, digits: Make) -> None:
    """Two processes of half the batch each make the steps of one."""
    common = {"training": {"freeze_backbone": True, "epochs": 6, "lr": 0.05, "opt": "momentum", "device": "cpu"}}
    recipes = {}
    for name, batch_size in (("one", 50), ("two", 25)):
        # By labels alone: herding compares encodings, whose last digits depend on the batch.
        recipes[name] = digits(**common, data={"batch_size": batch_size}, memory={"selection": "balanced"})
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

    data = images.with_transform(create_transform(**resolve_model_data_config(fresh)))
    bank = timm_memwrap.build_memory_bank(fresh, data, size=40, selection="balanced", progress=False)
    assert bank.ids == b.memory_bank.ids
    torch.testing.assert_close(bank.encodings, b.memory_bank.encodings)


@pytest.mark.parametrize("mode", ["batch", "queue"])
def test_two_processes_train_all_weights_alike(tmp_path: Path, digits: Make, mode: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    memory = {"mode": mode, "selection": "balanced"}
    write_recipe(digits(data={"batch_size": 25}, memory=memory, training={"device": "cpu"}), recipe)
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
