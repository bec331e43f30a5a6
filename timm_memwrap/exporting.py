"""Exports a model with its memory to ONNX or `torch.export`, for places without timm and without this package.

Shapes: B inputs, M memory samples, C classes, K samples shown per input.

ONNX is protobuf and runs no code when it is loaded. A `.pt2` file of `torch.export.save` holds one pickle, the inputs
that the graph was traced with: they are left out, and a file in which a pickle is found all the same is refused.
`torch.export.load` unpickles what a file asks it to, so the only file loaded here is the one just made, to check it.
"""

import copy
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from timm_memwrap._utils import check_choice, check_count, optional_import, replacing
from timm_memwrap.data import data_config, known_class_names
from timm_memwrap.familiarity import familiarity, reference_quantiles
from timm_memwrap.hub import from_pretrained
from timm_memwrap.hub.privacy import public_bank
from timm_memwrap.labels import present
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.memory_checks import check_memory
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["FORMATS", "METADATA_KEY", "ExportError", "ExportReport", "default_path", "export_model"]

_logger = logging.getLogger(__name__)

# Format: the suffix of its files.
FORMATS = {"onnx": ".onnx", "export": ".pt2"}
# Where the JSON about the memory is: in ONNX's metadata_props, and with ".json" among the extra files of a ".pt2".
METADATA_KEY = "timm_memwrap"
_INPUT_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

# Names of the outputs with evidence, behind the logits.
_EVIDENCE = ("weights", "indices", "similarities", "familiarity")

# A size of 1 may be taken for a constant when a graph is traced, so it is traced with another and checked with it.
_TRACED_BATCH, _CHECKED_BATCHES = 2, (1, 3)

_Runner = Callable[[Tensor], list[Tensor]]


class ExportError(ValueError):
    """The model cannot be exported, or the file would not compute what the model does."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Args:
        path: The file.
        input_size: Size `(C, H, W)` of the images that it takes.
        outputs: Names of its outputs, in order.
        difference: Largest difference between its outputs and the model's; `None` if it could not be run.
    """

    path: Path
    input_size: tuple[int, ...]
    outputs: tuple[str, ...]
    difference: float | None


class _Exported(nn.Module):
    """A model without its bank, with the memory that was prepared from it: each file holds it once."""

    def __init__(self, model: MemoryWrapModel, top_k: int | None) -> None:
        super().__init__()
        self.model, self.top_k = model, top_k
        self.quantiles = reference_quantiles(model) if top_k else None
        encodings, labels = model.memory_bank.filled()
        self.memory = model.head.prepare(encodings.float(), labels)
        model.memory_bank = MemoryBank()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Classifies images `[B, C, H, W]`: logits `[B, C]`, and on request what they read."""
        readout = self.model.read(self.model.encode(image), memory=self.memory)
        if self.quantiles is None:
            return (readout.logits,)
        samples = (readout.weights, readout.positions, readout.similarities)
        return (
            readout.logits,
            *(each[:, : self.top_k] for each in samples),
            familiarity(readout.remainder, self.quantiles),
        )


def export_model(
    model_or_dir: MemoryWrapModel | str | os.PathLike,
    path: str | os.PathLike,
    format: str = "onnx",
    *,
    with_evidence: bool = False,
    top_k: int = 5,
    input_size: tuple[int, int, int] | None = None,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Exports a model in evaluation mode, with its memory bank inside, and checks the file against the model.

    The file takes a batch `image` of any size `[B, C, H, W]` and returns `logits` `[B, C]`. JSON in it holds the
    memory's ids, labels and predictions, class names, whether images may have several classes (`multi_label`), the
    encoder's fingerprint, and how images are prepared. As in a push, images are left out, and of an id that is a path
    its name stays. The file is written whole or not at all.

    Args:
        model_or_dir: A model with a memory bank, or what `from_pretrained` takes.
        path: The file to write: `.onnx`, or `.pt2` for `torch.export`.
        format: `"onnx"` or `"export"`.
        with_evidence: Whether the file also returns the content `weights` `[B, K]` of the `top_k` strongest samples,
            their `indices` `[B, K]` in the memory and their `similarities` `[B, K]`, and the `familiarity` `[B]` of the
            input, as `explain` does. All weights sum to 1, so these tell how much is not shown.
        top_k: How many samples K; all, if the bank holds fewer.
        input_size: Size `(C, H, W)` of an image; `None` for the one in the model's `pretrained_cfg`.
        opset: ONNX opset version; `None` for the exporter's default.
        tolerance: How far the file's outputs may be from the model's.

    Raises:
        ExportError: If PyTorch cannot trace the model, or the file computes something else; it is a `ValueError`.
        ImportError: If a package for ONNX is not installed.
        ValueError: If the bank is empty or stale, or an argument is not valid.
    """
    path = Path(path)
    check_choice("format", format, FORMATS)
    check_count("top_k", top_k)
    if path.suffix != FORMATS[format]:
        raise ValueError(f"path={str(path)!r} does not end in {FORMATS[format]!r}, as format={format!r} requires.")
    if format == "onnx":
        for package in ("onnx", "onnxscript"):
            optional_import(package, extra="onnx", what="Export to ONNX")
    elif opset is not None:
        raise ValueError(f"opset={opset!r} is a version of ONNX, but format={format!r}. Leave it out.")
    model = model_or_dir if isinstance(model_or_dir, nn.Module) else from_pretrained(model_or_dir)
    check_memory(model, stale="refuse", rehash=True)
    size = tuple(data_config(model)["input_size"] if input_size is None else input_size)
    # A copy: mode, device and gradients of the model given are left alone.
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False).use_index(None)
    model.memory_bank = public_bank(model.memory_bank)
    found = ", ".join(sorted({str(tensor.dtype) for tensor in model.parameters()}))
    if found != "torch.float32":
        raise ValueError(f"The model's weights are {found}; an exported model takes float32. Call model.float() first.")
    with torch.no_grad():
        expected = [_expected(model, batch, size) for batch in _CHECKED_BATCHES]
        metadata = json.dumps(_describe(model, size))
        exported = _Exported(model, top_k if with_evidence else None).eval()
        program = _trace(exported, size)
    outputs = ["logits", *(_EVIDENCE if with_evidence else ())]

    with replacing(path) as temporary:
        if format == "onnx":
            run = _write_onnx(program, temporary, outputs, metadata, opset)
        else:
            run = _write_program(program, temporary, metadata)
        votes = model.memory_args["classifier"] == "vote"
        difference = None
        if run is not None:
            difference = max(
                _difference(run(images), readout, exported.quantiles, votes, tolerance) for images, readout in expected
            )
        # Written so that NaN is refused too.
        if difference is not None and not difference <= tolerance:
            raise ExportError(
                f"What was exported differs from the model by {difference:.1e}, more than tolerance={tolerance:g}. "
                f"If its scores are large (distance='dot' or 'l2', or a large scale), rounding alone may do that: "
                f"pass a larger tolerance. Nothing was written to {str(path)!r}."
            )
        # Weights in a file of their own come first: the model that names them must not stand there without.
        for file in temporary.parent.iterdir():
            if file != temporary:
                os.replace(file, path.parent / file.name)
    return ExportReport(path, size, tuple(outputs), difference)


def default_path(source: str | os.PathLike, format: str = "onnx") -> Path:
    """Returns where the model of a folder or repository is exported to by default: its name, in the current folder."""
    check_choice("format", format, FORMATS)
    text = os.fspath(source)
    # A folder may have an "@" in its name; in a repository it begins the revision.
    name = Path(text).resolve().name if Path(text).is_dir() else Path(text.partition(":")[2] or text).name.split("@")[0]
    return Path(f"{name}{FORMATS[format]}")


def _trace(exported: nn.Module, size: tuple[int, ...]) -> ExportedProgram:
    try:
        program = torch.export.export(
            exported, (torch.zeros(_TRACED_BATCH, *size),), dynamic_shapes=({0: Dim("batch")},), strict=False
        )
    except (RuntimeError, ValueError, AssertionError) as error:
        first = str(error).strip().split("\n")[0]
        raise ExportError(f"torch.export cannot trace the model with a batch of any size: {first}") from error
    for module in program.graph_module.modules():
        for node in [*module.graph.nodes] if isinstance(module, torch.fx.GraphModule) else ():
            # It names files of this machine.
            node.meta.pop("stack_trace", None)
            # With a condition in it, the graph refuses one image alone, which it can compute: see _CHECKED_BATCHES.
            if node.target is torch.ops.aten._assert_scalar.default:
                module.graph.erase_node(node)
    # It would be the only pickle in the file.
    program.example_inputs = None
    return program


def _describe(model: MemoryWrapModel, size: tuple[int, ...]) -> dict[str, Any]:
    config, bank = data_config(model) | {"input_size": size}, model.memory_bank
    return {
        "format_version": 1,
        "architecture": model.pretrained_cfg["architecture"],
        "class_names": known_class_names(model),
        # Whether classes have a probability each, the sigmoid of the logit, instead of one of all, the softmax.
        "multi_label": model.multi_label,
        "input": {key: config[key] for key in _INPUT_KEYS},
        "memory": {"ids": bank.ids, **_labels_of(model), **asdict(bank.provenance)},
        # 0 if the memory's own samples stand in for held-out images.
        "calibrated_on": bank.reference.count,
    }


def _labels_of(model: MemoryWrapModel) -> dict[str, list[Any]]:
    """Returns labels and own predictions of the samples: a class index each, or a list of those of several classes."""
    _, labels = model.memory_bank.filled()
    if not model.multi_label:
        return {"labels": labels.tolist(), "predictions": model.own_predictions().tolist()}
    said = present(model.own_logits(torch.arange(len(labels), device=labels.device)))
    pairs = {"labels": labels, "predictions": said}
    return {name: [row.nonzero().flatten().tolist() for row in rows] for name, rows in pairs.items()}


def _write_program(program: ExportedProgram, path: Path, metadata: str) -> _Runner:
    # To memory first: on a full disk torch.export.save would abort the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{METADATA_KEY}.json": metadata})
    with zipfile.ZipFile(buffer) as file:
        for name in file.namelist():
            data = file.read(name)
            if name.endswith("_config.json"):
                pickled = any(entry.get("use_pickle", True) for entry in json.loads(data)["config"].values())
            else:
                # What torch.save writes is a zip; inputs of the trace may be written in no other way.
                pickled = data.startswith(b"PK\x03\x04") or ("/sample_inputs/" in name and len(data) > 0)
            if pickled:
                raise ExportError(f"PyTorch would write a pickle ({name}). Upgrade PyTorch, or pass format='onnx'.")
    path.write_bytes(buffer.getbuffer())
    module = torch.export.load(path).module()
    return torch.no_grad()(lambda images: list(module(images)))


def _write_onnx(
    program: ExportedProgram, path: Path, outputs: list[str], metadata: str, opset: int | None
) -> _Runner | None:
    import onnx

    for node in program.graph.nodes:
        # The exporter knows no stable sort; in ONNX each sort is.
        if node.target is torch.ops.aten.sort.stable:
            node.target = torch.ops.aten.sort.default
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "stable"}
    try:
        converted = torch.onnx.export(
            program,
            dynamic_shapes=({0: "batch"},),
            input_names=["image"],
            output_names=outputs,
            opset_version=opset,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        # The first line advises those who work on the exporter; the cause says which operation it is.
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise ExportError(f"The model cannot be converted to ONNX: {cause} Pass format='export' instead.") from error
    assert converted is not None
    converted.model.metadata_props[METADATA_KEY] = metadata
    # Weights too large for protobuf go to a file beside.
    converted.save(path)
    onnx.checker.check_model(path, full_check=True)
    try:
        import onnxruntime
    except ImportError:
        _logger.warning("%s is not checked: pip install 'timm-memwrap[onnx]' to have it run once.", path.name)
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(array) for array in session.run(None, {"image": images.numpy()})]


def _expected(model: MemoryWrapModel, batch: int, size: tuple[int, ...]) -> tuple[Tensor, MemoryReadout]:
    try:
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))
        return images, model.read(model.encode(images))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"input_size={size} does not fit: {error}. Pass (channels, height, width).") from error


def _difference(
    outputs: list[Tensor], readout: MemoryReadout, quantiles: Tensor | None, votes: bool, tolerance: float
) -> float:
    """Returns the largest difference between what a file computed and what the model read."""
    (logits, *evidence), expected = outputs, readout.logits
    if votes:
        # The logarithm of a share near zero says nothing but its rounding.
        logits, expected = logits.exp(), expected.exp()
    differences = [logits - expected]
    if quantiles is not None:
        weights, indices, similarities, familiar = evidence
        size = max(int(indices.max()) + 1, int(readout.positions.max()) + 1, weights.shape[1])
        dense, alike = (
            values.new_zeros(len(weights), size).scatter(1, readout.positions, values)
            for values in (readout.weights, readout.similarities)
        )
        # Samples that tie may come in any order: each must have its weight, and the weights be the largest.
        differences += [weights - dense.gather(1, indices), weights - dense.topk(weights.shape[1], dim=1).values]
        # Relative, since they may be distances; those without weight are not among what the model returns.
        wrong = (similarities - alike.gather(1, indices)) * (weights > 0)
        differences.append(wrong / readout.similarities.abs().amax().clamp(min=1))
        # Where the quantiles are close, familiarity makes much of rounding.
        least, most = (familiarity(readout.remainder + shift, quantiles) for shift in (tolerance, -tolerance))
        differences += [(least - familiar).clamp(min=0), (familiar - most).clamp(min=0)]
    return max(float(difference.abs().max()) for difference in differences)
