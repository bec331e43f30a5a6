from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from timm.models import save_for_hf
from training_images import write_images

import timm_memwrap
from timm_memwrap.cli import main
from timm_memwrap.data import open_source
from timm_memwrap.jobs.wrap import wrap_classifier


@pytest.fixture
def plain(tmp_path: Path, folder: Path) -> Path:
    """A folder with a plain timm model of three classes, as timm saves it."""
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    with torch.no_grad():
        model.get_classifier().weight.normal_()
    save_for_hf(model, str(tmp_path / "plain"), safe_serialization=True)
    return tmp_path / "plain"


def test_the_weights_are_kept_and_the_logits_are_of_the_memory_alone(tmp_path: Path, folder: Path, plain: Path) -> None:
    report = wrap_classifier(str(plain), folder, tmp_path / "out", val_split="validation", size=9, progress=False)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    source = timm.create_model(f"local-dir:{plain}", pretrained=True).eval()
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[name])
    assert len(model.memory_bank) == 9
    assert model.memory_bank.class_names == sorted(["cat", "dog", "Zebra"], key=str.lower)
    assert 0 <= report.plain_accuracy <= 1
    assert report.metrics.count == 12
    results = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    measured = {result.metric_type: result.metric_value for result in results}
    assert measured["accuracy of the plain classifier"] == report.plain_accuracy
    assert measured["changed without random samples"] == report.metrics.random_flip_rate
    readout = model(torch.randn(2, 3, 32, 32), return_readout=True)
    vector = (readout.weights.unsqueeze(-1) * model.memory_bank.encodings[readout.positions]).sum(dim=1)
    torch.testing.assert_close(readout.logits, source.get_classifier()(vector) / model.temperature)


def test_a_checkpoint_file_is_taken_for_the_weights(tmp_path: Path, folder: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=3)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    report = wrap_classifier(
        "test_resnet", folder, tmp_path / "out", checkpoint=str(tmp_path / "w.safetensors"), size=3, progress=False
    )
    assert torch.equal(report.model.backbone.state_dict()["fc.weight"], source.state_dict()["fc.weight"])
    assert report.metrics is None


def test_a_model_that_has_a_memory_gets_a_new_one(tmp_path: Path, folder: Path, plain: Path) -> None:
    wrap_classifier(str(plain), folder, tmp_path / "first", size=9, progress=False)
    write_images(folder / "train", 20)
    report = wrap_classifier(str(tmp_path / "first"), folder, tmp_path / "second", size=30, progress=False)
    assert len(report.model.memory_bank) == 30
    assert report.plain_accuracy is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "w.pth"}, r"w\.pth.*safetensors"),
        ({"checkpoint": "absent.safetensors"}, r"absent\.safetensors"),
        ({"data": ""}, r"No data"),
        ({"data": "digits"}, r"3 classes.*digits has 10"),
        ({"size": 0}, r"size=0"),
        ({"val_split": "nope"}, r"'nope'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, folder: Path, plain: Path, options: dict, message: str) -> None:
    arguments = {"data": folder, **options}
    model = "test_resnet" if "checkpoint" in options else str(plain)
    with pytest.raises(ValueError, match=message):
        wrap_classifier(model, out=tmp_path / "out", progress=False, **arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_measured(
    tmp_path: Path, folder: Path, plain: Path, capsys: pytest.CaptureFixture
) -> None:
    args = ["--data", str(folder), "--out", str(tmp_path / "out"), "--val-split", "validation"]
    assert main(["wrap", str(plain), *args, "--store-images"]) == 0
    text = capsys.readouterr().out
    assert "accuracy of the classifier as it was" in text
    assert "with the memory of 36 samples" in text  # all, since the size means up to
    assert timm_memwrap.from_pretrained(tmp_path / "out").memory_bank.images is not None


@pytest.mark.parametrize(("options", "fitted"), [({}, True), ({"calibrate": False}, False)])
def test_the_temperature_fits_the_images_that_are_measured_with(
    tmp_path: Path, folder: Path, plain: Path, options: dict, fitted: bool
) -> None:
    report = wrap_classifier(
        str(plain), folder, tmp_path / "out", val_split="validation", size=9, progress=False, **options
    )
    saved = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert saved.temperature == report.model.temperature
    assert (saved.temperature != 1.0) == fitted
    by_hand = timm_memwrap.calibrate(saved, _transformed(saved, folder / "validation"), progress=False)
    assert (report.model.temperature == pytest.approx(by_hand, rel=1e-4)) == fitted


def _transformed(model: torch.nn.Module, folder: Path) -> torch.utils.data.Dataset:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return open_source(folder.parent, folder.name, list(model.memory_bank.class_names)).with_transform(transform)
