"""What a memory of a data set costs, up to ImageNet's size."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_memwrap.experiments.benchmark.building import measure_building
from timm_memwrap.experiments.benchmark.disk import DISK_BUDGET, Folder
from timm_memwrap.experiments.benchmark.encodings import synthetic_encodings
from timm_memwrap.experiments.benchmark.explaining import EXPLAIN_BUDGET
from timm_memwrap.experiments.benchmark.extrapolation import measured_or_extrapolated
from timm_memwrap.experiments.benchmark.options import Options, Size
from timm_memwrap.experiments.benchmark.peak import Needed, measure_peak
from timm_memwrap.experiments.benchmark.reading import read_budget
from timm_memwrap.experiments.benchmark.subjects import backbone, filled
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.explaining import explain
from timm_memwrap.hub import save_pretrained
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.wrapping import wrap

__all__ = ["measure_sizes"]

_READ_BATCHES, _BATCH_SIZE = (1, 32, 256), 32
# Most images that a memory is built from.
_BUILT = 10_000

_Compare = Callable[..., list[Row]]


def measure_sizes(options: Options) -> list[Row]:
    """Measures saving, loading, first and later reads, explanations and building for each size."""
    rows = []
    for name in options.backbones:
        # Several sizes may be extrapolated from the same.
        keep, build = (cache(partial(measure, options, name)) for measure in (_measure_kept, _measure_built))
        for size in map(Size.parse, options.sizes):
            rows += measured_or_extrapolated(partial(keep, size.classes), size.samples, options.largest)
            rows += measured_or_extrapolated(partial(build, size.classes), size.samples, min(options.largest, _BUILT))
    # A goal of large memories alone, which the measured ones may not have been.
    return [
        replace(row, budget=read_budget(row.batch_size or 0, row.bank_size or 0)) if row.what == "read" else row
        for row in rows
    ]


def _measure_built(options: Options, name: str, classes: int, samples: int) -> list[Row]:
    plain = backbone(name, options.img_sizes[0], classes).eval().to(options.device)
    return measure_building(plain, options, _setting(name, plain.num_features, classes, samples))


def _measure_kept(options: Options, name: str, classes: int, samples: int) -> list[Row]:
    """Measures what a memory costs once it is built."""
    torch.manual_seed(0)
    plain = backbone(name, options.img_sizes[0], classes).eval().to(options.device)
    model = filled(wrap(plain), samples, classes)
    compare: _Compare = partial(
        compare_calls,
        part="sizes",
        device=options.device,
        **_setting(name, model.encoding_size, classes, samples),
    )
    # Of what takes long, fewer rounds.
    few = max(1, options.rounds // 3)
    with tempfile.TemporaryDirectory() as path:
        rows, needed = _measure_disk(Path(path), plain, model, compare, few)
    # What a checkpoint, or an average of the weights, asks for at each step.
    states: dict[str, Call] = {"state dict: plain backbone": plain.state_dict, "state dict": model.state_dict}
    rows += compare(states, rounds=options.rounds)
    with torch.inference_mode():
        first, *reads = _measure_reads(model, options, compare)
        images = torch.randn(_BATCH_SIZE, plain.in_chans, *[options.img_sizes[0]] * 2, device=options.device)
        calls: dict[str, Call] = {"prediction": lambda: model(images), "explanation": lambda: explain(model, images)}
        budgets = {"explanation": EXPLAIN_BUDGET}
        explained = compare(calls, rounds=few, budgets=budgets, batch_size=_BATCH_SIZE)
    return [*rows, replace(first, peak_ratio=needed.reading), *reads, *explained]


def _setting(name: str, width: int, classes: int, samples: int) -> dict[str, Any]:
    return {"model": name, "width": width, "classes": classes, "bank_size": samples}


def _measure_disk(
    path: Path, plain: Any, model: MemoryWrapModel, compare: _Compare, rounds: int
) -> tuple[list[Row], Needed]:
    samples, folder = len(model.memory_bank), Folder(str(path), plain, model)
    saves, loads = folder.saves(), folder.loads()
    raw_save, save = compare(saves, rounds=rounds, budgets=dict.fromkeys(list(saves)[1:], DISK_BUDGET))
    raw_load, load = compare(loads, rounds=rounds, budgets=dict.fromkeys(list(loads)[1:], DISK_BUDGET))
    small = save_pretrained(filled(wrap(plain), model.num_classes, model.num_classes), path / "small")
    needed = measure_peak(small, folder.ours)
    save = replace(save, bytes_per_sample=(_bytes(folder.ours) - _bytes(folder.theirs)) / samples)
    load = replace(load, bytes_per_sample=needed.bytes / samples, peak_ratio=needed.loading)
    return [raw_save, save, raw_load, load], needed


def _measure_reads(model: MemoryWrapModel, options: Options, compare: _Compare) -> list[Row]:
    """Times the first read and later ones beside a float32 product with as many numbers as their keys have."""
    inputs = synthetic_encodings(max(_READ_BATCHES), model.encoding_size, model.num_classes, seed=2)[0]
    inputs = inputs.to(options.device)
    queries = model.head.query(inputs)
    vectors = torch.rand(len(model.memory_bank), queries.shape[1], device=options.device)

    def product(count: int) -> Tensor:
        return queries[:count] @ vectors.T

    def first_read() -> None:
        # What was made of the bank is dropped in training.
        model.train().eval().read(inputs[:_BATCH_SIZE])

    calls: dict[str, Call] = {"float32 product": partial(product, _BATCH_SIZE), "first read": first_read}
    # Its product is that of later reads of as many inputs.
    rows = compare(calls, rounds=max(1, options.rounds // 3), batch_size=_BATCH_SIZE)[1:]
    for count in _READ_BATCHES:
        calls = {"float32 product": partial(product, count), "read": partial(model.read, inputs[:count])}
        rows += compare(calls, rounds=options.rounds, batch_size=count)
    return rows


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
