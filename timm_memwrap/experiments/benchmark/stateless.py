"""The layer that is given its memory at each call, beside the published one."""

from functools import partial

import torch

from timm_memwrap.experiments.benchmark.encodings import synthetic_encodings
from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.benchmark.subjects import CLASSES, published_layer
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.layers import MemoryWrapLayer

__all__ = ["measure_stateless"]

_BATCH_SIZE, _BANK_SIZES = 32, (1000, 10_000)


def measure_stateless(options: Options) -> list[Row]:
    """Times layers whose results are the same."""
    published = published_layer(options.width, "cosine")
    if published is None:
        return []
    ours = MemoryWrapLayer(options.width, CLASSES, head=torch.nn.Identity()).eval().to(options.device)
    ours.load_state_dict(published.state_dict())
    published.to(options.device)
    inputs = synthetic_encodings(_BATCH_SIZE, options.width, CLASSES, seed=2)[0].to(options.device)
    rows = []
    for bank_size in _BANK_SIZES:
        memory = synthetic_encodings(bank_size, options.width, CLASSES, seed=1)[0].to(options.device)
        calls: dict[str, Call] = {
            "memorywrap": partial(published, inputs, memory),
            "stateless layer": partial(ours, inputs, memory),
        }
        with torch.inference_mode():
            rows += compare_calls(
                calls,
                "stateless",
                options.rounds,
                options.device,
                {"stateless layer": 1.0},
                batch_size=_BATCH_SIZE,
                bank_size=bank_size,
                width=options.width,
            )
    return rows
