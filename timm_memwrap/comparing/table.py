"""What a comparison came to: means, standard deviations and paired differences, as a table, JSON and a figure."""

import logging
import statistics
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["FIGURE_FILE", "RESULTS_FILE", "TABLE_FILE", "ComparisonReport", "plot_growth"]

_logger = logging.getLogger(__name__)

RESULTS_FILE, TABLE_FILE, FIGURE_FILE = "results.json", "table.md", "growth.png"

# What the others are compared with, seed by seed.
REFERENCE = "linear"

# Columns of the table: title, measure, factor, decimals.
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
_ABSENT = ""


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation over seeds; the latter is `None` for one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Statistic":
        """Computes it."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, factor: float, decimals: int, signed: bool = False) -> str:
        """Says it, e.g. `71.5 ± 0.6`."""
        sign = "+" if signed else ""
        mean = f"{factor * self.mean:{sign}.{decimals}f}"
        return mean if self.deviation is None else f"{mean} ± {factor * self.deviation:.{decimals}f}"


@dataclass(frozen=True)
class ComparisonReport:
    """What a comparison came to.

    Args:
        directory: Folder with all of it.
        measures: By head and seed, what was measured.
        times: By head, the time of a prediction as a multiple of the plain model's.
    """

    directory: Path
    measures: dict[str, dict[int, dict[str, Any]]]
    times: dict[str, float]

    def statistic(self, head: str, measure: str) -> Statistic | None:
        """Returns a measure over the seeds; `None` for a head that has none."""
        values = [found[measure] for found in self.measures[head].values() if measure in found]
        return Statistic.of(values) if values else None

    def difference(self, head: str, measure: str = "accuracy", reference: str = REFERENCE) -> Statistic | None:
        """Returns the difference to another head, paired by seed; `None` if either is not there."""
        if head not in self.measures or reference not in self.measures:
            return None
        own, other = self.measures[head], self.measures[reference]
        pairs = [seed for seed in own if seed in other and measure in own[seed] and measure in other[seed]]
        return Statistic.of([own[seed][measure] - other[seed][measure] for seed in pairs]) if pairs else None

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it, to be written as JSON."""
        heads: dict[str, Any] = {}
        for head, by_seed in self.measures.items():
            names = dict.fromkeys(name for found in by_seed.values() for name in found if name != "growth")
            summary: dict[str, Any] = {}
            for name in names:
                statistic = self.statistic(head, name)
                assert statistic is not None
                summary[name] = {"mean": statistic.mean, "deviation": statistic.deviation}
            difference = self.difference(head)
            heads[head] = {
                "summary": summary,
                "accuracy_difference": None
                if difference is None
                else {"to": REFERENCE, "mean": difference.mean, "deviation": difference.deviation},
                "prediction_time": self.times.get(head),
                "seeds": by_seed,
            }
        return {"heads": heads}

    def __str__(self) -> str:
        """Says it as a table in Markdown."""
        titles = ["head", "accuracy %", f"to {REFERENCE}", *(title for title, *_ in _COLUMNS), "training", "prediction"]
        rows = [titles, ["---"] * len(titles)]
        trained = self.statistic(REFERENCE, "train_seconds") if REFERENCE in self.measures else None
        for head in self.measures:
            accuracy, difference = self.statistic(head, "accuracy"), self.difference(head)
            row = [head, "" if accuracy is None else accuracy.text(100, 2)]
            row.append(_ABSENT if difference is None or head == REFERENCE else difference.text(100, 2, signed=True))
            for _, measure, factor, decimals in _COLUMNS:
                statistic = self.statistic(head, measure)
                row.append(_ABSENT if statistic is None else f"{factor * statistic.mean:.{decimals}f}")
            seconds = self.statistic(head, "train_seconds")
            row.append(_ABSENT if not trained or not seconds else f"{seconds.mean / trained.mean:.2f}x")
            row.append(f"{self.times[head]:.2f}x" if head in self.times else _ABSENT)
            rows.append(row)
        widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
        lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
        return "\n".join([*lines, *self._growth_lines()])

    def growth(self, head: str) -> list[dict[str, Any]]:
        """Returns means over the seeds for each size and selection of a head's bank, all samples last."""
        runs = list(self.measures[head].values())
        if not all("memory_size" in found for found in runs):
            return []
        whole = [{"selection": "all", "samples_per_class": None, **found} for found in runs]
        steps = [*zip(*(found["growth"] for found in runs), strict=True), tuple(whole)]
        names = ("accuracy", "explanation_accuracy", "identical_class_rate", "support_size", "calibration_error")
        return [
            {
                "selection": step[0]["selection"],
                "samples_per_class": step[0]["samples_per_class"],
                "memory_size": step[0]["memory_size"],
                **{name: statistics.fmean(found[name] for found in step) for name in names},
            }
            for step in steps
        ]

    def _growth_lines(self) -> list[str]:
        lines = []
        for head in self.measures:
            for row in self.growth(head):
                each = row["samples_per_class"]
                size = "all" if each is None else f"{each} a class, {row['selection']}"
                lines.append(
                    f"| {head} | {size} | {100 * row['accuracy']:.2f} | {100 * row['explanation_accuracy']:.1f} | "
                    f"{100 * row['identical_class_rate']:.1f} | {row['support_size']:.1f} |"
                )
        if not lines:
            return []
        return [
            "",
            "| head | memory | accuracy % | strongest is an example | identical class | samples |",
            "|---|---|---|---|---|---|",
            *lines,
        ]


def plot_growth(report: ComparisonReport, folder: Path) -> Path | None:
    """Draws accuracy by the size of the memory bank, or says what is missing to draw it; `None` without a bank."""
    heads = [head for head in report.measures if len(report.growth(head)) > 1]
    if not heads:
        return None
    if find_spec("matplotlib") is None:
        _logger.warning("%s is not drawn: pip install 'timm-memwrap[plot]'.", FIGURE_FILE)
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # Colours that colour-blind people tell apart (Okabe and Ito).
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    for i, head in enumerate(heads):
        rows = report.growth(head)
        first = rows[0]["selection"]
        line = [(row["memory_size"], row["accuracy"]) for row in rows if row["selection"] in (first, "all")]
        axes.plot(*zip(*line, strict=True), marker="os^Dv<>"[i % 7], color=colours[i % 7], markersize=4, label=head)
    reference = report.statistic(REFERENCE, "accuracy") if REFERENCE in report.measures else None
    if reference is not None:
        axes.axhline(reference.mean, color="#555555", linestyle="--", label=REFERENCE)
    axes.set_xscale("log")
    axes.set_xlabel("samples in the memory")
    axes.set_title("Accuracy by the size of the memory", loc="left", fontweight="bold")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path = folder / FIGURE_FILE
    figure.savefig(path, dpi=150)
    return path
