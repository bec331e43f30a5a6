"""The read alone, beside its matrix product, the published layer and what else finds nearest samples."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_memwrap.experiments.benchmark.encodings import synthetic_encodings
from timm_memwrap.experiments.benchmark.options import INDEXES, Options
from timm_memwrap.experiments.benchmark.peers import Search, peers
from timm_memwrap.experiments.benchmark.subjects import CLASSES, PUBLISHED_LIMIT, missing_of, published_layer
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.layers import MemoryWrapLayer
from timm_memwrap.search import FaissIndex, exact_index

__all__ = ["measure_reading", "read_budget"]


def read_budget(batch_size: int, bank_size: int) -> float | None:
    """Returns the largest ratio of an exact read to the float32 product."""
    return 0.25 if batch_size == 1 and bank_size >= 1_000_000 else None


def measure_reading(options: Options) -> list[Row]:
    """Times an exact read, and searches for the nearest samples."""
    rows = [row for bank_size in options.bank_sizes for row in _compare(options, bank_size)]
    return rows + _against_published(options)


def _compare(options: Options, bank_size: int) -> list[Row]:
    device, rows = options.device, list[Row]()
    layer = MemoryWrapLayer(options.width, CLASSES, head=nn.Identity(), scale=10.0).eval().to(device)
    encodings, labels = synthetic_encodings(bank_size, options.width, CLASSES, seed=1)
    vectors = F.normalize(encodings)
    with torch.no_grad(), peers(options, vectors, labels) as searches:
        memory = layer.prepare(encodings.to(device))
        indexes: dict[str, Any] = {"exact read": exact_index(memory.keys)}
        indexes |= {f"faiss {kind}": FaissIndex(memory.keys, kind) for kind in _indexes(options)}
        reads: dict[str, Search] = {
            what: partial(layer.read, memory=memory._replace(key_index=index)) for what, index in indexes.items()
        }
        for batch_size in options.batch_sizes:
            inputs = synthetic_encodings(batch_size, options.width, CLASSES, seed=2)[0]
            query = layer.query(inputs.to(device))
            rows += _compare_batch(options, reads, searches, vectors.to(device), labels, query)
    return rows


def _compare_batch(
    options: Options,
    reads: Mapping[str, Search],
    searches: Mapping[str, Search],
    vectors: Tensor,
    labels: Tensor,
    query: Tensor,
) -> list[Row]:
    calls: dict[str, Call] = {"matrix product": lambda: query @ vectors.T}
    calls |= {what: partial(search, query) for what, search in {**reads, **searches}.items()}
    budgets = {"exact read": read_budget(len(query), len(vectors))}
    setting: dict[str, Any] = {"batch_size": len(query), "bank_size": len(vectors), "width": options.width}
    rows = compare_calls(calls, "read", options.rounds, options.device, budgets, **setting)
    weights = {what: _dense(read(query), len(vectors)) for what, read in reads.items()}
    exact = weights.pop("exact read")
    approximate = {what: _quality(exact, found, labels) for what, found in weights.items()}
    return [replace(row, **approximate.get(row.what, {})) for row in rows]


def _indexes(options: Options) -> list[str]:
    """Returns the faiss indexes to read through, which are for a CPU."""
    kinds = [kind for kind in options.peers if kind in INDEXES and options.device == "cpu"]
    return [] if kinds and missing_of("faiss") else kinds


def _dense(found: Any, size: int) -> Tensor:
    """Returns the weights `[B, M]` of all samples."""
    weights, positions = found.weights.cpu(), found.positions.cpu()
    return torch.zeros(len(weights), size).scatter_add(1, positions, weights)


def _quality(exact: Tensor, found: Tensor, labels: Tensor) -> dict[str, Any]:
    of_class = F.one_hot(labels).float()
    agrees = (exact @ of_class).argmax(dim=1) == (found @ of_class).argmax(dim=1)
    return {"recall": float((exact * (found > 0)).sum() / len(exact)), "agreement": float(agrees.float().mean())}


def _against_published(options: Options) -> list[Row]:
    """Times a read as the published layer computes it, of a memory for which its `[B, M, D]` fits (2.6 GB)."""
    device, width, batch_size = options.device, options.width, 128
    layer = published_layer(width, "l2")
    if layer is None:
        return []
    ours = MemoryWrapLayer(width, CLASSES, head=nn.Identity(), distance="l2").eval().to(device)
    ours.load_state_dict(layer.state_dict())
    layer = layer.to(device)
    encodings = synthetic_encodings(PUBLISHED_LIMIT, width, CLASSES, seed=1)[0].to(device)
    queries = synthetic_encodings(batch_size, width, CLASSES, seed=2)[0].to(device)
    with torch.inference_mode():
        memory = ours.prepare(encodings)
        memory = memory._replace(key_index=exact_index(memory.keys))
        calls: dict[str, Call] = {
            "memorywrap, l2": lambda: layer(queries, encodings),
            "exact read, l2": lambda: ours.classify(queries, ours.read(ours.query(queries), memory).vector),
        }
        setting: dict[str, Any] = {"batch_size": batch_size, "bank_size": PUBLISHED_LIMIT, "width": width}
        return compare_calls(calls, "read", max(1, options.rounds // 3), device, {"exact read, l2": 1 / 50}, **setting)
