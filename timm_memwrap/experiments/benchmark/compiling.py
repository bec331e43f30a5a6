"""Compiled and exported models with a memory, beside the plain backbone compiled or exported alike."""

import logging
import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.benchmark.subjects import backbone, filled, missing_of
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.exporting import export_model
from timm_memwrap.wrapping import wrap

__all__ = ["export_plain", "measure_compiled", "measure_onnx"]

_logger = logging.getLogger(__name__)

# By samples in the memory.
_BUDGETS = {1000: 1.05, 100_000: 1.15}
# What the first call leaves in a model may have the second one compiled again.
_CALLS_THAT_COMPILE = 3
_COMPILED_BATCH, _ONNX_BATCHES = 8, (1, 8)


def measure_compiled(options: Options) -> list[Row]:
    """Times predictions of compiled models."""
    if not _can_compile(options.device):
        return []
    rows = []
    for name, img_size, bank_size in product(options.backbones, options.img_sizes, options.bank_sizes):
        # What was compiled before would count against the limit of recompilations.
        torch.compiler.reset()
        plain = backbone(name, img_size).eval().to(options.device)
        images = _images(plain, _COMPILED_BATCH, img_size, options.device)
        models = {"compiled plain backbone": plain, "compiled wrapped classifier": filled(wrap(plain), bank_size)}
        calls = {what: _prediction(torch.compile(model), images) for what, model in models.items()}
        for call, _ in product(calls.values(), range(_CALLS_THAT_COMPILE)):
            call()
        rows += _compare(calls, "compiled", options, name, img_size, _COMPILED_BATCH, bank_size)
    return rows


def measure_onnx(options: Options) -> list[Row]:
    """Times predictions of exported models in ONNX Runtime, on the CPU, and measures what the memory adds to a file."""
    if missing_of("onnx", "onnxscript", "onnxruntime"):
        return []
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    on_cpu = replace(options, device="cpu")
    settings.intra_op_num_threads = torch.get_num_threads()
    rows = []
    for name, img_size, bank_size in product(options.backbones, options.img_sizes, options.bank_sizes):
        plain = backbone(name, img_size).eval()
        wrapped = filled(wrap(plain), bank_size)
        size = (plain.in_chans, img_size, img_size)
        with tempfile.TemporaryDirectory() as folder:
            files = {"exported plain backbone": Path(folder, "plain.onnx")}
            files["exported wrapped classifier"] = Path(folder, "wrapped.onnx")
            export_plain(plain, size, files["exported plain backbone"])
            # What is drawn here is not what the classifier was trained on, so its logits may be large.
            export_model(wrapped, files["exported wrapped classifier"], input_size=size, tolerance=1e-2)
            sessions = {
                what: onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
                for what, path in files.items()
            }
            # Large weights are in a file beside.
            sizes = [sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*")) for path in files.values()]
            for batch_size in _ONNX_BATCHES:
                images = {"image": _images(plain, batch_size, img_size, "cpu").numpy()}
                calls: dict[str, Call] = {
                    what: partial(session.run, None, images) for what, session in sessions.items()
                }
                first, second = _compare(calls, "onnx", on_cpu, name, img_size, batch_size, bank_size)
                rows += [first, replace(second, bytes_per_sample=(sizes[1] - sizes[0]) / bank_size)]
    return rows


def _can_compile(device: str) -> bool:
    if device != "cpu":
        return not missing_of("triton")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if any(shutil.which(compiler) for compiler in compilers):
        return True
    _logger.warning("No C++ compiler (%s), so compiled models are not measured.", " or ".join(compilers))
    return False


def _prediction(model: Any, images: Tensor) -> Call:
    def predict() -> Tensor:
        with torch.no_grad():
            return model(images)

    return predict


def _images(model: Any, batch_size: int, img_size: int, device: str) -> Tensor:
    return torch.randn(batch_size, model.in_chans, img_size, img_size, device=device)


def export_plain(model: nn.Module, size: tuple[int, ...], path: Path) -> None:
    """Exports a model without a memory as `export_model` does one with."""
    with torch.no_grad():
        torch.onnx.export(
            model,
            (torch.zeros(2, *size),),
            path,
            dynamo=True,
            dynamic_shapes=({0: Dim("batch")},),
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )


def _compare(
    calls: dict[str, Call], part: str, options: Options, name: str, img_size: int, batch_size: int, bank_size: int
) -> list[Row]:
    budgets = dict.fromkeys(list(calls)[1:], _BUDGETS.get(bank_size))
    setting: dict[str, Any] = {"model": name, "img_size": img_size, "batch_size": batch_size, "bank_size": bank_size}
    return compare_calls(calls, part, options.rounds, options.device, budgets, **setting)
