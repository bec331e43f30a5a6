"""The commands that explain predictions, and measure explanations and memories."""

from timm_memwrap.cli.output import IN_TERMINAL, print_result

__all__ = ["evaluate", "explain", "report"]


def explain(
    source: str,
    images: list[str],
    out: str | None = None,
    top_k: int = 5,
    memory_data: str | None = None,
    heatmaps: str | None = None,
    json: str | None = None,
    progress: bool = IN_TERMINAL,
) -> None:
    """Explains images by the remembered images that their predictions used.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        images: Image files, or folders of them.
        out: HTML file to write a report with pictures to.
        top_k: How many remembered images to show for each.
        memory_data: The data that the memory was built from, for pictures that the model does not hold: as data in
            evaluate, of which an image folder is taken as it is, and of other data the training split.
        heatmaps: Show in the report where in the images the prediction comes from, by this method:
            integrated_gradients, input_x_gradient or saliency. Needs memory_data and out.
        json: File to write the explanations to as JSON, or - to print that instead of tables.
        progress: Whether to show progress bars; by default in a terminal.
    """
    from timm_memwrap.data import open_remembered
    from timm_memwrap.hub import from_pretrained
    from timm_memwrap.jobs.explain import describe, explain_files, find_images

    found = find_images(images)
    model = from_pretrained(source).eval()
    memory = None if memory_data is None else open_remembered(memory_data)
    explanations = explain_files(model, found, top_k, memory, heatmaps, out, progress)
    named = [(name, explanation) for (_, name), explanation in zip(found, explanations, strict=True)]
    text = "\n\n".join(describe(model, name, explanation) for name, explanation in named)
    if out is not None:
        text += f"\n\nWritten: {out}"
    print_result(text, [{"image": name, **explanation.to_dict()} for name, explanation in named], json)


def evaluate(
    source: str, data: str = "", split: str = "test", json: str | None = None, progress: bool = IN_TERMINAL
) -> None:
    """Evaluates a model and its explanations over labelled images.

    Labels are matched to the model's classes by name if the data and the model both have class names.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        data: The images: an image folder or tar file, digits, or torch/NAME or hfds/OWNER/NAME as timm reads them.
        split: The split; of an image folder the folder in it, or '' if the classes are in the folder itself.
        json: File to write the metrics to as JSON, or - to print that instead of a table.
        progress: Whether to show progress bars; by default in a terminal.
    """
    from timm_memwrap.data import match_labels, open_source
    from timm_memwrap.explaining import evaluate_explanations
    from timm_memwrap.hub import from_pretrained

    dataset = open_source(data, split)
    model = from_pretrained(source).eval()
    metrics = evaluate_explanations(model, match_labels(model, dataset), progress=progress)
    print_result(metrics, {"source": source, "data": data, "split": split, **metrics.to_dict()}, json)


def report(
    source: str,
    data: str = "",
    split: str = "test",
    out: str | None = None,
    memory_data: str | None = None,
    json: str | None = None,
    progress: bool = IN_TERMINAL,
) -> None:
    """Finds remembered images that mislead, that are never read, or whose label the model disputes.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        data: Labelled images that the memory was not taken from, as in evaluate.
        split: As in evaluate.
        out: File to draw the worst to: a PNG, PDF or SVG, by its suffix.
        memory_data: As in explain.
        json: File to write the counts to as JSON, or - to print that instead of a table.
        progress: Whether to show progress bars; by default in a terminal.
    """
    from timm_memwrap.data import match_labels, open_remembered, open_source
    from timm_memwrap.explaining import memory_report, plot_memory_report
    from timm_memwrap.hub import from_pretrained

    dataset = open_source(data, split)
    memory = None if memory_data is None else open_remembered(memory_data)
    model = from_pretrained(source).eval()
    found = memory_report(model, match_labels(model, dataset), progress=progress)
    if out is not None:
        plot_memory_report(model, found, path=out, dataset=memory)
    print_result(found, found.to_dict(), json)
