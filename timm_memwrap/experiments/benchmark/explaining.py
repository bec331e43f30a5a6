"""An explanation beside the prediction that it explains."""

from itertools import product
from typing import Any

import torch

from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.benchmark.subjects import backbone, filled
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.explaining import explain
from timm_memwrap.wrapping import wrap

__all__ = ["EXPLAIN_BUDGET", "measure_explaining"]

EXPLAIN_BUDGET = 1.2
_BATCH_SIZE, _BANK_SIZE = 32, 1000


def measure_explaining(options: Options) -> list[Row]:
    """Times explanations."""
    return [row for each in product(options.backbones, options.img_sizes) for row in _compare(options, *each)]


def _compare(options: Options, name: str, img_size: int) -> list[Row]:
    wrapped = filled(wrap(backbone(name, img_size).to(options.device)), _BANK_SIZE)
    images = torch.randn(_BATCH_SIZE, wrapped.in_chans, img_size, img_size, device=options.device)
    calls: dict[str, Call] = {"prediction": lambda: wrapped(images), "explanation": lambda: explain(wrapped, images)}
    setting: dict[str, Any] = {"model": name, "img_size": img_size, "batch_size": _BATCH_SIZE, "bank_size": _BANK_SIZE}
    budgets = {"explanation": EXPLAIN_BUDGET}
    with torch.inference_mode():
        return compare_calls(calls, "explain", options.rounds, options.device, budgets, **setting)
