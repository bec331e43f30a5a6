"""The memory report against counts taken one input at a time, and against a memory with a known fault."""

import json
from collections.abc import Callable

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_memwrap
from timm_memwrap.explaining import memory_report
from timm_memwrap.explaining.findings import KINDS
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
        assert sample.prediction == int(own[sample.position])
    assert report.never_read == [sample for sample in report.samples if sample.reads == 0]
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
    assert [(finding.id, finding.action, finding.target) for finding in report.of_kind("label")] == [
        ("s5", "relabel as", "class 1")
    ]
    assert len(report.never_read) == 11
    assert "s5" in str(report)
    bank.remove([sample.id for sample in report.misleading])
    assert memory_report(model, data, progress=False).wrong == 0


def test_it_is_json(make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]) -> None:
    report = memory_report(make_model("wrapped"), [(make_images(1)[0], 0)], progress=False)
    assert json.loads(report.to_json())["samples"][3]["id"] == 3
    assert report.count == 1


def test_the_memory_alone_is_enough(make_model: Callable[..., MemoryWrapModel]) -> None:
    model = make_model("wrapped", size=40)
    alone, used = memory_report(model, progress=False), memory_report(model, [(torch.zeros(3, 32, 32), 0)], False)
    assert (alone.size, alone.samples, alone.count, alone.misleading, alone.never_read) == (40, (), 0, [], [])
    assert alone.findings == tuple(finding for finding in used.findings if finding.kind != "leak")
    assert json.loads(alone.to_json())["findings"] == [finding.to_dict() for finding in alone.findings]


def test_images_of_the_data_that_are_in_the_memory_are_leaks(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped", size=40)
    data = TensorDataset(torch.cat([make_images(5, seed=9), make_images(40, seed=1)[[7, 3]]]), torch.zeros(7).long())
    report = memory_report(model, data, progress=False)
    assert report.leaked == 2
    assert {(f.id, f.action, f.target, f.neighbours) for f in report.of_kind("leak")} == {
        (7, "remove", None, (5,)),
        (3, "remove", None, (6,)),
    }


def test_findings_are_sorted_by_kind_and_score(make_model: Callable[..., MemoryWrapModel]) -> None:
    model = make_model("wrapped", size=40)
    bank = model.memory_bank
    bank.append(bank.encodings[:5] * 1.5, bank.labels[:5].roll(1), [f"copy {i}" for i in range(5)])
    report = memory_report(model, progress=False)
    assert report.of_kind("label")
    assert len(report.of_kind("duplicate")) == 5
    assert list(report.findings) == [finding for kind in KINDS for finding in report.of_kind(kind)]
    for kind in KINDS:
        scores = [finding.score for finding in report.of_kind(kind)]
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= score <= 1 for score in scores)
    for finding in report.findings:
        assert bank.ids[finding.position] == finding.id
        assert finding.id not in finding.neighbours
        assert str(finding.target or finding.action)[:16] in str(report)
    with pytest.raises(ValueError, match="Unknown kind='labels'"):
        report.of_kind("labels")


def test_a_report_looks_at_a_memory_of_two_at_least(make_model: Callable[..., MemoryWrapModel]) -> None:
    model = make_model("wrapped")
    model.memory_bank.select([0, 1])
    assert memory_report(model, progress=False).size == 2
    model.memory_bank.select([0])
    with pytest.raises(ValueError, match="one sample, which has no neighbours"):
        memory_report(model, progress=False)


def test_no_data_and_no_memory_are_refused(make_model: Callable[..., MemoryWrapModel]) -> None:
    with pytest.raises(ValueError, match="data is empty"):
        memory_report(make_model("wrapped"), [], progress=False)
    model = make_model("wrapped")
    model.memory_bank.clear()
    with pytest.raises(ValueError, match="bank is empty"):
        memory_report(model, [])
    with pytest.raises(ValueError, match="bank is empty"):
        memory_report(model)
    with pytest.raises(ValueError, match="Wrap it"):
        memory_report(timm_memwrap.layers.BaselineMemory(4, 4), [])  # type: ignore[arg-type]
