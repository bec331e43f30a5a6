"""The commands whose result is text or JSON: explanations, evaluations, comparisons and measurements of costs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm_memwrap._utils import check_choice, write_text
from timm_memwrap.cli.arguments import IN_TERMINAL
from timm_memwrap.data import open_remembered, open_source
from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.experiments.plots import plot_rows
from timm_memwrap.experiments.timing import table
from timm_memwrap.explaining import (
    ExplanationMetrics,
    MultiLabelMetrics,
    UnknownMetrics,
    evaluate_explanations,
    evaluate_unknown,
    memory_report,
    plot_memory_report,
    write_memory_report,
)
from timm_memwrap.hub import from_pretrained
from timm_memwrap.jobs.explain import describe, explain_files, find_images
from timm_memwrap.jobs.inference import Inference
from timm_memwrap.model import MemoryWrapModel

__all__ = ["benchmark", "compare", "evaluate", "explain", "report"]

_FIGURES = (".png", ".pdf", ".svg")


def explain(
    source: str,
    images: list[str],
    out: str | None = None,
    top_k: int = 5,
    memory_data: str | None = None,
    heatmaps: str | None = None,
    contenders: int = 3,
    correspondences: int = 0,
    abstain: float = 0.0,
    json: str | None = None,
    progress: bool = IN_TERMINAL,
    **options: Any,
) -> None:
    """Explains images by the remembered images that their predictions used.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        images: Image files, or folders of them.
        out: HTML file to write a report with pictures to.
        top_k: How many remembered images to show for each.
        memory_data: What the memory was built from, if the model holds no images: an image folder itself, or data as in
            evaluate, of which the training split is taken.
        heatmaps: Heatmaps in the report: integrated_gradients, input_x_gradient or saliency; needs memory_data and out.
        contenders: How many of the most probable classes to show, each with the remembered images that look most like
            the input; 0 for none.
        correspondences: How many places to mark at most that an image and a remembered image have in common.
        abstain: Familiarity below which an image is called unfamiliar instead of a class, e.g. 0.05; 0 for never.
        json: File to write the explanations to as JSON, or - to print that instead of tables.
        progress: Whether to show progress bars; by default in a terminal.
        **options: As of Inference.
    """
    inference = Inference(**options)
    found = find_images(images, inference.unreadable)
    model = from_pretrained(source).to(inference.find_device())
    memory = None if memory_data is None else open_remembered(memory_data)
    explanations = explain_files(
        model, found, top_k, memory, heatmaps, contenders, correspondences, abstain, out, progress, inference
    )
    named = [(name, each) for (_, name), each in zip(found, explanations, strict=True)]
    texts = [describe(model, name, each) for name, each in named]
    if out is not None:
        texts.append(f"Written: {out}")
    _print_result("\n\n".join(texts), [{"image": name, **each.to_dict()} for name, each in named], json)


def evaluate(
    source: str,
    data: str = "",
    split: str = "test",
    unknown: str | None = None,
    json: str | None = None,
    progress: bool = IN_TERMINAL,
    **options: Any,
) -> None:
    """Evaluates a model and its explanations over labelled images.

    Labels are matched to the model's classes by name if the data and the model both have class names.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        data: The images: an image folder, a tar or CSV file, digits, or torch/NAME or hfds/OWNER/NAME as timm reads
            them.
        split: The split; of an image folder the folder in it, or '' if the classes are in the folder itself.
        unknown: Folder of images of none of the model's classes, to measure instead how well it tells the two apart.
        json: File to write the metrics to as JSON, or - to print that instead of a table.
        progress: Whether to show progress bars; by default in a terminal.
        **options: As of Inference.
    """
    inference = Inference(**options)
    strangers = None if unknown is None else [path for path, _ in find_images([unknown], inference.unreadable)]
    model, batches = _open(source, data, split, inference, progress)
    given: dict[str, Any] = {"source": source, "data": data, "split": split}
    metrics: ExplanationMetrics | MultiLabelMetrics | UnknownMetrics
    if strangers is None:
        metrics = evaluate_explanations(model, batches, progress=progress)
    else:
        images = inference.inputs(model, strangers)
        metrics, given = evaluate_unknown(model, batches, images, progress), {**given, "unknown": unknown}
    _print_result(metrics, {**given, **metrics.to_dict()}, json)


def report(
    source: str,
    data: str | None = None,
    split: str = "test",
    out: str | list[str] | None = None,
    memory_data: str | None = None,
    json: str | None = None,
    progress: bool = IN_TERMINAL,
    **options: Any,
) -> None:
    """Finds what is wrong with the remembered images: labels, copies, strangers, and what misleads.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        data: Labelled images that the memory was not taken from, as in evaluate, to find also which of them are in the
            memory, and what misleads or is never read.
        split: As in evaluate.
        out: File to write to, or a list of them, by suffix: .csv for a table to tick what to do in, .html for a page
            with the pictures side by side, .png, .pdf or .svg for a figure.
        memory_data: As in explain.
        json: File to write all that was found to as JSON, or - to print that instead of a table.
        progress: Whether to show progress bars; by default in a terminal.
        **options: As of Inference.
    """
    files = [Path(path) for path in ([out] if isinstance(out, str) else out or [])]
    for path in files:
        check_choice("suffix of out", path.suffix, (".csv", ".html", *_FIGURES))
    memory, inference = None if memory_data is None else open_remembered(memory_data), Inference(**options)
    images = None if data is None else inference.readable(open_source(data, split), progress)
    model = from_pretrained(source).to(inference.find_device())
    found = memory_report(model, None if images is None else inference.batches(images), progress)
    for path in files:
        if path.suffix == ".csv":
            found.save(path)
        else:
            draw = write_memory_report if path.suffix == ".html" else plot_memory_report
            draw(model, found, path, memory, images)
    _print_result("\n\n".join([str(found), *(f"Written: {path}" for path in files)]), found.to_dict(), json)


def compare(out: str = "comparison", progress: bool = IN_TERMINAL, **sections: Any) -> None:
    """Trains heads side by side on the same images and seeds, and measures them and their evidence.

    Started again with the same folder it continues where it stopped; heads and seeds may be added.

    Args:
        out: Folder for the trainings, the measures, the table and the figures.
        progress: Whether to show progress bars; by default in a terminal.
        **sections: As of Comparison.
    """
    from timm_memwrap.experiments.comparison import compare as run

    report = run(Comparison(**sections), out, progress)
    print(f"{report}\n\nWritten: {report.directory}")


def benchmark(json: str | None = None, plot: str | None = None, **options: Any) -> None:
    """Measures what a memory costs, beside the plain backbone and the published layer.

    Args:
        json: File to write the measurements to as JSON, or - to print that instead of a table.
        plot: File to draw the time of a read by the size of the memory to.
        **options: As of benchmark.
    """
    from timm_memwrap.experiments.benchmark import benchmark as run

    rows = run(**options)
    _print_result(table(rows), [asdict(row) for row in rows], json)
    if plot is not None:
        plot_rows(rows, plot)


def _open(source: str, data: str, split: str, inference: Inference, progress: bool) -> tuple[MemoryWrapModel, Any]:
    """Opens a model, and batches of labelled images with its labels."""
    images, device = inference.readable(open_source(data, split), progress), inference.find_device()
    model = from_pretrained(source).to(device)
    return model, inference.batches(images)


def _print_result(text: object, values: Any, target: str | None) -> None:
    """Prints text, and writes `values` to the file `target` as JSON; if that is `-`, prints the JSON alone."""
    # ASCII, so that any terminal and any encoding can hold it.
    dumped = json.dumps(values, indent=2)
    print(dumped if target == "-" else text)
    if target not in (None, "-"):
        print(f"\nWritten: {write_text(target, dumped + chr(10))}")
