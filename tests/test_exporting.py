"""Exported files compute what the model computes, hold its memory, and are whole or absent.

The oracle is the eager model; files are run here by onnxruntime and torch.export themselves, beside the check that the
export does on its own.
"""

import copy
import dataclasses
import json
import logging
import pickletools
import shutil
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor

from timm_memwrap import MemoryWrapModel, explain, exporting, save_pretrained
from timm_memwrap.cli import main
from timm_memwrap.exporting import FORMATS, METADATA_KEY, ExportError, ExportReport, default_path, export_model
from timm_memwrap.memory_args import OWN_READ_HEADS, READ_HEADS
from timm_memwrap.memory_bank import Provenance

CLASSES = 4
SIZE = (3, 32, 32)
CLASS_NAMES = ["cat", "dog", "bird", "ölfisch"]

IDS = ["\udcff.png", '"\n', *(f"{i}.png" for i in range(2, 12))]

Exported = Callable[[str], tuple[Path, MemoryWrapModel]]

each_format = pytest.mark.parametrize("format", FORMATS)
# Of what does not depend on the format: ONNX takes three times as long.
each_format_onnx_slow = pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "export"])

HEADS = [
    {"kind": kind, "read_head": read_head, "classifier": classifier}
    for kind, read_heads, classifiers in (
        ("memwrap", set(READ_HEADS) - set(OWN_READ_HEADS), ("mlp", "linear")),
        ("memwrap_baseline", set(READ_HEADS) - set(OWN_READ_HEADS), ("mlp", "linear", "vote")),
        ("memwrap_evidence", OWN_READ_HEADS, ("own", "vote")),
    )
    for read_head in sorted(read_heads)
    for classifier in classifiers
    if (read_head, classifier) != ("pre_logits", "vote")
]


def create(name: str = "test_resnet", kind: str = "memwrap", **kwargs: Any) -> MemoryWrapModel:
    torch.manual_seed(0)
    model: Any = timm.create_model(f"{kind}_{name}", num_classes=CLASSES, **kwargs)
    return model.eval()


def random_images(count: int, size: tuple[int, ...] = SIZE, seed: int = 5) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def remember(model: MemoryWrapModel, size: int = 12, ties: bool = False) -> MemoryWrapModel:
    """Fills the bank with encodings like those of images; with `ties`, each is there three times."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        seen = model.encode(random_images(4, model.pretrained_cfg["input_size"] if not_any_size(model) else SIZE))
    spread = seen.std() + 0.1 * seen.abs().mean()
    encodings = seen.mean(dim=0) + spread * torch.randn(size, model.encoding_size, generator=generator)
    if ties:
        encodings = encodings[torch.arange(size) // 3]
    model.memory_bank.replace(
        encodings,
        torch.arange(size) % CLASSES,
        [f"{i}.png" for i in range(size)],
        class_names=CLASS_NAMES,
        provenance=Provenance("pets", "balanced", 3, 100, model.encoder_fingerprint()),
    )
    return model


def not_any_size(model: MemoryWrapModel) -> bool:
    return bool(model.pretrained_cfg.get("fixed_input_size"))


def load(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Runs a file as people do who have no timm-memwrap."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(array) for array in session.run(None, {"image": images.numpy()})]
    module = torch.export.load(path).module()
    return lambda images: list(module(images))


def metadata_of(path: Path) -> dict[str, Any]:
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    files = {f"{METADATA_KEY}.json": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files[f"{METADATA_KEY}.json"])


def dense_weights(model: MemoryWrapModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        readout = model(images, return_readout=True)
    return torch.zeros(len(images), len(model.memory_bank)).scatter(1, readout.positions, readout.weights)


def dense_similarities(model: MemoryWrapModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        readout = model(images, return_readout=True)
    return torch.zeros(len(images), len(model.memory_bank)).scatter(1, readout.positions, readout.similarities)


def assert_computes_the_same(path: Path, model: MemoryWrapModel, size: tuple[int, ...] = SIZE) -> None:
    run = load(path)
    for batch in (1, 2, 5):
        images = random_images(batch, size, seed=20 + batch)
        with torch.no_grad():
            expected = model(images)
        logits, *evidence = run(images)
        if model.memory_args["classifier"] == "vote":
            logits, expected = logits.exp(), expected.exp()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        if evidence:
            weights, indices, similarities, familiar = evidence
            dense = dense_weights(model, images)
            alike = dense_similarities(model, images).gather(1, indices)[weights > 1e-4]
            torch.testing.assert_close(similarities[weights > 1e-4], alike, rtol=1e-4, atol=1e-4)
            explained = [each.familiarity for each in explain(model, images, contenders=0)]
            torch.testing.assert_close(familiar, torch.tensor(explained), rtol=0, atol=2e-2)
            strongest = dense.sort(dim=1, descending=True).values[:, : weights.shape[1]]
            torch.testing.assert_close(weights, strongest, rtol=0, atol=1e-4)
            torch.testing.assert_close(weights, dense.gather(1, indices), rtol=0, atol=1e-4)
            assert all(len(set(row)) == len(row) for row in indices.tolist())


def export(model: Any, folder: Path, format: str = "onnx", size: tuple[int, ...] = SIZE, **kwargs: Any) -> ExportReport:
    return export_model(model, folder / f"model{FORMATS[format]}", format, input_size=size, **kwargs)


# Each kind, read head, classifier and distance at least once, in one format or the other; the whole product is slow.
ONNX_BY_DEFAULT = {
    "memwrap-linear-mlp-cosine",
    "memwrap-identity-linear-l2",
    "memwrap_baseline-linear-vote-cosine",
    "memwrap_evidence-joint-own-cosine",
    "memwrap_evidence-probabilities-own-dot",
    "memwrap_evidence-pre_logits-own-cosine",
    "memwrap_evidence-logits-vote-cosine",
}
PROGRAMS_BY_DEFAULT = {
    "memwrap-identity-mlp",
    "memwrap_baseline-linear-linear",
    "memwrap_evidence-logits-own",
    "memwrap_evidence-joint-vote",
    "memwrap_evidence-probabilities-vote",
}


def _slow_but(quick: set[str], cases: list[dict[str, str]]) -> list[Any]:
    named = {"-".join(case.values()): case for case in cases}
    assert quick <= named.keys()
    return [
        pytest.param(case, id=name, marks=[] if name in quick else pytest.mark.slow) for name, case in named.items()
    ]


@pytest.mark.parametrize(
    "head",
    _slow_but(
        ONNX_BY_DEFAULT,
        [
            {**head, "distance": distance}
            for distance in ("cosine", "l2", "dot")
            for head in HEADS
            # A reconstruction is of keys of length 1.
            if distance == "cosine" or head["read_head"] != "joint"
        ],
    ),
)
def test_onnx_of_every_head(head: dict[str, Any], tmp_path: Path) -> None:
    model = remember(create(**head))
    report = export(model, tmp_path, with_evidence=True)
    assert report.difference is not None
    assert report.difference <= 1e-4
    assert_computes_the_same(report.path, model)


@pytest.mark.parametrize("head", _slow_but(PROGRAMS_BY_DEFAULT, HEADS))
def test_program_of_every_head(head: dict[str, Any], tmp_path: Path) -> None:
    model = remember(create(**head))
    assert_computes_the_same(export(model, tmp_path, "export", with_evidence=True).path, model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Returns a file of a format with evidence of three samples, and its model: exported once, and only read."""

    @cache
    def of(format: str) -> tuple[Path, MemoryWrapModel]:
        model = remember(create())
        bank = model.memory_bank
        bank.replace(bank.encodings, bank.labels, IDS, class_names=CLASS_NAMES, provenance=bank.provenance)
        opset = 21 if format == "onnx" else None
        folder = tmp_path_factory.mktemp(format)
        return export(model, folder, format, with_evidence=True, top_k=3, opset=opset).path, model

    return of


@pytest.fixture(scope="module")
def exported_from_folder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Returns a file exported from a saved model that holds images and paths, and the model."""

    @cache
    def of(format: str) -> tuple[Path, MemoryWrapModel]:
        model = remember(create(kind="memwrap_evidence"), 3)
        bank, folder = model.memory_bank, tmp_path_factory.mktemp("private")
        images = torch.randint(0, 255, (3, 3, 8, 8), dtype=torch.uint8)
        ids = [f"/home/someone/pets/{name}/{i}.png" for i, name in enumerate(CLASS_NAMES[:3])]
        provenance = dataclasses.replace(bank.provenance, dataset="/home/someone/pets")
        bank.replace(bank.encodings, bank.labels, ids, images, CLASS_NAMES, provenance)
        return export(save_pretrained(model, folder / "saved"), folder, format, with_evidence=True).path, model

    return of


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("test_vit", "export"),
        ("test_convnext", "onnx"),
        pytest.param("test_vit", "onnx", marks=pytest.mark.slow),
        pytest.param("test_convnext", "export", marks=pytest.mark.slow),
        pytest.param("test_efficientnet", "onnx", marks=pytest.mark.slow),
        pytest.param("test_efficientnet", "export", marks=pytest.mark.slow),
    ],
)
def test_backbones(name: str, format: str, tmp_path: Path) -> None:
    model = remember(create(name))
    size = (3, 160, 160)
    report = export_model(model, tmp_path / f"m{FORMATS[format]}", format)
    assert report.input_size == size == model.pretrained_cfg["input_size"]
    assert report.outputs == ("logits",)
    assert_computes_the_same(report.path, model, size)


@pytest.mark.parametrize(
    ("samples", "ties", "format"),
    [
        (1, False, "onnx"),
        (12, True, "onnx"),
        (1000, False, "export"),
        (999, True, "export"),
        pytest.param(1, False, "export", marks=pytest.mark.slow),
        pytest.param(12, True, "export", marks=pytest.mark.slow),
        pytest.param(1000, False, "onnx", marks=pytest.mark.slow),
        pytest.param(999, True, "onnx", marks=pytest.mark.slow),
    ],
)
def test_sizes_of_the_memory(samples: int, ties: bool, format: str, tmp_path: Path) -> None:
    model = remember(create(kind="memwrap_baseline", scale=30.0), samples, ties)
    # Four of three that tie: the cut goes through a tie.
    report = export(model, tmp_path, format, with_evidence=True, top_k=4)
    assert load(report.path)(random_images(2))[1].shape == (2, min(4, samples))
    assert_computes_the_same(report.path, model)


@pytest.mark.parametrize(
    ("scale", "kind", "format"),
    [
        (1.0, "memwrap_baseline", "onnx"),
        (100.0, "memwrap_baseline", "export"),
        (None, "memwrap_evidence", "export"),
        pytest.param(1.0, "memwrap_baseline", "export", marks=pytest.mark.slow),
        pytest.param(100.0, "memwrap_baseline", "onnx", marks=pytest.mark.slow),
        pytest.param(None, "memwrap_evidence", "onnx", marks=pytest.mark.slow),
    ],
)
def test_a_large_memory_is_read_by_its_strongest_samples(
    scale: float | None, kind: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by all where more of them have weight, as with the scale of 1."""
    monkeypatch.setattr("timm_memwrap.memory_layer.LARGE", 100)
    monkeypatch.setattr("timm_memwrap.memory_layer._MOST_READ", 16)
    model = remember(create(kind=kind, **({"scale": scale} if scale else {})), 500)
    with torch.no_grad():
        support = model(random_images(2), return_readout=True).weights.shape[1]
    assert scale is None or (support > 16) == (scale == 1.0)
    report = export(model, tmp_path, format, with_evidence=True, top_k=4)
    assert_computes_the_same(report.path, model)


@each_format_onnx_slow
def test_other_channels(format: str, tmp_path: Path) -> None:
    model = create(in_chans=1)
    labels = torch.arange(5) % CLASSES
    model.memory_bank.replace(torch.randn(5, model.encoding_size), labels, range(5))
    report = export_model(model, tmp_path / f"model{FORMATS[format]}", format)
    assert report.input_size == (1, 160, 160)
    assert len(metadata_of(report.path)["input"]["mean"]) == 1
    assert_computes_the_same(report.path, model, report.input_size)


@each_format
def test_the_memory_is_named_and_the_input_described(format: str, exported: Exported) -> None:
    path, model = exported(format)
    bank = model.memory_bank
    metadata = metadata_of(path)
    assert metadata["class_names"] == CLASS_NAMES
    assert metadata["architecture"] == "memwrap_test_resnet"
    memory = metadata["memory"]
    assert memory["ids"] == bank.ids
    assert memory["labels"] == bank.labels.tolist()
    assert memory["predictions"] == model.own_predictions().tolist()
    assert memory["encoder"] == model.encoder_fingerprint()
    assert (memory["dataset"], memory["selection"], memory["seed"], memory["population"]) == (
        "pets",
        "balanced",
        3,
        100,
    )
    assert metadata["input"]["input_size"] == list(SIZE)
    assert metadata["input"]["mean"] == list(model.pretrained_cfg["mean"])


@each_format
def test_ids_that_are_no_unicode_survive(format: str, exported: Exported) -> None:
    assert metadata_of(exported(format)[0])["memory"]["ids"] == IDS


def test_names_and_dimensions_of_onnx(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported("onnx")[0])
    described = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    assert described == {
        "image": ["batch", *SIZE],
        "logits": ["batch", CLASSES],
        "weights": ["batch", 3],
        "indices": ["batch", 3],
        "similarities": ["batch", 3],
        "familiarity": ["batch"],
    }


def test_opset(exported: Exported) -> None:
    assert [imported.version for imported in onnx.load(exported("onnx")[0]).opset_import if not imported.domain] == [21]


@each_format
def test_no_images_and_no_paths_of_this_machine(format: str, exported_from_folder: Exported) -> None:
    path, model = exported_from_folder(format)
    bank = model.memory_bank
    assert metadata_of(path)["memory"]["ids"] == ["cat/0.png", "dog/1.png", "bird/2.png"]
    data = path.read_bytes()
    assert b"someone" not in data
    assert str(path.parent).encode() not in data
    assert bank.images.numpy().tobytes() not in data
    assert bank.encodings.numpy().tobytes() in data
    for module in (exporting, timm, torch):
        assert str(Path(module.__file__).parent).encode() not in data


def test_there_is_no_pickle_in_a_program(exported: Exported) -> None:
    with zipfile.ZipFile(exported("export")[0]) as file:
        names = file.namelist()
        contents = {name: file.read(name) for name in names}
    assert any("/weights/" in name for name in names)
    for name, data in contents.items():
        assert not data.startswith(b"PK"), name
        with pytest.raises((ValueError, IndexError, UnicodeDecodeError, KeyError)):
            list(pickletools.genops(data))


def test_a_program_with_a_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch writes one by default: with the inputs that the graph was traced with."""
    save = torch.export.save

    def save_with_inputs(program: Any, *args: Any, **kwargs: Any) -> None:
        program._example_inputs = ((random_images(2),), {})
        save(program, *args, **kwargs)

    monkeypatch.setattr(torch.export, "save", save_with_inputs)
    with pytest.raises(ExportError, match="pickle"):
        export(remember(create()), tmp_path, "export")
    assert not list(tmp_path.iterdir())


@each_format
def test_what_computes_something_else_is_refused(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"model{FORMATS[format]}"
    path.write_text("as before")
    forward = exporting._Exported.forward
    monkeypatch.setattr(exporting._Exported, "forward", lambda self, image: (forward(self, image)[0] + 0.01,))
    with pytest.raises(ExportError, match="differs from the model by"):
        export(remember(create(scale=30.0)), tmp_path, format)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "as before"


@each_format_onnx_slow
@pytest.mark.parametrize(
    ("wrong", "change"),
    [
        ("weights", lambda found: found / 2),
        ("indices", lambda found: found.flip(1)),
        ("similarities", lambda found: -found),
        ("familiarity", lambda found: 1 - found),
    ],
)
def test_wrong_evidence_is_refused(
    wrong: str, change: Callable[[Tensor], Tensor], format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = exporting._Exported.forward

    def other_evidence(self: Any, image: Tensor) -> tuple[Tensor, ...]:
        names = ("logits", "weights", "indices", "similarities", "familiarity")
        outputs = dict(zip(names, forward(self, image), strict=True))
        return tuple((outputs | {wrong: change(outputs[wrong])}).values())

    monkeypatch.setattr(exporting._Exported, "forward", other_evidence)
    with pytest.raises(ExportError, match="differs from the model by"):
        export(remember(create(scale=30.0)), tmp_path, format, with_evidence=True)
    assert not list(tmp_path.iterdir())


def test_nan_is_refused(tmp_path: Path) -> None:
    model = remember(create())
    with torch.no_grad():
        model.head.classifier.fc2.bias.fill_(float("nan"))
    with pytest.raises(ExportError, match="differs from the model by nan"):
        export(model, tmp_path, "export")
    assert not list(tmp_path.iterdir())


@each_format
def test_a_broken_write_leaves_what_was_there(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = remember(create())
    path = tmp_path / f"model{FORMATS[format]}"
    path.write_text("as before")

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full_disk)
    monkeypatch.setattr(onnx.checker, "check_model", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(model, tmp_path, format)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "as before"


@each_format
def test_export_replaces_the_file(format: str, tmp_path: Path, exported: Exported) -> None:
    first, model = exported(format)
    path = shutil.copy(first, tmp_path / f"model{FORMATS[format]}")
    assert len(load(path)(random_images(2))) == 5
    assert export(model, tmp_path, format).path == path
    assert len(load(path)(random_images(2))) == 1


def test_weights_too_large_for_protobuf_go_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = remember(create())
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    path = export(model, tmp_path).path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    assert_computes_the_same(path, model)


@each_format_onnx_slow
def test_a_model_in_training_is_exported_in_evaluation_and_stays_in_training(format: str, tmp_path: Path) -> None:
    model = remember(create())
    with torch.no_grad():
        for name, buffer in model.backbone.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(1.5)
    remember(model)
    expected = copy.deepcopy(model)
    model.train()
    model.backbone.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = export(model, tmp_path / "new" / "folder", format).path
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert_computes_the_same(path, expected)


@each_format
def test_a_saved_model_is_exported_from_its_folder(format: str, exported_from_folder: Exported) -> None:
    assert_computes_the_same(*exported_from_folder(format))


def test_half_precision_is_exported_once_it_is_float(tmp_path: Path) -> None:
    model = remember(create()).half()
    with pytest.raises(ValueError, match=r"float16.*model\.float\(\)"):
        export(model, tmp_path)
    model.float()
    assert_computes_the_same(export(model, tmp_path, "export").path, model)


@each_format
def test_an_empty_memory_is_refused(format: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The memory bank is empty.*build_memory_bank"):
        export(create(), tmp_path, format)
    assert not list(tmp_path.iterdir())


@each_format
def test_a_stale_memory_is_refused(format: str, tmp_path: Path) -> None:
    model = remember(create())
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.1)
    with pytest.raises(ValueError, match=r"stale.*build_memory_bank"):
        export(model, tmp_path, format)
    assert not list(tmp_path.iterdir())


def test_no_head_and_no_memory_wrap_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_classes=0"):
        export(timm.create_model("memwrap_test_resnet", num_classes=0), tmp_path)
    with pytest.raises(ValueError, match=r"ResNet is not a Memory Wrap model.*wrap\(model\)"):
        export(timm.create_model("test_resnet"), tmp_path)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("m.onnx", {"format": "tflite"}, "Unknown format='tflite'.*'onnx', 'export'"),
        ("m.pt2", {}, r"m\.pt2' does not end in '\.onnx'"),
        ("m", {"format": "export"}, r"m' does not end in '\.pt2'"),
        ("m.onnx", {"top_k": 0}, "top_k=0"),
        ("m.onnx", {"top_k": True}, "top_k=True"),
        ("m.onnx", {"input_size": (3, 32)}, r"input_size=\(3, 32\)"),
        ("m.onnx", {"input_size": (3, 32, 0)}, r"input_size=\(3, 32, 0\)"),
        ("m.pt2", {"format": "export", "opset": 18}, "opset=18"),
    ],
)
def test_wrong_arguments_are_refused(name: str, kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(remember(create()), tmp_path / name, **kwargs)
    assert not list(tmp_path.iterdir())


def test_an_input_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input_size=\(1, 32, 32\) does not fit.*Pass"):
        export(remember(create()), tmp_path, size=(1, 32, 32))
    assert not list(tmp_path.iterdir())


class _Branching(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


@each_format
def test_a_model_that_does_not_trace_is_refused(format: str, tmp_path: Path) -> None:
    model = remember(create())
    model.head.classifier.relu = _Branching()
    with pytest.raises(ExportError, match="cannot trace"):
        export(model, tmp_path, format)
    assert not list(tmp_path.iterdir())


class _NotInOnnx(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j1(x)


def test_an_operation_that_onnx_does_not_have_is_refused(tmp_path: Path) -> None:
    model = remember(create())
    model.head.classifier.relu = _NotInOnnx()
    with pytest.raises(ExportError, match=r"cannot be converted to ONNX.*bessel_j1.*format='export'"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert_computes_the_same(export(model, tmp_path, "export").path, model)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = remember(create())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*timm-memwrap\[onnx\]"):
        export(model, tmp_path)
    export(model, tmp_path, "export")


def test_without_onnxruntime_the_file_is_written_and_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = remember(create())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with caplog.at_level(logging.WARNING, "timm_memwrap"):
            report = export(model, tmp_path)
    assert report.difference is None
    assert "model.onnx is not checked" in caplog.text
    assert_computes_the_same(report.path, model)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_pretrained(remember(create()), tmp_path / "pets")


def test_command(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "pets"]) == 0
    said = capsys.readouterr().out
    assert "Exported pets to pets.onnx" in said
    assert "image [batch, 3, 160, 160], of any batch size -> logits\n" in said
    assert len(load(saved.parent / "pets.onnx")(random_images(1, (3, 160, 160)))) == 1


def test_command_with_options(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "pets", "--out", "a.pt2", "--format", "export", "--with-evidence", "--top-k", "2"]) == 0
    assert "logits, weights, indices, similarities, familiarity" in capsys.readouterr().out
    logits, weights, indices, *_ = load(saved.parent / "a.pt2")(random_images(1, (3, 160, 160)))
    assert logits.shape == (1, CLASSES)
    assert weights.shape == indices.shape == (1, 2)


def test_command_says_what_is_wrong_in_one_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "pets", "--format", "tflite"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "timm-memwrap: Unknown format='tflite'. Pass one of 'onnx', 'export'."
    ]


@pytest.mark.parametrize(
    ("source", "format", "expected"),
    [
        ("me/pets", "onnx", "pets.onnx"),
        ("me/pets@v1.0", "export", "pets.pt2"),
        ("hf-hub:me/pets-v1.2", "onnx", "pets-v1.2.onnx"),
        ("local-dir:some/where/", "export", "where.pt2"),
    ],
)
def test_default_path(source: str, format: str, expected: str) -> None:
    assert default_path(source, format) == Path(expected)


def test_default_path_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pets@home").mkdir()
    assert default_path(tmp_path / "pets@home") == Path("pets@home.onnx")
    monkeypatch.chdir(tmp_path / "pets@home")
    assert default_path(".", "export") == Path("pets@home.pt2")


def test_indices_point_at_the_samples_that_explain_names(tmp_path: Path) -> None:
    """What an application shows, from the file alone, is what `explain` shows."""
    from timm_memwrap import explain

    model = remember(create(kind="memwrap_evidence"))
    path = export(model, tmp_path, "export", with_evidence=True, top_k=3).path
    images = random_images(3)
    logits, weights, indices, *_ = load(path)(images)
    metadata = metadata_of(path)
    for row, explanation in enumerate(explain(model, images, top_k=3)):
        assert metadata["class_names"][int(logits[row].argmax())] == explanation.class_name
        used = int((weights[row] > 0).sum())
        shown = [metadata["memory"]["ids"][i] for i in indices[row, :used].tolist()]
        assert shown == [sample.id for sample in explanation.samples]
        np.testing.assert_allclose(
            weights[row, :used].detach().numpy(), [sample.weight for sample in explanation.samples], atol=1e-4
        )


@each_format_onnx_slow
def test_a_model_of_several_classes_says_so_beside_its_logits(format: str, tmp_path: Path) -> None:
    model = remember(create(kind="memwrap_evidence"), 3)
    bank, labels = model.memory_bank, torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]])
    bank.replace(bank.encodings, labels, bank.ids, class_names=CLASS_NAMES, provenance=bank.provenance)
    report = export(model, tmp_path, format, with_evidence=True)
    meaning = metadata_of(report.path)
    assert meaning["multi_label"] is True
    assert meaning["memory"]["labels"] == [[0, 1], [], [1, 3]]
    said = model.own_logits(torch.arange(3)) > 0
    assert meaning["memory"]["predictions"] == [row.nonzero().flatten().tolist() for row in said]
    assert_computes_the_same(report.path, model)
