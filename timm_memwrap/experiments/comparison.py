"""Trains and measures heads side by side, and writes the results to a folder."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from timm_memwrap import __version__
from timm_memwrap._utils import check_choice, check_count, write_text
from timm_memwrap.building import points_to_herd
from timm_memwrap.experiments import measures
from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.experiments.heads import CONTROL, Head, parse_head, recipe_of
from timm_memwrap.experiments.measures import Encoded, remember
from timm_memwrap.experiments.plots import plot_frontier, plot_growth
from timm_memwrap.experiments.table import ComparisonReport
from timm_memwrap.experiments.timing import Call, compare_calls
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.selection import SELECTIONS, select
from timm_memwrap.training.fitting import Fitted, check_one_class_each, check_recipe, fit_recipe
from timm_memwrap.training.processes import processes
from timm_memwrap.training.recipes import first_difference, to_dict, write_recipe
from timm_memwrap.wrapping import wrap

__all__ = ["compare"]

_logger = logging.getLogger(__name__)

_TIMED_BATCH = 32  # inputs of a timed prediction
# Options in which a comparison may differ from what its folder holds.
_FREE = {"comparison": ("heads", "seeds", "timing_rounds"), "data": ("workers",), "training": ("device",), "hub": None}


def compare(config: Comparison, out: str | os.PathLike, progress: bool = True) -> ComparisonReport:
    """Trains and measures heads side by side on the same backbone, images, schedule and seeds.

    An interrupted comparison continues in the same folder, and heads or seeds can be added later: `runs/` holds the
    trainings and `measures/` what was measured, neither of which is repeated; `results.json`, `table.md`,
    `growth.png` and `frontier.png` are the results.
    """
    out, settings = Path(out), config.comparison
    heads = {name: parse_head(name) for name in settings.heads}
    _check(config)
    check_one_class_each(config, "A comparison")
    _check_folder(config, out)
    report = ComparisonReport(out, {}, {})
    with tqdm(total=len(settings.seeds) * len(heads), desc="Comparison", unit="head", disable=not progress) as bar:
        for seed in settings.seeds:
            session = _Seed(config, out, seed, progress)
            for name, head in heads.items():
                bar.set_postfix({"seed": seed, "head": name})
                path = out / "measures" / f"seed_{seed}" / f"{name.replace(':', ',')}.json"
                if not path.exists():
                    _write_json(path, session.measure(head))
                report.measures.setdefault(name, {})[seed] = _read_json(path)
                bar.update()
            if settings.timing_rounds and seed == settings.seeds[0]:
                path = out / "measures" / f"times_{seed}.json"
                if not path.exists() or set(heads) - set(_read_json(path)):
                    _write_json(path, session.times(heads, settings.timing_rounds))
                report.times.update(_read_json(path))
    versions = {"timm_memwrap": __version__, "timm": timm.__version__, "torch": torch.__version__}
    _write_json(out / "results.json", {"config": asdict(config), "versions": versions, **report.to_dict()})
    write_text(out / "table.md", f"{report}\n")
    plot_growth(report, out / "growth.png")
    plot_frontier(report, out / "frontier.png")
    return report


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def _check(config: Comparison) -> None:
    settings = config.comparison
    for name in ("heads", "seeds"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"comparison.{name}={values!r} is empty or repeats a value. Pass different ones.")
    check_count("comparison.draws", settings.draws)
    check_count("comparison.timing_rounds", settings.timing_rounds, at_least=0)
    for size in settings.samples_per_class:
        check_count("comparison.samples_per_class", size)
    for name in settings.selections:
        check_choice("comparison.selections", name, [name for name in SELECTIONS if name != "all"])
    if config.hub.push is not None:
        raise ValueError(f"hub.push={config.hub.push!r}, but a comparison pushes nothing. Train the head you choose.")
    for name in settings.heads:
        check_recipe(recipe_of(config, parse_head(name).run, settings.seeds[0]))


def _check_folder(config: Comparison, out: Path) -> None:
    """Raises if the folder holds measures of another comparison; heads and seeds may differ."""
    path = out / "comparison.yaml"
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    difference = before and first_difference(before, to_dict(config), _FREE)
    if difference:
        name, old, value = difference
        raise ValueError(
            f"{str(out)!r} holds a comparison with {name}={old!r}, now it is {value!r}. Pass another --out."
        )
    write_recipe(config, path)


class _Seed:
    """The trainings of one seed and the encodings of their images, which several heads share."""

    def __init__(self, config: Comparison, out: Path, seed: int, progress: bool) -> None:
        self.config, self.out, self.seed, self.progress = config, out, seed, progress
        self._fitted: dict[str, Fitted] = {}
        self._encoded: dict[tuple[str, str], Encoded] = {}

    def measure(self, head: Head) -> dict[str, Any]:
        """Trains what a head needs, unless that is done, and measures the head."""
        fitted, settings, seed = self._fit(head.run), self.config.comparison, self.seed
        seconds = sum(row["seconds"] for row in fitted.history)
        images = len(fitted.images) * len(fitted.history)
        result: dict[str, Any] = {"train_seconds": seconds, "train_images_per_second": images / seconds}
        if head.read is None:
            logits, labels = self._compute(fitted, "held_out", partial(_without_memory, fitted.model))
            return result | measures.classification_measures(logits, labels, seed)
        model = head.read(fitted.model).eval()
        inputs, memory = (self._encode(head.run, part, model.encoding_size) for part in ("held_out", "images"))
        if head.redrawn:
            size, batch_size = self.config.memory.train_size, self.config.data.batch_size
            return result | measures.redrawn_measures(model, inputs, memory, size, batch_size, settings.draws, seed)
        growth = []
        classes = int(memory.labels.max()) + 1
        points = points_to_herd(model, memory.encodings)
        for selection, each in product(settings.selections, settings.samples_per_class):
            if each * classes < memory.size:
                chosen = select(selection, memory.labels, points, each * classes, seed)
                remember(model, memory, chosen)
                row = {"selection": selection, "samples_per_class": each, "memory_size": len(chosen)}
                growth.append(row | measures.memory_measures(model, inputs.batches(), seed))
        remember(model, memory, range(memory.size))
        found = measures.memory_measures(model, inputs.batches(), seed)
        return result | found | {"memory_size": memory.size, "growth": growth}

    def times(self, heads: dict[str, Head], rounds: int) -> dict[str, float]:
        """Times predictions of a batch of images in turn, and returns the median ratios to the plain model's time."""
        plain = self._fit("plain")
        batch = self._some_images(plain, "held_out", _TIMED_BATCH)
        drawn = self._some_images(plain, "images", self.config.memory.train_size)
        calls: dict[str, Call] = {"": lambda: plain.model(batch)}
        calls |= {name: self._prediction(head, batch, drawn) for name, head in heads.items()}
        with torch.no_grad():
            return {row.what: row.ratio for row in compare_calls(calls, "prediction", rounds, batch.device.type)[1:]}

    def _prediction(self, head: Head, batch: Tensor, drawn: Tensor) -> Call:
        fitted = self._fit(head.run)
        if head.read is None:
            return lambda: _without_memory(fitted.model, batch)
        model = head.read(fitted.model).eval()
        if head.redrawn:
            # Encoded with the batch each time, as in evaluation.
            return lambda: model(batch, memory=drawn)
        memory = self._encode(head.run, "images", model.encoding_size)
        remember(model, memory, range(memory.size))
        return lambda: model(batch)

    def _fit(self, run: str) -> Fitted:
        if run not in self._fitted:
            _logger.info("%s, seed %d", run, self.seed)
            recipe = recipe_of(self.config, run, self.seed)
            folder = self.out / "runs" / run / f"seed_{self.seed}"
            with processes(recipe.training.device) as env:
                self._fitted[run] = fit_recipe(recipe, folder, env, progress=self.progress, reads_memory=run != CONTROL)
        return self._fitted[run]

    def _some_images(self, fitted: Fitted, part: str, count: int) -> Tensor:
        images = getattr(fitted, part)
        some = images.at(range(min(count, len(images))))
        return torch.cat([batch for batch, _ in fitted.batches(some)]).to(fitted.processes.device)

    def _encode(self, run: str, part: str, width: int) -> Encoded:
        """Encodes training or validation images once for all heads of a run, which read the first `width` columns."""
        if (run, part) not in self._encoded:
            fitted = self._fit(run)
            model = wrap(fitted.model) if run == "plain" else fitted.model
            assert isinstance(model, MemoryWrapModel)
            self._encoded[run, part] = self._compute(fitted, part, model.eval().encode)
        found = self._encoded[run, part]
        return Encoded(found.encodings[:, :width], found.labels)

    @torch.no_grad()
    def _compute(self, fitted: Fitted, part: str, function: Callable[[Tensor], Tensor]) -> Encoded:
        """Calls a function with the training or validation images, and returns what it gives with their labels."""
        device, batches = fitted.processes.device, fitted.batches(getattr(fitted, part))
        shown = tqdm(batches, desc=part, unit="batch", disable=not self.progress, leave=False)
        pairs = [(function(images.to(device)).float(), labels.to(device)) for images, labels in shown]
        return Encoded(*map(torch.cat, zip(*pairs, strict=True)))


def _without_memory(model: nn.Module, images: Tensor) -> Tensor:
    if not isinstance(model, MemoryWrapModel):
        return model(images)
    encoding = model.encode(images)
    return model.read(encoding, encoding.new_zeros(0, model.encoding_size)).logits
