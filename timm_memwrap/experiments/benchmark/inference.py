"""A prediction beside that of the plain backbone."""

from itertools import product
from typing import Any

import torch

from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.benchmark.subjects import (
    PUBLISHED_LIMIT,
    PUBLISHED_MEMORY,
    backbone,
    filled,
    published_layer,
)
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.wrapping import wrap

__all__ = ["measure_inference"]

# By samples in the memory, and whether 32 images at a time.
_BUDGETS = {(1000, True): 1.02, (1000, False): 1.035, (100_000, True): 1.02, (100_000, False): 1.25}


def measure_inference(options: Options) -> list[Row]:
    """Times predictions, and again with gradients enabled."""
    combinations = product(options.backbones, options.img_sizes, options.batch_sizes, options.bank_sizes)
    return [row for each in combinations for row in _compare(options, *each)]


def _compare(options: Options, name: str, img_size: int, batch_size: int, bank_size: int) -> list[Row]:
    torch.manual_seed(0)
    device, dtype = options.device, options.torch_dtype
    plain = backbone(name, img_size).eval().to(device, dtype)
    wrapped = filled(wrap(plain), bank_size)
    headed = filled(backbone(name, img_size, prefix="memwrap_").to(device, dtype), bank_size)
    images = torch.randn(batch_size, plain.in_chans, img_size, img_size, device=device, dtype=dtype)
    calls: dict[str, Call] = {
        "plain backbone": lambda: plain(images),
        "wrapped classifier": lambda: wrapped(images),
        "published head, kept memory": lambda: headed(images),
    }
    limit = _BUDGETS.get((bank_size, batch_size >= 32)) if name == "resnet18" else None
    setting: dict[str, Any] = {"model": name, "img_size": img_size, "batch_size": batch_size, "bank_size": bank_size}
    tracked = {f"{what}, gradients enabled": call for what, call in calls.items()}
    layer = published_layer(headed.encoding_size, "cosine")
    if layer is not None and dtype == torch.float32:
        layer, encode = layer.to(device), headed.encode
        shown = torch.randn(PUBLISHED_MEMORY, *images.shape[1:], device=device)
        what = f"memorywrap, {PUBLISHED_MEMORY} images encoded at each call"
        calls[what] = lambda: layer(encode(images), encode(shown))
        if bank_size <= PUBLISHED_LIMIT:
            kept = headed.memory_bank.encodings
            calls["memorywrap, cached encodings"] = lambda: layer(encode(images), kept)
    budgets = dict.fromkeys(list(calls)[1:3], limit)
    with torch.inference_mode():
        rows = compare_calls(calls, "inference", options.rounds, device, budgets, **setting)
    budgets = dict.fromkeys(list(tracked)[1:], limit)
    return rows + compare_calls(tracked, "inference", options.rounds, device, budgets, **setting)
