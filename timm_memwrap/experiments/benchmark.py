"""Measures what a memory costs, beside the plain backbone and the published layer, as timm's `benchmark.py` does.

All that is compared runs in one process, in turn within each round, and what counts is the median over rounds of the
ratio within a round: machines differ from each other, and from one minute to the next.
"""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.task import ClassificationTask
from torch import Tensor, nn

from timm_memwrap._utils import check_choice, check_count
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.explaining import explain
from timm_memwrap.hub import from_pretrained, push_to_hub, save_pretrained
from timm_memwrap.layers import MemoryWrapLayer
from timm_memwrap.memory_bank import Provenance
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.readouts import Read
from timm_memwrap.search import ExactIndex, FaissIndex
from timm_memwrap.training.task import MemoryWrapTask
from timm_memwrap.wrapping import wrap

__all__ = ["PARTS", "benchmark"]

_logger = logging.getLogger(__name__)

CLASSES = 10
# Memory images of the published protocol.
PUBLISHED_MEMORY = 100
# With more samples, the published layer's scores and their sort take too much time and memory.
PUBLISHED_LIMIT = 10_000

PARTS = ("inference", "read", "training", "explain", "import", "save", "push")


def benchmark(
    models: list[str] | None = None,
    img_sizes: list[int] | None = None,
    batch_sizes: list[int] | None = None,
    bank_sizes: list[int] | None = None,
    parts: list[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    rounds: int = 9,
    width: int = 512,
    indexes: list[str] | None = None,
    namespace: str = "me",
) -> list[Row]:
    """Measures what a memory costs.

    Args:
        models: Backbones; by default resnet18.
        img_sizes: Sizes of the images; by default 224.
        batch_sizes: Images at a time; by default 1 and 32. Training takes 128 of each size.
        bank_sizes: Samples in the memory; by default 1000 and 100000.
        parts: What to measure: inference, read, training, explain, import, save, push; by default all but push, which
            goes to a Hub on loopback that HF_ENDPOINT names.
        device: A torch device.
        dtype: Type of weights and images in inference: float32, bfloat16 or float16.
        rounds: How often each thing is measured.
        width: Width of the encodings where the read alone is measured.
        indexes: faiss indexes to read through as well: flat, ivf, hnsw. Building one of a million keys takes minutes.
        namespace: Owner of the repositories that a push creates.
    """
    parts = parts or list(PARTS[:-1])
    for part in parts:
        check_choice("part", part, PARTS)
    check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
    check_count("rounds", rounds)
    bank_sizes = bank_sizes or [1000, 100_000]
    rows: list[Row] = []
    for name in models or ["resnet18"]:
        for img_size in img_sizes or [224]:
            if "inference" in parts:
                for batch_size, bank_size in product(batch_sizes or [1, 32], bank_sizes):
                    rows += _inference(name, img_size, batch_size, bank_size, device, getattr(torch, dtype), rounds)
            if "explain" in parts:
                rows += _explaining(name, img_size, device, rounds)
            if "training" in parts:
                rows += _training(name, img_size, device, rounds)
        if "save" in parts:
            rows += _saving(name, rounds)
        if "push" in parts:
            rows += _pushing(name, rounds, namespace)
    if "read" in parts:
        for bank_size in bank_sizes:
            rows += _reading(bank_size, width, 32, device, rounds, indexes or [])
        rows += _against_published(width, device, rounds)
    if "import" in parts:
        rows += _importing(rounds)
    return rows


def _clustered(size: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns encodings `[M, D]` near their classes' prototypes, as real encoders give them, and labels `[M]`."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(size) % CLASSES
    return prototypes[labels] + torch.randn(size, width, generator=generator), labels


def _filled(model: nn.Module, size: int) -> MemoryWrapModel:
    assert isinstance(model, MemoryWrapModel)
    encodings, labels = _clustered(size, model.encoding_size, 1)
    provenance = Provenance(encoder=model.encoder_fingerprint())
    model.memory_bank.replace(encodings, labels, range(size), provenance=provenance)
    return model.to(next(model.parameters()).device).eval()


def _published(width: int, distance: str) -> nn.Module | None:
    """Returns the published layer; `None` if `memorywrap` is not installed."""
    if find_spec("memorywrap") is None:
        _logger.warning("memorywrap is not installed, so it is not compared: pip install memorywrap.")
        return None
    from memorywrap import MemoryWrapLayer as PublishedLayer

    return PublishedLayer(width, CLASSES, distance=distance).eval()


def _inference(
    name: str, img_size: int, batch_size: int, bank_size: int, device: str, dtype: torch.dtype, rounds: int
) -> list[Row]:
    torch.manual_seed(0)
    plain: Any = timm.create_model(name, num_classes=CLASSES).eval().to(device, dtype)
    wrapped = _filled(wrap(plain), bank_size)
    headed = _filled(timm.create_model(f"memwrap_{name}", num_classes=CLASSES).to(device, dtype), bank_size)
    images = torch.randn(batch_size, plain.in_chans, img_size, img_size, device=device, dtype=dtype)
    calls: dict[str, Call] = {
        "plain backbone": lambda: plain(images),
        "wrapped classifier": lambda: wrapped(images),
        "published head, kept memory": lambda: headed(images),
    }
    layer = _published(headed.encoding_size, "cosine")
    if layer is not None and dtype == torch.float32:
        layer, encode = layer.to(device), headed.encode
        shown = torch.randn(PUBLISHED_MEMORY, *images.shape[1:], device=device)
        what = f"memorywrap, {PUBLISHED_MEMORY} images encoded at each call"
        calls[what] = lambda: layer(encode(images), encode(shown))
        if bank_size <= PUBLISHED_LIMIT:
            kept = headed.memory_bank.encodings
            calls["memorywrap, cached encodings"] = lambda: layer(encode(images), kept)
    limits = {(1000, True): 1.02, (1000, False): 1.05, (100_000, True): 1.05, (100_000, False): 1.5}
    limit = limits.get((bank_size, batch_size >= 32)) if name == "resnet18" else None
    setting: dict[str, Any] = {"model": name, "img_size": img_size, "batch_size": batch_size, "bank_size": bank_size}
    budgets = {"wrapped classifier": limit, "published head, kept memory": limit}
    with torch.inference_mode():
        return compare_calls(calls, "inference", rounds, device, budgets, **setting)


def _reading(bank_size: int, width: int, batch_size: int, device: str, rounds: int, indexes: list[str]) -> list[Row]:
    """Times the read alone beside its matrix product, the least that an exact read takes."""
    layer = MemoryWrapLayer(width, CLASSES, head=nn.Identity(), scale=10.0).eval().to(device)
    encodings, labels = _clustered(bank_size, width, 1)
    with torch.no_grad():
        memory = layer.prepare(encodings.to(device))
        query = layer.query(_clustered(batch_size, width, 2)[0].to(device))
        reads: dict[str, Any] = {"exact read": memory._replace(key_index=ExactIndex(memory.keys))}
        for kind in indexes:
            reads[f"faiss {kind}"] = memory._replace(key_index=FaissIndex(memory.keys, kind))
        calls: dict[str, Call] = {"matrix product": lambda: query @ memory.keys.vectors.T}
        calls |= {what: partial(layer.read, query, searched) for what, searched in reads.items()}
        budgets = {"exact read": 1.5 if bank_size >= 1_000_000 else None}
        rows = compare_calls(calls, "read", rounds, device, budgets, batch_size=batch_size, bank_size=bank_size)
        weights = {what: _dense(layer.read(query, searched), bank_size) for what, searched in reads.items()}
    exact = weights["exact read"]
    approximate = {what: _quality(exact, found, labels) for what, found in weights.items() if found is not exact}
    return [replace(row, **approximate.get(row.what, {})) for row in rows]


def _dense(found: Read, size: int) -> Tensor:
    weights, positions = found.weights.cpu(), found.positions.cpu()
    return torch.zeros(len(weights), size).scatter_add(1, positions, weights)


def _quality(exact: Tensor, found: Tensor, labels: Tensor) -> dict[str, Any]:
    of_class = F.one_hot(labels).float()
    agrees = (exact @ of_class).argmax(dim=1) == (found @ of_class).argmax(dim=1)
    return {"recall": float((exact * (found > 0)).sum() / len(exact)), "agreement": float(agrees.float().mean())}


def _against_published(width: int, device: str, rounds: int) -> list[Row]:
    """Times a read as the published layer computes it, of a memory for which its `[B, M, D]` fits (2.6 GB)."""
    layer = _published(width, "l2")
    if layer is None:
        return []
    ours = MemoryWrapLayer(width, CLASSES, head=nn.Identity(), distance="l2").eval().to(device)
    ours.load_state_dict(layer.state_dict())
    layer = layer.to(device)
    encodings = _clustered(PUBLISHED_LIMIT, width, 1)[0].to(device)
    queries = _clustered(128, width, 2)[0].to(device)
    with torch.inference_mode():
        memory = ours.prepare(encodings)
        memory = memory._replace(key_index=ExactIndex(memory.keys))
        calls: dict[str, Call] = {
            "memorywrap, l2": lambda: layer(queries, encodings),
            "exact read, l2": lambda: ours.classify(queries, ours.read(ours.query(queries), memory).vector),
        }
        setting: dict[str, Any] = {"batch_size": 128, "bank_size": PUBLISHED_LIMIT}
        return compare_calls(calls, "read", max(1, rounds // 3), device, {"exact read, l2": 1 / 50}, **setting)


def _training(name: str, img_size: int, device: str, rounds: int) -> list[Row]:
    batch_size = 128
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    memory = torch.randn(PUBLISHED_MEMORY, 3, img_size, img_size, device=device)
    labels = torch.arange(batch_size, device=device) % CLASSES

    def step(model_name: str, **extra: Tensor) -> Call:
        torch.manual_seed(0)
        model = timm.create_model(model_name, num_classes=CLASSES).train().to(device)
        kind = MemoryWrapTask if isinstance(model, MemoryWrapModel) else ClassificationTask
        task = kind(model, device=torch.device(device), verbose=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

        def run() -> None:
            task(images, labels, **extra)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    calls = {
        "plain backbone": step(name),
        "memory from the batch": step(f"memwrap_{name}"),
        "memory from the queue": step(f"memwrap_{name}", positions=torch.arange(batch_size, device=device)),
        f"paper's protocol, {PUBLISHED_MEMORY} images": step(f"memwrap_{name}", memory=memory),
    }
    setting: dict[str, Any] = {"model": name, "img_size": img_size, "batch_size": batch_size}
    return compare_calls(calls, "training", rounds, device, {"memory from the batch": 1.05}, **setting)


def _explaining(name: str, img_size: int, device: str, rounds: int) -> list[Row]:
    """Times an explanation beside the prediction that it explains."""
    batch_size, bank_size = 32, 1000
    wrapped = _filled(wrap(timm.create_model(name, num_classes=CLASSES).to(device)), bank_size)
    images = torch.randn(batch_size, wrapped.in_chans, img_size, img_size, device=device)
    calls: dict[str, Call] = {"prediction": lambda: wrapped(images), "explanation": lambda: explain(wrapped, images)}
    setting: dict[str, Any] = {"model": name, "img_size": img_size, "batch_size": batch_size, "bank_size": bank_size}
    with torch.inference_mode():
        return compare_calls(calls, "explain", rounds, device, {"explanation": 1.2}, **setting)


def _saving(name: str, rounds: int) -> list[Row]:
    """Times saving and loading beside timm's own of the backbone and a raw write and read of the bank."""
    size, kept = 10_000, "model with its memory"
    plain = timm.create_model(name, num_classes=CLASSES).eval()
    # Without a head of its own, it holds what the two files beside it hold.
    options: Mapping[str, Any] = {"num_classes": CLASSES, "read_head": "identity", "classifier": "linear"}
    headed = _filled(timm.create_model(f"memwrap_baseline_{name}", **options), size)
    raw = dict(zip(("encodings", "labels"), headed.memory_bank.filled(), strict=True))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, file = Path(folder, "theirs"), Path(folder, "ours"), Path(folder, "bank.safetensors")

        def save_raw() -> None:
            save_for_hf(plain, str(theirs), safe_serialization=True)
            save_file(raw, file)

        def load_raw() -> None:
            timm.create_model(f"local-dir:{theirs}", pretrained=True)
            load_file(file)

        saves: dict[str, Call] = {"timm, and the bank raw": save_raw, kept: lambda: save_pretrained(headed, ours)}
        loads: dict[str, Call] = {"timm, and the bank raw": load_raw, kept: lambda: from_pretrained(ours)}
        for verb, both in (("save", saves), ("load", loads)):
            calls = {f"{verb}: {what}": call for what, call in both.items()}
            rows += compare_calls(calls, "save", rounds, budgets={f"{verb}: {kept}": 1.3}, model=name, bank_size=size)
    return rows


def _pushing(name: str, rounds: int, namespace: str) -> list[Row]:
    """Times a push beside saving the same to the disk."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if not endpoint.startswith(("http://127.", "http://localhost")):
        raise ValueError(
            f"HF_ENDPOINT={endpoint!r}: the benchmark pushes to a Hub on loopback only. Start one, and set HF_ENDPOINT."
        )
    model = _filled(timm.create_model(f"memwrap_{name}", num_classes=CLASSES), 10_000)
    numbers = count()
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Call] = {
            "save": lambda: save_pretrained(model, folder),
            "push": lambda: push_to_hub(model, f"{namespace}/benchmark-{next(numbers)}"),
        }
        return compare_calls(calls, "push", rounds, model=name, bank_size=10_000)


def _importing(rounds: int) -> list[Row]:
    """Times what the import adds to timm's, in new processes, each of which times its own."""

    def run(before: str, module: str) -> float:
        code = f"import {before}; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    calls: dict[str, Call] = {
        "import timm": partial(run, "time", "timm"),
        "import timm_memwrap after it": partial(run, "time, timm", "timm_memwrap"),
    }
    return compare_calls(calls, "import", rounds, clock=lambda call, device: call())
