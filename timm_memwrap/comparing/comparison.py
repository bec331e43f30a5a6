"""Trains and measures heads side by side, and leaves what they came to in a folder."""

import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_memwrap import __version__
from timm_memwrap.comparing.configuration import Comparison
from timm_memwrap.comparing.heads import CONTROL, Head, parse_head, recipe_of
from timm_memwrap.comparing.measures import (
    Encoded,
    classification_measures,
    memory_measures,
    redrawn_measures,
    remember,
)
from timm_memwrap.comparing.table import RESULTS_FILE, TABLE_FILE, ComparisonReport, plot_growth
from timm_memwrap.files import write_text
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.registration import wrap
from timm_memwrap.selection import SELECTIONS, select
from timm_memwrap.training.creation import image_config
from timm_memwrap.training.loaders import eval_loader
from timm_memwrap.training.recipes import first_difference, settings_of, write_recipe
from timm_memwrap.training.training import Fitted, check_recipe, fit_recipe

__all__ = ["compare"]

_logger = logging.getLogger(__name__)

# Inputs of a timed prediction.
_TIMED_BATCH = 32
CONFIG_FILE = "comparison.yaml"
# Settings that the measures of a folder need not share.
_FREE = {
    "comparison": ("heads", "seeds", "timing_rounds"),
    "data": ("workers",),
    "training": ("device",),
    "hub": None,
}


def compare(config: Comparison, out: str | os.PathLike, progress: bool = True) -> ComparisonReport:
    """Trains and measures heads side by side: same backbone, images, schedule and seeds.

    What is done is kept in the folder and not done again, so that an interrupted comparison goes on, and heads or seeds
    can be added later: `runs/` holds the trainings, `measures/` what was measured, `results.json`, `table.md` and
    `growth.png` what it came to.

    Args:
        config: What to train, and what to measure.
        out: The folder; made if absent.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the recipe does not fit the data or itself, a head is unknown, or the folder holds a comparison
            of another recipe.
    """
    out, settings = Path(out), config.comparison
    heads = {name: parse_head(name) for name in settings.heads}
    _check(config)
    _check_folder(config, out)
    report = ComparisonReport(out, {}, {})
    with tqdm(total=len(settings.seeds) * len(heads), desc="Comparison", unit="head", disable=not progress) as bar:
        for seed in settings.seeds:
            session = _Seed(config, out, seed, progress)
            for name, head in heads.items():
                bar.set_postfix({"seed": seed, "head": name})
                path = out / "measures" / f"seed_{seed}" / f"{name.replace(':', ',')}.json"
                if not path.exists():
                    write_text(path, json.dumps(session.measure(head), indent=2) + "\n")
                report.measures.setdefault(name, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
                bar.update()
            if settings.timing_rounds and seed == settings.seeds[0]:
                path = out / "measures" / f"times_{seed}.json"
                if not path.exists() or set(heads) - set(json.loads(path.read_text(encoding="utf-8"))):
                    write_text(path, json.dumps(session.times(heads, settings.timing_rounds), indent=2) + "\n")
                report.times.update(json.loads(path.read_text(encoding="utf-8")))
    results = {
        "config": asdict(config),
        "versions": {"timm_memwrap": __version__, "timm": timm.__version__, "torch": torch.__version__},
        **report.to_dict(),
    }
    write_text(out / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    write_text(out / TABLE_FILE, f"{report}\n")
    plot_growth(report, out)
    return report


def _check(config: Comparison) -> None:
    settings = config.comparison
    for name in ("heads", "seeds"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"comparison.{name}={values!r}. Name at least one, and none twice.")
    for name, least in (("draws", 1), ("timing_rounds", 0)):
        if getattr(settings, name) < least:
            raise ValueError(f"comparison.{name}={getattr(settings, name)}. Pass {least} or more.")
    if any(size < 1 for size in settings.samples_per_class):
        raise ValueError(f"comparison.samples_per_class={settings.samples_per_class}. Pass sizes of 1 or more.")
    unknown = [name for name in settings.selections if name not in SELECTIONS or name == "all"]
    if unknown:
        raise ValueError(f"comparison.selections has {unknown[0]!r}. Pass some of balanced, random, kmeans.")
    if config.hub.push is not None:
        raise ValueError(f"hub.push={config.hub.push!r}, but a comparison pushes nothing. Train the one you choose.")
    for name in settings.heads:
        check_recipe(recipe_of(config, parse_head(name).run, settings.seeds[0]))


def _check_folder(config: Comparison, out: Path) -> None:
    """Refuses a folder whose measures are of something else; heads and seeds may differ."""
    path = out / CONFIG_FILE
    if path.exists():
        import yaml

        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        difference = first_difference(before, settings_of(config, _FREE))
        if difference is not None:
            name, old, value = difference
            raise ValueError(
                f"{str(out)!r} holds a comparison with {name}={old!r}, now it is {value!r}. Pass another --out."
            )
    write_recipe(config, path)


class _Seed:
    """What heads of one seed share: trainings, and encodings of their images."""

    def __init__(self, config: Comparison, out: Path, seed: int, progress: bool) -> None:
        self.config, self.out, self.seed, self.progress = config, out, seed, progress
        self._fitted: dict[str, Fitted] = {}
        self._encoded: dict[tuple[str, str, str], Encoded] = {}

    def measure(self, head: Head) -> dict[str, Any]:
        """Trains what a head needs, if that is not done, and measures it."""
        fitted, settings, recipe = self._fit(head.run), self.config.comparison, self.config
        seconds = sum(row["seconds"] for row in fitted.history)
        images = len(fitted.images) * len(fitted.history)
        result: dict[str, Any] = {"train_seconds": seconds, "train_images_per_second": images / seconds}
        if head.read is None:
            logits, labels = self._logits(head.run)
            return result | classification_measures(logits, labels, self.seed)
        model = head.read(fitted.model).eval()
        inputs, memory = (self._encode(head.run, model, part) for part in ("held_out", "images"))
        if head.redrawn:
            size, batch_size = recipe.memory.train_size, recipe.data.batch_size
            return result | redrawn_measures(model, inputs, memory, size, batch_size, settings.draws, self.seed)
        growth = []
        classes = int(memory.labels.max()) + 1
        for selection in settings.selections:
            for each in settings.samples_per_class:
                if each * classes < len(memory):
                    chosen = select(selection, memory.labels, memory.encodings, each * classes, self.seed)
                    remember(model, memory, chosen)
                    row = {"selection": selection, "samples_per_class": each, "memory_size": len(chosen)}
                    growth.append(row | memory_measures(model, inputs, self.seed))
        remember(model, memory, list(range(len(memory))))
        found = memory_measures(model, inputs, self.seed)
        return result | found | {"memory_size": len(memory), "growth": growth}

    def times(self, heads: dict[str, Head], rounds: int) -> dict[str, float]:
        """Times predictions of a batch of images in turn, and returns the medians of their ratios to the plain model's.

        A head that draws its memory anew encodes it with the batch, as it does in evaluation.
        """
        plain = self._fit("plain")
        device = next(plain.model.parameters()).device
        batch = next(iter(self._loader(plain, "held_out", _TIMED_BATCH)))[0].to(device)
        memory_size = min(self.config.memory.train_size, len(plain.images))
        drawn = next(iter(self._loader(plain, "images", memory_size)))[0].to(device)
        calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain.model(batch)}
        for name, head in heads.items():
            calls[name] = self._prediction(head, batch, drawn)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        with torch.no_grad():
            for name, call in [*calls.items()] * (rounds + 1):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        # The first round warms up.
        ratios = {
            name: [one / plain for one, plain in zip(values[1:], seconds["plain"][1:], strict=True)]
            for name, values in seconds.items()
        }
        return {name: statistics.median(ratios[name]) for name in heads}

    def _prediction(self, head: Head, batch: torch.Tensor, drawn: torch.Tensor) -> Callable[[], Any]:
        fitted = self._fit(head.run)
        if head.read is None:
            return lambda: _without_memory(fitted.model, batch)
        model = head.read(fitted.model).eval()
        if head.redrawn:
            return lambda: model(batch, memory=drawn)
        memory = self._encode(head.run, model, "images")
        remember(model, memory, list(range(len(memory))))
        return lambda: model(batch)

    def _fit(self, run: str) -> Fitted:
        if run not in self._fitted:
            _logger.info("%s, seed %d", run, self.seed)
            recipe = recipe_of(self.config, run, self.seed)
            folder = self.out / "runs" / run / f"seed_{self.seed}"
            self._fitted[run] = fit_recipe(recipe, folder, self.progress, reads_memory=run != CONTROL)
        return self._fitted[run]

    def _loader(self, fitted: Fitted, part: str, batch_size: int | None = None) -> DataLoader:
        loader = eval_loader(getattr(fitted, part), self.config.data, image_config(fitted.model))
        if batch_size is None:
            return loader
        return DataLoader(loader.dataset, batch_size)

    @torch.no_grad()
    def _encode(self, run: str, model: MemoryWrapModel, part: str) -> Encoded:
        """Encodes training or validation images once for all heads that encode alike."""
        kind = "joined" if model.encodes_pre_logits else "logits" if model.keeps_classifier else "features"
        key = (run, part, kind)
        if key not in self._encoded:
            fitted = self._fit(run)
            wide = self._encoded.get((run, part, "joined"))
            if wide is None:
                # What the plain classifier's heads read are parts of one encoding.
                joined = run == "plain"
                encoder = wrap(fitted.model) if joined else model
                wide = _encode_all(encoder, self._loader(fitted, part), f"{run}, {part}", self.progress)
                self._encoded[(run, part, "joined" if joined else kind)] = wide
            if key not in self._encoded:
                classes = len(fitted.images.classes)
                columns = slice(-classes, None) if kind == "logits" else slice(None, -classes)
                self._encoded[key] = Encoded(wide.encodings[:, columns].contiguous(), wide.labels)
        return self._encoded[key]

    @torch.no_grad()
    def _logits(self, run: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Classifies the validation images without a memory."""
        fitted = self._fit(run)
        if run == "plain":
            encoded = self._encode(run, wrap(fitted.model, read_head="classifier"), "held_out")
            return encoded.encodings, encoded.labels
        device = next(fitted.model.parameters()).device
        logits, labels = [], []
        for images, targets in self._loader(fitted, "held_out"):
            logits.append(_without_memory(fitted.model, images.to(device)).cpu())
            labels.append(targets)
        return torch.cat(logits), torch.cat(labels)


def _without_memory(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    if not isinstance(model, MemoryWrapModel):
        return model(images)
    logits = model(images, memory_encoding=images.new_zeros(0, model.encoding_size))
    assert isinstance(logits, torch.Tensor)
    return logits


def _encode_all(model: MemoryWrapModel, loader: DataLoader, what: str, progress: bool) -> Encoded:
    device = next(model.parameters()).device
    model.eval()
    encodings, labels = [], []
    for images, targets in tqdm(loader, desc=f"Encoding: {what}", unit="batch", disable=not progress, leave=False):
        encodings.append(model.encode(images.to(device)).float())
        labels.append(targets.to(device))
    return Encoded(torch.cat(encodings), torch.cat(labels))
