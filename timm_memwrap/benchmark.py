"""What a memory costs, beside the plain backbone and the published layer, in the manner of timm's `benchmark.py`.

`python -m timm_memwrap.benchmark --help`. All that is compared runs in one process, one after the other in each round,
and what counts is the median over rounds of the ratio within a round: machines differ, and are not alike from one
minute to the next.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from timm.models import save_for_hf
from timm.task import ClassificationTask
from torch import Tensor, nn

import timm_memwrap
from timm_memwrap import MemoryBank, MemoryWrapModel
from timm_memwrap.files import write_text
from timm_memwrap.memory_bank import Provenance
from timm_memwrap.memory_index import MemoryIndex
from timm_memwrap.training.task import MemoryWrapTask

__all__ = ["Row", "benchmark", "main", "plot_rows", "table"]

_logger = logging.getLogger(__name__)

CLASSES = 10
# Memory images of the published protocol.
PUBLISHED_MEMORY = 100
# Beyond this, the published layer's scores and their sort take all there is of time and memory.
PUBLISHED_LIMIT = 10_000

PARTS = ("inference", "read", "training", "explain", "import", "save", "push")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        part: What was measured: one of `PARTS`.
        what: Which of the things compared.
        model: The backbone.
        img_size: Side of the images.
        batch_size: Images, or queries, at a time.
        bank_size: Samples in the memory.
        milliseconds: Median time.
        ratio: Median over rounds of the time divided by the anchor's in the same round.
        anchor: What it is divided by.
        budget: Largest ratio that the project allows itself, if there is one.
        recall: Of an approximate read, the share of the exact weights that it finds.
        agreement: Of an approximate read, the share of queries for which the same class has most weight.
    """

    part: str
    what: str
    model: str
    img_size: int | None
    batch_size: int | None
    bank_size: int | None
    milliseconds: float
    ratio: float
    anchor: str
    budget: float | None = None
    recall: float | None = None
    agreement: float | None = None


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
        models: Backbones; resnet18 if none are given.
        img_sizes: Sides of the images; 224 if none are given.
        batch_sizes: Images at a time; 1 and 32 if none are given. Training takes 128 for each image size.
        bank_sizes: Samples in the memory; 1000 and 100000 if none are given.
        parts: What to measure: inference, read, training, explain, import, save, push; all but push if none are given.
            A push goes to the Hub on loopback that HF_ENDPOINT names.
        device: A torch device.
        dtype: Type of weights and images in inference: float32, bfloat16 or float16.
        rounds: How often each thing is measured.
        width: Width of the encodings in the measurement of the read alone.
        indexes: faiss indexes to read through as well: flat, ivf, hnsw; none if none are given. Building one of a
            million keys takes minutes.
        namespace: Whose repositories a push makes.

    Raises:
        ValueError: If an argument is unknown.
    """
    parts = list(parts or PARTS[:-1])
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"Unknown parts {unknown}. Pass any of {', '.join(PARTS)}.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"Unknown dtype={dtype!r}. Pass float32, bfloat16 or float16.")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}. Pass 1 or more.")
    rows: list[Row] = []
    for name in models or ["resnet18"]:
        for img_size in img_sizes or [224]:
            if "inference" in parts:
                for batch_size in batch_sizes or [1, 32]:
                    for bank_size in bank_sizes or [1000, 100_000]:
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
        for bank_size in bank_sizes or [1000, 100_000]:
            rows += _reading(bank_size, width, 32, device, rounds, indexes or [])
        rows += _against_published(width, device, rounds)
    if "import" in parts:
        rows += _importing(rounds)
    return rows


def measure(calls: dict[str, Call], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Times each call once a round, in turn, after a first one that does not count; in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if i:
                times[name].append((time.perf_counter() - start) * 1000)
    return times


def _rows(
    times: dict[str, list[float]],
    part: str,
    anchor: str,
    budgets: dict[str, float] | None = None,
    model: str = "",
    img_size: int | None = None,
    batch_size: int | None = None,
    bank_size: int | None = None,
) -> list[Row]:
    return [
        Row(
            part=part,
            what=what,
            model=model,
            img_size=img_size,
            batch_size=batch_size,
            bank_size=bank_size,
            milliseconds=statistics.median(values),
            ratio=statistics.median(a / b for a, b in zip(values, times[anchor], strict=True)),
            anchor=anchor,
            budget=(budgets or {}).get(what),
        )
        for what, values in times.items()
    ]


def _clustered(size: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns encodings `[M, D]` near their classes' prototypes, as real encoders give them, and labels `[M]`."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(size) % CLASSES
    return prototypes[labels] + torch.randn(size, width, generator=generator), labels


def _fill(model: MemoryWrapModel, size: int) -> MemoryWrapModel:
    encodings, labels = _clustered(size, model.encoding_size, 1)
    bank = MemoryBank()
    bank.replace(encodings, labels, labels, range(size), provenance=Provenance(encoder=model.encoder_fingerprint()))
    device = next(model.parameters()).device
    model.memory_bank = bank.to(device)
    return model.eval()


def _inference(
    name: str, img_size: int, batch_size: int, bank_size: int, device: str, dtype: torch.dtype, rounds: int
) -> list[Row]:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=CLASSES).eval().to(device, dtype)
    wrapped = _fill(timm_memwrap.wrap(plain), bank_size)
    headed = timm.create_model(f"memwrap_{name}", num_classes=CLASSES).eval().to(device, dtype)
    assert isinstance(headed, MemoryWrapModel)
    _fill(headed, bank_size)
    images = torch.randn(batch_size, plain.in_chans, img_size, img_size, device=device, dtype=dtype)  # type: ignore[call-overload]
    calls: dict[str, Call] = {
        "plain backbone": lambda: plain(images),
        "wrapped classifier": lambda: wrapped(images),
        "published head, kept memory": lambda: headed(images),
    }
    layer = _published(headed.encoding_size, "cosine")
    if layer is not None and dtype == torch.float32:
        layer = layer.to(device)
        encode = headed.encode
        memory_images = torch.randn(PUBLISHED_MEMORY, *images.shape[1:], device=device)
        calls[f"memorywrap, {PUBLISHED_MEMORY} images encoded at each call"] = lambda: layer(
            encode(images), encode(memory_images)
        )
        if bank_size <= PUBLISHED_LIMIT:
            kept = headed.memory_bank.encodings
            calls["memorywrap, cached encodings"] = lambda: layer(encode(images), kept)
    limit = {1000: 1.02 if batch_size >= 32 else 1.05, 100_000: 1.05}.get(bank_size) if name == "resnet18" else None
    budgets = {what: limit for what in ("wrapped classifier", "published head, kept memory") if limit}
    with torch.inference_mode():
        times = measure(calls, rounds, device)
    return _rows(
        times,
        "inference",
        "plain backbone",
        budgets,
        model=name,
        img_size=img_size,
        batch_size=batch_size,
        bank_size=bank_size,
    )


def _published(width: int, distance: str) -> nn.Module | None:
    """Returns the published layer, if `memorywrap` is installed."""
    if find_spec("memorywrap") is None:
        _logger.warning("memorywrap is not installed, so it is not compared: pip install memorywrap.")
        return None
    from memorywrap import MemoryWrapLayer

    return MemoryWrapLayer(width, CLASSES, distance=distance).eval()


def _reading(bank_size: int, width: int, batch_size: int, device: str, rounds: int, indexes: list[str]) -> list[Row]:
    """Times the read alone beside its matrix product, the least that an exact read takes."""
    layer = timm_memwrap.MemoryWrapLayer(width, CLASSES, head=nn.Identity(), scale=10.0).eval().to(device)
    memory, labels = _clustered(bank_size, width, 1)
    memory = memory.to(device)
    queries = _clustered(batch_size, width, 2)[0].to(device)
    with torch.no_grad():
        keys = layer.keys(memory)
        calls: dict[str, Call] = {
            "matrix product": lambda: queries @ keys.vectors.T,
            "exact read": lambda: layer.search(queries, keys),
        }
        built = {f"faiss {kind}": MemoryIndex(keys, "cosine", kind) for kind in indexes}
        for what, index in built.items():
            calls[what] = partial(layer.search, queries, keys, None, index)
        times = measure(calls, rounds, device)
        exact = _dense(*layer.search(queries, keys), bank_size)
        quality = {}
        for what, index in built.items():
            found = _dense(*layer.search(queries, keys, None, index), bank_size)
            classes = [torch.stack([w[:, labels == c].sum(dim=1) for c in range(CLASSES)]) for w in (exact, found)]
            agreement = (classes[0].argmax(dim=0) == classes[1].argmax(dim=0)).float().mean().item()
            quality[what] = (float((exact * (found > 0)).sum() / batch_size), agreement)
    rows = _rows(
        times,
        "read",
        "matrix product",
        {"exact read": 1.5} if bank_size >= 1_000_000 else None,
        batch_size=batch_size,
        bank_size=bank_size,
    )
    return [
        replace(row, recall=quality[row.what][0], agreement=quality[row.what][1]) if row.what in quality else row
        for row in rows
    ]


def _dense(weights: Tensor, positions: Tensor, size: int) -> Tensor:
    return torch.zeros(len(weights), size).scatter_add(1, positions.cpu(), weights.cpu())


def _against_published(width: int, device: str, rounds: int) -> list[Row]:
    """Times a read as the published layer computes it, over 10,000 samples, where its `[B, M, D]` fits in memory."""
    layer = _published(width, "l2")
    if layer is None:
        return []
    ours = timm_memwrap.MemoryWrapLayer(width, CLASSES, head=nn.Identity(), distance="l2").eval().to(device)
    ours.load_state_dict(layer.state_dict())
    layer = layer.to(device)
    memory = _clustered(PUBLISHED_LIMIT, width, 1)[0].to(device)
    # The published layer makes [B, M, D] of it: 2.6 GB at 128 queries.
    queries = _clustered(128, width, 2)[0].to(device)
    with torch.inference_mode():
        keys, values = ours.keys(memory), ours.values(memory)

        def read() -> Tensor:
            weights, indices = ours.search(queries, keys)
            return ours.classify(queries, timm_memwrap.attention.read(weights, indices, values))

        calls: dict[str, Call] = {"memorywrap, l2": lambda: layer(queries, memory), "exact read, l2": read}
        times = measure(calls, max(1, rounds // 3), device)
    return _rows(
        times,
        "read",
        "memorywrap, l2",
        {"exact read, l2": 1 / 50},
        batch_size=128,
        bank_size=PUBLISHED_LIMIT,
    )


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
    times = measure(calls, rounds, device)
    return _rows(
        times,
        "training",
        "plain backbone",
        {"memory from the batch": 1.05},
        model=name,
        img_size=img_size,
        batch_size=batch_size,
    )


def _explaining(name: str, img_size: int, device: str, rounds: int) -> list[Row]:
    """Times an explanation, influence of each shown sample included, beside the prediction that it explains."""
    batch_size, bank_size = 32, 1000
    wrapped = _fill(timm_memwrap.wrap(timm.create_model(name, num_classes=CLASSES).to(device)), bank_size)
    images = torch.randn(batch_size, wrapped.in_chans, img_size, img_size, device=device)
    calls: dict[str, Call] = {
        "prediction": lambda: wrapped.read_memory(images),
        "explanation": lambda: timm_memwrap.explain(wrapped, images),
    }
    with torch.inference_mode():
        times = measure(calls, rounds, device)
    return _rows(
        times,
        "explain",
        "prediction",
        {"explanation": 1.5},
        model=name,
        img_size=img_size,
        batch_size=batch_size,
        bank_size=bank_size,
    )


def _saving(name: str, rounds: int) -> list[Row]:
    """Times saving and loading beside timm's own of the backbone, plus a raw write and read of the bank."""
    size = 10_000
    plain = timm.create_model(name, num_classes=CLASSES).eval()
    # With the backbone's features as encodings and no head of its own, it holds what the two files beside it hold.
    headed = timm.create_model(
        f"memwrap_baseline_{name}", num_classes=CLASSES, read_head="identity", classifier="linear"
    )
    assert isinstance(headed, MemoryWrapModel)
    _fill(headed, size)
    from safetensors.torch import load_file, save_file

    assert headed.memory_bank.encodings is not None and headed.memory_bank.labels is not None
    raw = {"encodings": headed.memory_bank.encodings, "labels": headed.memory_bank.labels}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, file = Path(folder, "theirs"), Path(folder, "ours"), Path(folder, "bank.safetensors")

        def save_raw() -> None:
            save_for_hf(plain, str(theirs), safe_serialization=True)
            save_file(raw, file)

        def load_raw() -> None:
            timm.create_model(f"local-dir:{theirs}", pretrained=True)
            load_file(file)

        save: dict[str, Call] = {
            "timm, and the bank raw": save_raw,
            "model with its memory": lambda: timm_memwrap.save_pretrained(headed, ours),
        }
        load: dict[str, Call] = {
            "timm, and the bank raw": load_raw,
            "model with its memory": lambda: timm_memwrap.from_pretrained(ours),
        }
        for verb, calls in (("save", save), ("load", load)):
            found = _rows(
                measure(calls, rounds),
                "save",
                "timm, and the bank raw",
                {"model with its memory": 1.3},
                model=name,
                bank_size=size,
            )
            rows += [replace(row, what=f"{verb}: {row.what}") for row in found]
    return rows


def _pushing(name: str, rounds: int, namespace: str) -> list[Row]:
    """Times a push beside saving the same to the disk."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if not endpoint.startswith(("http://127.", "http://localhost")):
        raise ValueError(
            f"HF_ENDPOINT={endpoint!r}: a benchmark pushes to a Hub on loopback only. Start one, and set HF_ENDPOINT."
        )
    model = timm.create_model(f"memwrap_{name}", num_classes=CLASSES)
    assert isinstance(model, MemoryWrapModel)
    _fill(model, 10_000)
    count = iter(range(10**6))
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Call] = {
            "save": lambda: timm_memwrap.save_pretrained(model, folder),
            "push": lambda: timm_memwrap.push_to_hub(model, f"{namespace}/benchmark-{next(count)}"),
        }
        times = measure(calls, rounds)
    return _rows(times, "push", "save", None, model=name, bank_size=10_000)


def _importing(rounds: int) -> list[Row]:
    """Times what the import adds to timm's, in processes of their own."""
    code = (
        "import time, timm; start = time.perf_counter(); import timm_memwrap; "
        "print((time.perf_counter() - start) * 1000)"
    )
    base = "import time; start = time.perf_counter(); import timm; print((time.perf_counter() - start) * 1000)"

    def run(text: str) -> float:
        return float(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout)

    times: dict[str, list[float]] = {"import timm": [], "import timm_memwrap after it": []}
    for i in range(rounds + 1):
        for name, text in zip(times, (base, code), strict=True):
            found = run(text)
            if i:
                times[name].append(found)
    return _rows(times, "import", "import timm")


def table(rows: list[Row]) -> str:
    """Returns the measurements as a Markdown table."""
    header = ("part", "model", "images", "batch", "memory", "what", "ms", "ratio", "budget or recall")
    lines = [
        (
            row.part,
            row.model,
            "" if row.img_size is None else f"{row.img_size} px",
            "" if row.batch_size is None else str(row.batch_size),
            "" if row.bank_size is None else f"{row.bank_size:,}",
            row.what,
            f"{row.milliseconds:.2f}",
            f"{row.ratio:.3f}" if row.what != row.anchor and not row.what.endswith(row.anchor) else "1",
            _remark(row),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
             for line in (header, tuple("-" * width for width in widths), *lines)]  # fmt: skip
    return "\n".join(shown)


def _remark(row: Row) -> str:
    if row.budget is not None:
        return f"{row.budget:.3g} {'met' if row.ratio <= row.budget else 'MISSED'}"
    if row.recall is not None:
        return f"recall {row.recall:.1%}, same class {row.agreement:.0%}"
    return ""


def plot_rows(rows: list[Row], path: str | os.PathLike) -> Path:
    """Draws the time of a read against the size of the memory.

    Raises:
        ValueError: If the read was measured for no size.
        ImportError: If matplotlib is not installed.
    """
    reads = [row for row in rows if row.part == "read" and row.anchor == "matrix product"]
    if not reads:
        raise ValueError("There is no read to draw. Measure the part 'read' with several bank_sizes.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib: pip install 'timm-memwrap[plot]'") from error
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    styles = {"matrix product": ("#999999", "--", "s"), "exact read": ("#0072B2", "-", "o")}
    for what, (color, line, marker) in styles.items():
        points = sorted((row.bank_size or 0, row.milliseconds) for row in reads if row.what == what)
        axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, label=what)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("samples in the memory")
    axes.set_ylabel("milliseconds")
    axes.set_title(
        f"A read for {reads[0].batch_size} images, and the matrix product in it", loc="left", fontweight="bold"
    )
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def run(json_file: str | None = None, plot: str | None = None, **kwargs: Any) -> None:
    """Measures what a memory costs, and prints a table.

    Args:
        json_file: Where to write the measurements as JSON.
        plot: Where to draw the time of a read against the size of the memory.
        **kwargs: As of `benchmark`.
    """
    rows = benchmark(**kwargs)
    sys.stdout.write(table(rows) + "\n")
    if json_file is not None:
        write_text(json_file, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if plot is not None:
        plot_rows(rows, plot)


def main(args: list[str] | None = None) -> int:
    """Runs the command line, and returns the exit status."""
    logging.basicConfig(format="%(message)s")
    try:
        auto_cli(run, args=args, prog="python -m timm_memwrap.benchmark")
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"timm_memwrap.benchmark: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
