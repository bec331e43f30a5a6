"""transformers, accelerate and distributed checkpoints load the memory too, and none predicts without it in silence."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hub_models import make_model
from hub_server import Hub
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import MemoryWrapModel, build_memory_bank

transformers = pytest.importorskip("transformers")
AutoModel = transformers.AutoModelForImageClassification


@pytest.fixture
def folder(model: MemoryWrapModel, tmp_path: Path) -> Path:
    timm_memwrap.calibrate(model, [(torch.randn(3, 64, 64), i % 3) for i in range(12)], progress=False)
    return timm_memwrap.save_pretrained(model, tmp_path / "pets")


def logits_of(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(images)
    return found if isinstance(found, Tensor) else found.logits


def same_state(one: MemoryWrapModel, other: MemoryWrapModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("from_hub", [False, True], ids=["folder", "hub"])
def test_transformers_loads_weights_and_memory(
    folder: Path, images: Tensor, hub: Hub, token: str, from_hub: bool
) -> None:
    source = str(folder)
    if from_hub:
        source = timm_memwrap.push_to_hub(timm_memwrap.from_pretrained(folder), "me/pets").repo_url.repo_id
    ours, theirs = timm_memwrap.from_pretrained(source), AutoModel.from_pretrained(source)
    assert torch.equal(logits_of(theirs, images), logits_of(ours, images))
    assert same_state(theirs.timm_model, ours)
    assert theirs.config.id2label[1] == "dog"
    explanations = timm_memwrap.explain(theirs.timm_model, images)
    assert [e.samples for e in explanations] == [e.samples for e in timm_memwrap.explain(ours, images)]


def _several_classes() -> MemoryWrapModel:
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3), read_head="joint_equal")
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    build_memory_bank(model, TensorDataset(torch.randn(4, 3, 64, 64), labels), size=None, progress=False)
    return model


def _half() -> MemoryWrapModel:
    model = make_model()
    model.memory_bank.store_as(torch.float16)
    return model


def _head(name: str, **kwargs: Any) -> MemoryWrapModel:
    model = timm.create_model(name, num_classes=3, **kwargs)
    data = TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6) % 3)
    build_memory_bank(model, data, size=None, progress=False)
    return model


@pytest.mark.parametrize(
    "make",
    [
        _several_classes,
        _half,
        partial(_head, "memwrap_test_vit", img_size=64),
        partial(_head, "memwrap_baseline_test_resnet", classifier="vote"),
    ],
    ids=["several classes", "half precision", "a head that is trained", "a vote"],
)
def test_every_kind_of_memory_is_loaded(make: Callable[[], MemoryWrapModel], images: Tensor, tmp_path: Path) -> None:
    folder = make().save_pretrained(tmp_path / "model")
    ours, theirs = timm_memwrap.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert torch.equal(logits_of(theirs, images), logits_of(ours, images))
    assert same_state(theirs.timm_model, ours)


def test_what_transformers_saves_is_loaded_by_timm_and_by_transformers(
    folder: Path, images: Tensor, tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    expected = logits_of(model, images)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    assert torch.equal(logits_of(loaded, images), expected)
    assert same_state(loaded, model.timm_model)
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "again"), images), expected)


@pytest.mark.parametrize("change", ["forget", "remember", "rebuild", "clear"])
def test_a_memory_that_changed_is_saved_and_loaded_by_transformers(
    folder: Path, images: Tensor, tmp_path: Path, change: str
) -> None:
    model = AutoModel.from_pretrained(folder)
    inner = model.timm_model
    if change == "forget":
        inner.forget(inner.memory_bank.ids[:3])
    elif change == "remember":
        inner.remember(images, [0, 1, 2, 0], ids=["a", "b", "c", "d"])
    elif change == "rebuild":
        build_memory_bank(inner, [(image, i % 3) for i, image in enumerate(images)], size=None, progress=False)
    else:
        inner.memory_bank.clear()
    model.save_pretrained(tmp_path / "again")
    loaded = AutoModel.from_pretrained(tmp_path / "again")
    assert same_state(loaded.timm_model, inner)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))


@pytest.mark.parametrize("from_hub", [False, True], ids=["folder", "hub"])
def test_the_pipeline_classifies_as_the_model(folder: Path, hub: Hub, token: str, from_hub: bool) -> None:
    source = str(folder)
    if from_hub:
        source = timm_memwrap.push_to_hub(timm_memwrap.from_pretrained(folder), "me/pets").repo_url.repo_id
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    pipe = transformers.pipeline("image-classification", model=source, top_k=3)
    found = {item["label"]: item["score"] for item in pipe(picture)}
    model = timm_memwrap.from_pretrained(source)
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    logits = logits_of(model, processor(picture, return_tensors="pt")["pixel_values"])
    expected = dict(zip(model.memory_bank.class_names, logits.softmax(-1)[0].tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rebuilds", [True, False])
def test_the_trainer_fine_tunes_and_what_it_saves_has_a_new_memory(
    folder: Path, tmp_path: Path, rebuilds: bool
) -> None:
    pytest.importorskip("accelerate")
    model = AutoModel.from_pretrained(folder)
    pictures = torch.randn(16, 3, 64, 64)
    rows = [{"pixel_values": picture, "labels": i % 3} for i, picture in enumerate(pictures)]
    args = transformers.TrainingArguments(
        tmp_path / "out",
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        eval_strategy="epoch",
        disable_tqdm=True,
    )

    class RebuildMemory(transformers.TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            build_memory_bank(model.timm_model, data, size=None, progress=False)

    data = [(row["pixel_values"], row["labels"]) for row in rows]
    before = {name: value.clone() for name, value in model.timm_model.backbone.named_parameters()}
    rebuild = [RebuildMemory()] if rebuilds else []
    trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=rebuild)
    trainer.train()
    assert "eval_loss" in trainer.state.log_history[-2]
    assert any(not torch.equal(before[name], value) for name, value in model.timm_model.backbone.named_parameters())
    inner = model.timm_model.eval()
    assert inner.memory_is_stale() is not rebuilds
    if not rebuilds:
        build_memory_bank(inner, data, size=None, progress=False)
    trainer.save_model(tmp_path / "tuned")
    loaded = timm_memwrap.from_pretrained(tmp_path / "tuned")
    assert len(loaded.memory_bank) == 16
    assert not loaded.memory_is_stale()
    assert torch.equal(logits_of(loaded, pictures), logits_of(model.eval(), pictures))


def test_other_classes_take_no_memory_along(
    folder: Path, images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModel.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert not len(model.timm_model.memory_bank)
    assert "num_classes=5 instead of 3: the memory bank is not loaded" in caplog.text
    build_memory_bank(model.timm_model, [(image, i) for i, image in enumerate(images)], size=None, progress=False)
    model.save_pretrained(tmp_path / "five")
    loaded = AutoModel.from_pretrained(tmp_path / "five")
    assert same_state(loaded.timm_model, model.timm_model)


def test_a_model_that_is_made_in_transformers_learns_to_save_its_memory(images: Tensor, tmp_path: Path) -> None:
    config = transformers.TimmWrapperConfig(
        architecture="memwrap_test_vit", num_labels=3, model_args={"memory_layout": {}, "img_size": 64}
    )
    model = AutoModel.from_config(config).eval()
    build_memory_bank(model.timm_model, [(image, i % 3) for i, image in enumerate(images)], size=None, progress=False)
    model.save_pretrained(tmp_path / "made")
    loaded = AutoModel.from_pretrained(tmp_path / "made")
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))


def test_features_need_no_memory(folder: Path, images: Tensor) -> None:
    features = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        found = features(images).pooler_output
    assert torch.equal(
        found,
        timm_memwrap.from_pretrained(folder).forward_head(
            features.timm_model.forward_features(images), pre_logits=True
        ),
    )


def test_without_the_package_nothing_is_loaded(folder: Path, run: Callable[..., str]) -> None:
    code = f"""
from transformers import AutoModelForImageClassification
try:
    AutoModelForImageClassification.from_pretrained({str(folder)!r})
except ImportError as error:
    print(error)
"""
    assert "'memwrap_evidence_test_resnet' is not supported in your version of timm" in run(code)


def test_a_memory_that_did_not_arrive_is_an_error(folder: Path, images: Tensor) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    model = AutoModel.from_config(config).eval()
    with pytest.raises(ValueError, match=r"memory of 12 samples .* is not there"):
        model(images)
    with pytest.raises(ValueError, match="is not there"):
        timm_memwrap.explain(model.timm_model, images)
    model.timm_model.memory_bank.clear()
    build_memory_bank(model.timm_model, [(image, i % 3) for i, image in enumerate(images)], size=None, progress=False)
    assert len(logits_of(model, images)) == 4


def test_a_file_without_the_memory_is_an_error(folder: Path, images: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("memory_bank.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="is not there"):
        model(images)


def test_accelerate_dispatches_weights_and_memory(folder: Path, images: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    args = json.loads((folder / "config.json").read_text())
    with accelerate.init_empty_weights():
        model = timm.create_model(args["architecture"], num_classes=args["num_classes"], **args["model_args"])
    model = accelerate.load_checkpoint_and_dispatch(
        model, str(folder / "model.safetensors"), device_map={"": "cpu"}
    ).eval()
    ours = timm_memwrap.from_pretrained(folder)
    assert torch.equal(logits_of(model, images), logits_of(ours, images))
    assert same_state(model, ours)


def test_distributed_checkpoints_fill_the_memory_in_place(folder: Path, images: Tensor, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    ours = timm_memwrap.from_pretrained(folder)
    dcp.save(ours.state_dict(), checkpoint_id=tmp_path / "checkpoint")
    args = {"num_classes": 3, **ours._model_args}
    model = timm.create_model(ours.pretrained_cfg["architecture"], **args).eval()
    dcp.load(model.state_dict(), checkpoint_id=tmp_path / "checkpoint")
    assert torch.equal(logits_of(model, images), logits_of(ours, images))
    assert same_state(model, ours)
