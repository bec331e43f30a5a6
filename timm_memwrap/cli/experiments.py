"""The commands that make the tables of results: the comparison of heads, and the benchmark of costs."""

from typing import Any

from timm_memwrap.cli.output import IN_TERMINAL, print_result

__all__ = ["benchmark", "compare"]


def compare(out: str = "comparison", progress: bool = IN_TERMINAL, **sections: Any) -> None:
    """Trains heads side by side on the same images and seeds, and measures them and their evidence.

    Started again with the same folder it continues where it stopped; heads and seeds may be added.

    Args:
        out: Folder for the trainings, the measures, the table and the figure.
        progress: Whether to show progress bars; by default in a terminal.
        **sections: As of Comparison.
    """
    from timm_memwrap.experiments.comparison import compare as run
    from timm_memwrap.experiments.configuration import Comparison

    report = run(Comparison(**sections), out, progress)
    print(f"{report}\n\nWritten: {report.directory}")


def benchmark(json: str | None = None, plot: str | None = None, **options: Any) -> None:
    """Measures what a memory costs, beside the plain backbone and the published layer.

    Args:
        json: File to write the measurements to as JSON, or - to print that instead of a table.
        plot: File to draw the time of a read by the size of the memory to.
        **options: As of benchmark.
    """
    from dataclasses import asdict

    from timm_memwrap.experiments.benchmark import benchmark as run
    from timm_memwrap.experiments.plots import plot_rows
    from timm_memwrap.experiments.timing import table

    rows = run(**options)
    print_result(table(rows), [asdict(row) for row in rows], json)
    if plot is not None:
        plot_rows(rows, plot)
