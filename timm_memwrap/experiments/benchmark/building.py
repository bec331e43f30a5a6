"""Building a memory beside one plain pass over the data."""

from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_memwrap.building import build_memory_bank
from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.timing import Call, Row, Seconds, compare_times, measure
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.wrapping import wrap

__all__ = ["measure_building"]

_BUDGET = 1.05
_BATCH_SIZE = 32
_PIXELS = 16


def measure_building(plain: Any, options: Options, setting: dict[str, Any]) -> list[Row]:
    """Times building a memory of all samples of a data set, from parts that are measured in turn.

    To encode all images with the backbone itself would take hours, and hide the rest. So a pass is that many times the
    backbone's time for an image, and what building adds to it is taken from an encoder that costs next to nothing.
    """
    samples, classes, device = setting["bank_size"], setting["classes"], options.device
    free = _free_encoder(setting["width"], classes).to(device)
    # The data are on the CPU, as an image folder's are.
    labels = torch.arange(samples) % classes
    data = TensorDataset(torch.randn(samples, 3, _PIXELS, _PIXELS), labels)
    images = torch.randn(_BATCH_SIZE, plain.in_chans, *[options.img_sizes[0]] * 2, device=device)

    def plain_pass() -> None:
        for batch, _ in DataLoader(data, _BATCH_SIZE):
            free.encode(batch.to(device))

    calls: dict[str, Call] = {
        "backbone": lambda: plain(images),
        "pass": plain_pass,
        "build": lambda: build_memory_bank(free, data, selection="all", progress=False),
    }
    with torch.no_grad():
        times = measure(calls, max(1, options.rounds // 3), device)
    parts = zip(*times.values(), strict=True)
    times = {"plain pass": [], "build": []}
    for batch, passed, built in parts:
        times["plain pass"].append(_sum((samples / _BATCH_SIZE, batch)))
        times["build"].append(_sum((samples / _BATCH_SIZE, batch), (1, built), (-1, passed)))
    return compare_times(times, "sizes", {"build": _BUDGET}, **setting)


def _free_encoder(width: int, classes: int) -> MemoryWrapModel:
    """Returns a model whose encoder is one linear layer on one patch, and whose encodings have this width."""
    options: dict[str, Any] = {"img_size": _PIXELS, "depth": 0, "num_heads": 1, "class_token": False}
    plain: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=classes, embed_dim=width, global_pool="avg", **options
    )
    model = wrap(plain)
    # With names of its own, nobody wonders whether its classifier, which is not trained, numbers them otherwise.
    model.pretrained_cfg["label_names"] = list(map(str, range(classes)))
    return model.eval()


def _sum(*terms: tuple[float, Seconds]) -> Seconds:
    """Returns the sum of times, each with its factor."""
    known = all(part.process is not None for _, part in terms)
    return Seconds(
        sum(factor * part.wall for factor, part in terms),
        sum(factor * (part.process or 0.0) for factor, part in terms) if known else None,
    )
