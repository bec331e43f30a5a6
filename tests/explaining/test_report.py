"""The memory report against counts taken one input at a time, and against a memory with a known fault."""

import json
from collections.abc import Callable

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_memwrap
from timm_memwrap.explaining import memory_report
from timm_memwrap.model import MemoryWrapModel


def test_it_agrees_with_a_count_by_hand(model: MemoryWrapModel, make_images: Callable[..., torch.Tensor]) -> None:
    images, labels = make_images(9, seed=5), torch.arange(9) % 4
    report = memory_report(model, DataLoader(TensorDataset(images, labels), batch_size=4), progress=False)
    bank, own = model.memory_bank, model.own_predictions()
    vote = model.memory_args["classifier"] == "vote"
    wrong = 0
    table = {i: [0, 0.0, 0.0, 0.0] for i in range(len(bank))}
    for image, label in zip(images, labels.tolist(), strict=True):
        with torch.no_grad():
            readout = model(image.unsqueeze(0), return_readout=True)
        prediction = int(readout.logits.argmax())
        wrong += prediction != label
        for weight, i in zip(readout.weights[0].tolist(), readout.positions[0].tolist(), strict=True):
            speaks_for = int((bank.labels if vote else own)[i])
            table[i][0] += weight > 1e-6
            table[i][1] += weight
            if speaks_for == prediction:
                table[i][2 if prediction == label else 3] += weight
    assert (report.count, report.wrong) == (9, wrong)
    for sample in report.samples:
        expected = table[sample.position]
        assert sample.reads == expected[0]
        assert (sample.weight, sample.helping, sample.misleading) == pytest.approx(expected[1:], abs=1e-4)
        assert sample.id == bank.ids[sample.position]
        assert sample.disputed == (int(bank.labels[sample.position]) != int(own[sample.position]))
    assert report.never_read == [sample for sample in report.samples if sample.reads == 0]
    assert {sample.position for sample in report.disputed} == {s.position for s in report.samples if s.disputed}
    harms = [sample.harm for sample in report.misleading]
    assert harms == sorted(harms, reverse=True)
    assert all(harm > 0 for harm in harms)


def test_a_wrong_label_is_found_and_removing_it_helps() -> None:
    plain = timm.create_model("test_resnet", num_classes=4)
    model = timm_memwrap.wrap(plain, read_head="identity", classifier="vote").eval()
    # Four well separated classes of inputs, three memory samples each, one of them with a wrong label.
    width = model.encoding_size
    centres = torch.eye(4, width) * 100
    labels = torch.arange(12) % 4
    encodings = centres[labels] + torch.randn(12, width)
    labels[5] = 2
    bank = model.memory_bank
    bank.replace(encodings, labels, [f"s{i}" for i in range(12)])
    model.encode = lambda x: x.flatten(1)[:, :width]  # type: ignore[method-assign]
    inputs = torch.zeros(4, 3, 32, 32)
    inputs.view(4, -1)[:, :width] = encodings[[5, 5, 5, 5]] + 0.01 * torch.randn(4, width)
    # So sharp that only the nearest sample is read.
    model.head.scale = 10_000.0
    data = TensorDataset(inputs, torch.ones(4, dtype=torch.long))
    report = memory_report(model, data, progress=False)
    assert report.wrong == 4
    assert [sample.id for sample in report.misleading] == ["s5"]
    assert [sample.id for sample in report.disputed] == ["s5"]
    assert len(report.never_read) == 11
    assert "s5" in str(report)
    bank.remove([sample.id for sample in report.misleading])
    assert memory_report(model, data, progress=False).wrong == 0


def test_it_is_json(make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]) -> None:
    report = memory_report(make_model("wrapped"), [(make_images(1)[0], 0)], progress=False)
    assert json.loads(report.to_json())["samples"][3]["id"] == 3
    assert report.count == 1


def test_no_data_and_no_memory_are_refused(make_model: Callable[..., MemoryWrapModel]) -> None:
    with pytest.raises(ValueError, match="data is empty"):
        memory_report(make_model("wrapped"), [], progress=False)
    model = make_model("wrapped")
    model.memory_bank.clear()
    with pytest.raises(ValueError, match="bank is empty"):
        memory_report(model, [])
    with pytest.raises(ValueError, match="Wrap it"):
        memory_report(timm_memwrap.layers.BaselineMemory(4, 4), [])  # type: ignore[arg-type]
