"""A model whose memory holds samples of several classes: saved, pushed, shown and loaded as any other."""

import json
from pathlib import Path

import pytest
import timm
import torch
from hub_models import make_model
from hub_server import Hub
from safetensors.torch import load_file, save_file
from torch import Tensor

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.cli import main

LABELS = torch.tensor([[(i >> bit) % 2 for bit in range(3)] for i in range(12)])


@pytest.fixture
def several() -> MemoryWrapModel:
    model = make_model()
    bank = model.memory_bank
    bank.replace(bank.encodings, LABELS, bank.ids, bank.images, bank.class_names, bank.provenance)
    return model


def test_a_saved_model_is_multi_label_when_timm_loads_it(
    several: MemoryWrapModel, images: Tensor, tmp_path: Path
) -> None:
    timm_memwrap.save_pretrained(several, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.multi_label
    assert torch.equal(loaded.memory_bank.labels, LABELS.to(torch.uint8))
    assert torch.equal(loaded(images), several(images))
    assert timm_memwrap.explain(loaded, images) == timm_memwrap.explain(several, images)
    block = json.loads((tmp_path / "config.json").read_text())["memory_bank"]
    assert block["multi_label"] is True
    assert block["class_counts"] == {"0": 6, "1": 6, "2": 4}


def test_a_push_tells_of_each_class_and_of_no_folder(
    hub: Hub, token: str, several: MemoryWrapModel, capsys: pytest.CaptureFixture[str]
) -> None:
    timm_memwrap.push_to_hub(several, "me/pets")
    card = hub.repos["me/pets"].files()["README.md"].decode()
    assert "12 of 3 classes; a sample may have several, and counts for each" in card
    assert "| dog | 6 |" in card
    assert "`e.classes` explains each that is present" in card
    loaded = timm_memwrap.from_pretrained("me/pets")
    assert loaded.multi_label
    assert loaded.memory_bank.ids[:3] == ["0000.png", "0000.png (2)", "0001.png"]
    assert main(["inspect", "me/pets"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "labels several classes per sample, or none" in lines
    assert "cat 6" in lines


def test_a_new_memory_of_the_other_kind_is_pushed_alone(
    hub: Hub, token: str, several: MemoryWrapModel, images: Tensor
) -> None:
    timm_memwrap.push_to_hub(make_model(), "me/pets")
    assert not timm_memwrap.from_pretrained("me/pets").multi_label
    timm_memwrap.push_memory_bank(several, "me/pets")
    assert timm_memwrap.from_pretrained("me/pets").multi_label


@pytest.mark.parametrize(
    "labels",
    [torch.full((12, 3), 7, dtype=torch.uint8), torch.ones(12, 9, dtype=torch.uint8), torch.ones(12, 3)],
    ids=["no bits", "other classes", "floats"],
)
def test_a_file_with_other_labels_is_refused(several: MemoryWrapModel, labels: Tensor, tmp_path: Path) -> None:
    timm_memwrap.save_pretrained(several, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "memory_bank.labels": labels}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="label"):
        timm_memwrap.from_pretrained(tmp_path)
