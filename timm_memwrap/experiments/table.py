"""The results of a comparison: means, standard deviations and paired differences, as a table and as JSON."""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm_memwrap.experiments.markdown import markdown_table

__all__ = ["REFERENCE", "ComparisonReport", "Statistic"]

# The head that the others are compared with, seed by seed.
REFERENCE = "linear"

# Columns: title, measure, factor, decimals.
_COLUMNS = (
    ("without memory", "accuracy_without_memory", 100, 1),
    ("classes shuffled", "accuracy_shuffled", 100, 1),
    ("flips without strongest", "deletion_flip_rate", 100, 1),
    ("strongest is an example", "explanation_accuracy", 100, 1),
    ("identical class", "identical_class_rate", 100, 1),
    ("samples", "support_size", 1, 1),
    ("ECE", "calibration_error", 1, 3),
    ("ECE, scaled", "calibration_error_scaled", 1, 3),
    ("NLL, scaled", "negative_log_likelihood_scaled", 1, 3),
)


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation over seeds; the latter is `None` for one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Statistic":
        """Computes the statistic of some values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, factor: float, decimals: int, signed: bool = False) -> str:
        """Returns it as text, e.g. `71.5 ± 0.6`."""
        sign = "+" if signed else ""
        mean = f"{factor * self.mean:{sign}.{decimals}f}"
        return mean if self.deviation is None else f"{mean} ± {factor * self.deviation:.{decimals}f}"


@dataclass(frozen=True)
class ComparisonReport:
    """The results of a comparison.

    Args:
        directory: Folder with all of it.
        measures: The measures by head and seed.
        times: The time of a prediction by head, as a multiple of the plain model's.
    """

    directory: Path
    measures: dict[str, dict[int, dict[str, Any]]]
    times: dict[str, float]

    def statistic(self, head: str, measure: str) -> Statistic | None:
        """Returns a measure over the seeds; `None` if the head does not have it."""
        values = [found[measure] for found in self.measures[head].values() if measure in found]
        return Statistic.of(values) if values else None

    def difference(self, head: str, measure: str = "accuracy", reference: str = REFERENCE) -> Statistic | None:
        """Returns the difference to another head, paired by seed; `None` if either is missing."""
        if head not in self.measures or reference not in self.measures:
            return None
        own, other = self.measures[head], self.measures[reference]
        pairs = [seed for seed in own if seed in other and measure in own[seed] and measure in other[seed]]
        return Statistic.of([own[seed][measure] - other[seed][measure] for seed in pairs]) if pairs else None

    def to_dict(self) -> dict[str, Any]:
        """Returns all results as JSON can hold them."""
        heads: dict[str, Any] = {}
        for head, by_seed in self.measures.items():
            names = dict.fromkeys(name for found in by_seed.values() for name in found if name != "growth")
            difference = self.difference(head)
            heads[head] = {
                "summary": {name: asdict(self._known(head, name)) for name in names},
                "accuracy_difference": None if difference is None else {"to": REFERENCE, **asdict(difference)},
                "prediction_time": self.times.get(head),
                "seeds": by_seed,
            }
        return {"heads": heads}

    def __str__(self) -> str:
        """Returns a Markdown table, and another of the sizes of the memory bank."""
        titles = ["head", "accuracy %", f"to {REFERENCE}", *(title for title, *_ in _COLUMNS), "training", "prediction"]
        tables = [markdown_table(titles, [self._row(head) for head in self.measures])]
        growth = [self._growth_row(head, row) for head in self.measures for row in self.growth(head)]
        if growth:
            titles = ["head", "memory", "accuracy %", "strongest is an example", "identical class", "samples"]
            tables.append(markdown_table(titles, growth))
        return "\n\n".join(tables)

    def growth(self, head: str) -> list[dict[str, Any]]:
        """Returns means over the seeds for each size and selection of a head's bank, all samples last."""
        runs = list(self.measures[head].values())
        if not all("memory_size" in found for found in runs):
            return []
        whole = [{"selection": "all", "samples_per_class": None, **found} for found in runs]
        steps = [*zip(*(found["growth"] for found in runs), strict=True), tuple(whole)]
        names = ("accuracy", "explanation_accuracy", "identical_class_rate", "support_size", "calibration_error")
        return [
            {name: step[0][name] for name in ("selection", "samples_per_class", "memory_size")}
            | {name: statistics.fmean(found[name] for found in step) for name in names}
            for step in steps
        ]

    def _known(self, head: str, measure: str) -> Statistic:
        statistic = self.statistic(head, measure)
        assert statistic is not None
        return statistic

    def _row(self, head: str) -> list[str]:
        difference = self.difference(head) if head != REFERENCE else None
        row = [head, self._known(head, "accuracy").text(100, 2)]
        row.append("" if difference is None else difference.text(100, 2, signed=True))
        for _, measure, factor, decimals in _COLUMNS:
            statistic = self.statistic(head, measure)
            row.append("" if statistic is None else f"{factor * statistic.mean:.{decimals}f}")
        seconds = self.statistic(head, "train_seconds")
        trained = self.statistic(REFERENCE, "train_seconds") if REFERENCE in self.measures else None
        row.append("" if not trained or not seconds else f"{seconds.mean / trained.mean:.2f}x")
        row.append(f"{self.times[head]:.2f}x" if head in self.times else "")
        return row

    def _growth_row(self, head: str, row: dict[str, Any]) -> list[str]:
        each = row["samples_per_class"]
        return [
            head,
            "all" if each is None else f"{each} per class, {row['selection']}",
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['explanation_accuracy']:.1f}",
            f"{100 * row['identical_class_rate']:.1f}",
            f"{row['support_size']:.1f}",
        ]
