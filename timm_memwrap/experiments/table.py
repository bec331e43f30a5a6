"""The results of a comparison: means, standard deviations and paired differences, as a table and as JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["REFERENCE", "ComparisonReport", "Statistic", "markdown_table"]

# The head that the others are compared with, seed by seed.
REFERENCE = "linear"

# Columns by measure: title, factor, decimals.
_COLUMNS = {
    "accuracy_without_memory": ("without memory", 100, 1),
    "accuracy_shuffled": ("classes shuffled", 100, 1),
    "follows_exchanged_answer": ("follows exchanged answer", 100, 1),
    "deletion_flip_rate": ("flips without strongest", 100, 1),
    "explanation_accuracy": ("strongest is an example", 100, 1),
    "identical_class_rate": ("identical class", 100, 1),
    "support_size": ("samples", 1, 1),
    "calibration_error": ("ECE", 1, 3),
    "calibration_error_scaled": ("ECE, scaled", 1, 3),
    "negative_log_likelihood_scaled": ("NLL, scaled", 1, 3),
}
# Those of them in the table of sizes.
_GROWTH_COLUMNS = ("explanation_accuracy", "identical_class_rate", "support_size")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose columns are aligned in plain text too."""
    lines = [header, ["---"] * len(header), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation over seeds; the latter is `None` for one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Statistic":
        """Computes the statistic of some values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def percent(self, sign: str = "") -> str:
        """Returns it in percent, e.g. `71.52 ± 0.61`."""
        mean = f"{100 * self.mean:{sign}.2f}"
        return mean if self.deviation is None else f"{mean} ± {100 * self.deviation:.2f}"


@dataclass(frozen=True)
class ComparisonReport:
    """The results of a comparison."""

    directory: Path
    measures: dict[str, dict[int, dict[str, Any]]]  # by head and seed
    times: dict[str, float]  # of a prediction by head, as a multiple of the plain model's

    def values(self, head: str, measure: str) -> list[float]:
        """Returns a measure for each seed that has it; it is `None` where it does not apply."""
        found = (measures.get(measure) for measures in self.measures.get(head, {}).values())
        return [value for value in found if value is not None]

    def difference(self, head: str) -> Statistic | None:
        """Returns the difference in accuracy to the reference, paired by seed; `None` if either is missing."""
        own, other = self.measures.get(head, {}), self.measures.get(REFERENCE, {})
        pairs = [own[seed]["accuracy"] - other[seed]["accuracy"] for seed in own if seed in other]
        return Statistic.of(pairs) if pairs else None

    def to_dict(self) -> dict[str, Any]:
        """Returns all results as JSON can hold them."""
        heads: dict[str, Any] = {}
        for head, by_seed in self.measures.items():
            names = dict.fromkeys(name for found in by_seed.values() for name in found if name != "growth")
            values = {name: values for name in names if (values := self.values(head, name))}
            difference = self.difference(head)
            heads[head] = {
                "summary": {name: asdict(Statistic.of(found)) for name, found in values.items()},
                "accuracy_difference": None if difference is None else {"to": REFERENCE, **asdict(difference)},
                "prediction_time": self.times.get(head),
                "seeds": by_seed,
            }
        return {"heads": heads}

    def __str__(self) -> str:
        """Returns a Markdown table, and another of the sizes of the memory bank."""
        titles = [title for title, *_ in _COLUMNS.values()]
        header = ["head", "accuracy %", f"to {REFERENCE}", *titles, "training", "prediction"]
        tables = [markdown_table(header, [self._row(head) for head in self.measures])]
        growth = [_growth_row(head, row) for head in self.measures for row in self.growth(head)]
        if growth:
            header = ["head", "memory", "accuracy %", *(_COLUMNS[name][0] for name in _GROWTH_COLUMNS)]
            tables.append(markdown_table(header, growth))
        return "\n\n".join(tables)

    def growth(self, head: str) -> list[dict[str, Any]]:
        """Returns means over the seeds for each size and selection of a head's bank, all samples last."""
        runs = list(self.measures[head].values())
        if not all("memory_size" in found for found in runs):
            return []
        whole = [{"selection": "all", "samples_per_class": None, **found} for found in runs]
        steps = [*zip(*(found["growth"] for found in runs), strict=True), tuple(whole)]
        names = ("accuracy", *_GROWTH_COLUMNS, "calibration_error")
        return [
            {name: step[0][name] for name in ("selection", "samples_per_class", "memory_size")}
            | {name: statistics.fmean(found[name] for found in step) for name in names}
            for step in steps
        ]

    def _row(self, head: str) -> list[str]:
        difference = self.difference(head) if head != REFERENCE else None
        cells = [_cell(name, self.values(head, name)) for name in _COLUMNS]
        seconds, of_reference = self.values(head, "train_seconds"), self.values(REFERENCE, "train_seconds")
        return [
            head,
            Statistic.of(self.values(head, "accuracy")).percent(),
            "" if difference is None else difference.percent("+"),
            *cells,
            f"{statistics.fmean(seconds) / statistics.fmean(of_reference):.2f}x" if seconds and of_reference else "",
            f"{self.times[head]:.2f}x" if head in self.times else "",
        ]


def _growth_row(head: str, row: dict[str, Any]) -> list[str]:
    each = row["samples_per_class"]
    memory = "all" if each is None else f"{each} per class, {row['selection']}"
    cells = [_cell(name, [row[name]]) for name in _GROWTH_COLUMNS]
    return [head, memory, f"{100 * row['accuracy']:.2f}", *cells]


def _cell(name: str, values: list[float]) -> str:
    _, factor, decimals = _COLUMNS[name]
    return f"{factor * statistics.fmean(values):.{decimals}f}" if values else ""
