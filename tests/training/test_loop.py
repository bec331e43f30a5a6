import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_memwrap.training.checkpoint import Checkpoints
from timm_memwrap.training.configuration import DataConfig, MemoryConfig, Recipe, TrainingConfig
from timm_memwrap.training.evaluation import evaluate, sampled_accuracy
from timm_memwrap.training.loaders import train_loader
from timm_memwrap.training.loop import fit
from timm_memwrap.training.processes import Processes
from timm_memwrap.training.task import MemoryWrapTask

CPU = Processes(torch.device("cpu"))


def _separable(count: int = 64) -> TensorDataset:
    labels = torch.arange(count) % 2
    return TensorDataset(torch.randn(count, 3, 32, 32) * 0.1 + labels.view(-1, 1, 1, 1), labels)


def _loader(data: TensorDataset, batch_size: int = 16, mode: str = "none", shuffle: bool = True) -> DataLoader:
    loader = train_loader(data, DataConfig(batch_size=batch_size), MemoryConfig(mode, 8))
    if not shuffle:
        loader = DataLoader(loader.dataset, batch_size, drop_last=True, collate_fn=loader.collate_fn)
    return loader


def _validate(model: nn.Module) -> dict[str, float]:
    return {"loss": 1.0, "accuracy": 0.5}


def _task(model: nn.Module) -> ClassificationTask:
    kind = MemoryWrapTask if hasattr(model, "memory_bank") else ClassificationTask
    return kind(model, verbose=False)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("test_resnet", "none"),
        ("memwrap_test_resnet", "batch"),
        ("memwrap_test_resnet", "sample"),
        ("memwrap_test_resnet", "queue"),
        ("memwrap_baseline_test_resnet", "queue"),
    ],
)
def test_training_learns_what_can_be_learnt(name: str, mode: str) -> None:
    data = _separable()
    model = timm.create_model(name, num_classes=2)
    config = TrainingConfig(epochs=6, lr=3e-3)
    history = fit(_task(model), _loader(data, mode=mode), config, CPU, _validate, progress=False)
    assert history[-1]["train_accuracy"] > 0.95
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 3
    if mode == "none":
        assert evaluate(model, DataLoader(data, 16), CPU)["accuracy"] > 0.95
    else:
        memory = [(image, label) for image, label in data]
        assert sampled_accuracy(model, DataLoader(data, 16), memory, 10, 2)[0] > 0.95


def test_a_loss_that_is_not_finite_stops_and_says_where() -> None:
    data = TensorDataset(torch.full((4, 3, 32, 32), float("nan")), torch.tensor([0, 1, 0, 1]))
    model = timm.create_model("test_resnet", num_classes=2)
    with pytest.raises(ValueError, match=r"loss is nan in epoch 1, batch 1 of 2"):
        fit(_task(model), _loader(data, 2), TrainingConfig(epochs=1), CPU, _validate, progress=False)


def test_accumulated_gradients_are_those_of_the_larger_batch() -> None:
    data = TensorDataset(torch.randn(24, 5), torch.arange(24) % 3)
    model = nn.Linear(5, 3)
    models = [copy.deepcopy(model), copy.deepcopy(model)]
    for part, (batch_size, every) in zip(models, [(8, 1), (4, 2)], strict=True):
        config = TrainingConfig(
            epochs=2, opt="sgd", lr=0.1, sched="constant", warmup_epochs=0, grad_accum_steps=every, clip_grad=0.5
        )
        fit(_task(part), _loader(data, batch_size, shuffle=False), config, CPU, _validate, progress=False)
    torch.testing.assert_close(models[0].weight, models[1].weight)
    assert not torch.equal(models[0].weight, model.weight)


def test_the_last_step_of_an_epoch_takes_the_batches_that_are_left() -> None:
    data = TensorDataset(torch.randn(12, 5), torch.arange(12) % 3)
    model = nn.Linear(5, 3)
    expected = copy.deepcopy(model)
    config = TrainingConfig(
        epochs=1, opt="momentum", lr=0.1, momentum=0.0, weight_decay=0.0, sched="none", grad_accum_steps=2
    )
    fit(_task(model), _loader(data, 4, shuffle=False), config, CPU, _validate, progress=False)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for part in (slice(0, 8), slice(8, 12)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(data.tensors[0][part]), data.tensors[1][part]).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, expected.weight)


@pytest.mark.parametrize(
    ("sched", "expected"),
    [
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ("multistep", lambda t: 0.1 ** ((t >= 0.5) + (t >= 0.75))),
        ("constant", lambda t: 1.0),
    ],
)
def test_the_learning_rate_follows_the_schedule(sched: str, expected) -> None:
    data = TensorDataset(torch.randn(8, 5), torch.arange(8) % 2)
    config = TrainingConfig(epochs=8, lr=0.1, opt="sgd", sched=sched, warmup_epochs=0, decay_milestones=[4, 6])
    history = fit(_task(nn.Linear(5, 2)), _loader(data, 4), config, CPU, _validate, progress=False)
    for row in history:
        assert row["lr"] == pytest.approx(0.1 * expected(row["epoch"] / 8), abs=1e-9)


def test_unknown_schedules_are_refused() -> None:
    data = TensorDataset(torch.randn(8, 5), torch.arange(8) % 2)
    task, config = _task(nn.Linear(5, 2)), TrainingConfig(sched="plateau")
    with pytest.raises(ValueError, match="plateau"):
        fit(task, _loader(data, 4), config, CPU, _validate, progress=False)


def test_evaluation_is_by_interval_and_always_at_the_end() -> None:
    data = TensorDataset(torch.randn(8, 5), torch.arange(8) % 2)
    config = TrainingConfig(epochs=5, val_interval=2)
    history = fit(_task(nn.Linear(5, 2)), _loader(data, 4), config, CPU, _validate, progress=False)
    assert [row["epoch"] for row in history if "val_accuracy" in row] == [2, 4, 5]


def test_layers_nearer_the_input_learn_slower_with_layer_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: (seen.append(self.param_groups), step(self, *a))[1])
    data = TensorDataset(torch.randn(4, 3, 160, 160), torch.arange(4) % 2)
    model = timm.create_model("memwrap_test_vit", num_classes=2)
    config = TrainingConfig(epochs=1, opt="sgd", layer_decay=0.5, sched="constant", warmup_epochs=0)
    fit(_task(model), _loader(data, 4, "batch"), config, CPU, _validate, progress=False)
    lr = {id(p): group["lr"] for group in seen[0] for p in group["params"]}
    assert lr[id(model.backbone.patch_embed.proj.weight)] < lr[id(model.backbone.blocks[0].attn.qkv.weight)]
    assert lr[id(model.head.classifier.fc1.weight)] == max(lr.values())


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(8, 5), torch.arange(8) % 2)
    recipe = Recipe(data=DataConfig(scale=(0.5, 1.0)), training=TrainingConfig(lr=0.1))
    other = Recipe(data=DataConfig(scale=(0.5, 1.0)), training=TrainingConfig(lr=0.2))
    checkpoints = Checkpoints(tmp_path / "c", recipe, resume=False)
    fit(
        _task(nn.Linear(5, 2)),
        _loader(data, 4),
        TrainingConfig(epochs=1),
        CPU,
        _validate,
        checkpoints=checkpoints,
        progress=False,
    )
    assert Checkpoints(tmp_path / "c", recipe, resume=True).state["epoch"] == 0
    with pytest.raises(ValueError, match=r"training\.lr=0\.1, now it is 0\.2"):
        Checkpoints(tmp_path / "c", other, resume=True)
    with pytest.raises(ValueError, match="already holds a training"):
        Checkpoints(tmp_path / "c", recipe, resume=False)
    assert Checkpoints(tmp_path / "c", recipe, resume=False, overwrite=True).state is None


def test_accuracy_counts_right_answers() -> None:
    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1.0]).expand(len(images), 2)

    data = TensorDataset(torch.zeros(8, 3, 4, 4), torch.tensor([0, 1, 1, 1, 0, 1, 0, 1]))
    model = Always().train()
    assert evaluate(model, DataLoader(data, 3), CPU)["accuracy"] == 5 / 8
    assert model.training
