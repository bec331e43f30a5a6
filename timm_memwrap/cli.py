"""The `timm-memwrap` command: parses, calls, prints. Each function below `COMMANDS` is a subcommand.

Heavy imports stand inside the functions, so that `--help` is quick.
"""

import logging
import sys
from typing import Any

from jsonargparse import auto_cli

from timm_memwrap.arguments import Parser, expand
from timm_memwrap.comparing.configuration import ComparisonConfig
from timm_memwrap.training.configuration import DataConfig, HubConfig, MemoryConfig, ModelConfig, TrainingConfig

__all__ = ["main"]


def quickstart(out: str = "quickstart", recipe: str = "quickstart", progress: bool = True) -> None:
    """Trains a small model on digits, gives it a memory, explains, saves and reloads it, with nothing to download.

    Args:
        out: Folder for the model and the figure.
        recipe: Name of a recipe in hub_configs, or path of a YAML file of that form.
        progress: Whether to show progress bars.
    """
    from timm_memwrap.training.quickstart import run_quickstart
    from timm_memwrap.training.recipes import find_recipe, load_recipe

    path = find_recipe(recipe)
    print(f"Recipe {path}")
    loaded = load_recipe(path)
    report = run_quickstart(loaded, out, progress)
    name = loaded.model.name
    print(
        f"\nTest accuracy on scikit-learn's digits, {report.test_size} images\n"
        f"  {report.plain:7.2%}  plain {name}, trained here\n"
        f"  {report.memory:7.2%}  the same weights, through a memory of {report.memory_size} training images alone\n"
        f"  {report.published:7.2%}  memwrap_{name}, trained with the published head\n"
        f"Evidence: the strongest sample is of the predicted class in {report.strongest_agrees:.1%} of predictions, "
        f"which use {report.support:.1f} samples on average.\n"
        f"Reloaded with timm.create_model: logits are "
        f"{'bit-identical' if report.reloaded_equal else 'DIFFERENT, which is a bug: please report it'}.\n"
        f"Figure: {report.figure}\n\n"
        f"Next, in Python:\n"
        f"  import timm, timm_memwrap\n"
        f'  model = timm.create_model("local-dir:{report.directory}", pretrained=True).eval()\n'
        f"  for e in timm_memwrap.explain(model, images): print(e.prediction, e.examples, e.counterfactuals)"
    )


def train(
    model: ModelConfig = ModelConfig(),  # noqa: B008
    data: DataConfig = DataConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008
    hub: HubConfig = HubConfig(),  # noqa: B008
    out: str = "output",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Trains a model from a recipe and leaves it in a folder with its memory, model card, metrics and curves.

    Args:
        model: The backbone, and how a memory is read.
        data: The images.
        training: The schedule.
        memory: The memory.
        hub: The repository on the Hugging Face Hub.
        out: Folder for all that is left.
        resume: Whether to go on with an interrupted training in this folder.
        overwrite: Whether to start anew in a folder that holds a training.
        progress: Whether to show progress bars; null for if there is a terminal.
    """
    from timm_memwrap.training.configuration import Recipe
    from timm_memwrap.training.training import train as run

    report = run(Recipe(model, data, training, memory, hub), out, resume, overwrite, progress)
    if not report.first:
        return
    print(
        f"\nValidation accuracy\n  {report.accuracy:7.2%}  with the memory of {len(report.model.memory_bank)} samples"
    )
    if report.plain_accuracy is not None:
        print(f"  {report.plain_accuracy:7.2%}  plain {model.name}")
    if report.sampled_accuracies:
        mean = sum(report.sampled_accuracies) / len(report.sampled_accuracies)
        print(f"  {mean:7.2%}  with {memory.train_size} training images drawn for each batch, as in the paper")
    print(
        f"Evidence: the strongest sample is of the predicted class in {report.metrics.explanation_accuracy:.1%} of "
        f"predictions, which use {report.metrics.support_size:.1f} samples on average.\n"
        f'Saved in {report.directory}: timm.create_model("local-dir:{report.directory}", pretrained=True), after '
        f"import timm_memwrap."
    )


def wrap(
    model: str,
    data: str = "",
    out: str = "output",
    checkpoint: str | None = None,
    split: str = "train",
    val_split: str | None = None,
    calibrate: bool = True,
    size: int | None = 1000,
    selection: str = "balanced",
    store_images: bool = False,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    progress: bool | None = None,
) -> None:
    """Gives a trained classifier a memory in one pass over its training images, with nothing to train.

    Args:
        model: What timm.create_model takes, e.g. resnet50.a1_in1k, hf-hub:owner/name or local-dir:path; or a folder.
        data: The training images: an image folder, a tar file, digits, or a data set that timm can read.
        out: Folder for the model with its memory.
        checkpoint: A safetensors file with the weights of the architecture, instead of pretrained ones.
        split: Split of the data to remember.
        val_split: Split to measure with; null for none.
        calibrate: Whether to fit the temperature to val_split, if there is one; no predicted class changes.
        size: How many samples to remember; null for all.
        selection: How they are chosen: balanced, random, kmeans or all.
        store_images: Whether small images of them are kept, for people to look at.
        seed: Seed of the choice.
        device: A torch device.
        workers: Processes that load images.
        progress: Whether to show progress bars; null for if there is a terminal.
    """
    from timm_memwrap.training.wrapping import wrap_classifier

    report = wrap_classifier(
        model,
        data,
        out,
        checkpoint=checkpoint,
        split=split,
        val_split=val_split,
        calibrate=calibrate,
        size=size,
        selection=selection,
        store_images=store_images,
        seed=seed,
        device=device,
        workers=workers,
        progress=_shown(progress),
    )
    if report.plain_accuracy is not None:
        print(f"{report.plain_accuracy:7.2%}  accuracy of the classifier as it was")
    if report.metrics is not None:
        print(
            f"{report.metrics.accuracy:7.2%}  accuracy through its memory of {len(report.model.memory_bank)} samples\n"
            f"{report.metrics.explanation_accuracy:7.1%}  of the strongest samples are of the predicted class; "
            f"{report.metrics.support_size:.1f} samples a prediction"
        )
    print(
        f'Saved in {report.directory}: timm.create_model("local-dir:{report.directory}", pretrained=True), after '
        f"import timm_memwrap."
    )


def push(
    folder: str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Push model with its memory",
    include_images: bool = False,
) -> None:
    """Pushes a model with its memory from a folder to the Hugging Face Hub, in one commit.

    Log in first with `hf auth login`, or set HF_TOKEN.

    Args:
        folder: Folder that save_pretrained or pull wrote.
        repo_id: The repository, owner/name; made if absent.
        private: Whether a repository that is made is private.
        revision: Branch to push to; made if absent.
        create_pr: Whether to open a pull request instead.
        message: First line of the commit.
        include_images: Whether the images in the memory are sent.
    """
    from timm_memwrap.hub import push_folder

    commit = push_folder(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        include_images=include_images,
    )
    print(f"Pushed {folder} to {repo_id}: {commit.pr_url or commit.commit_url}")
    print(f'Load it with timm.create_model("hf-hub:{repo_id}", pretrained=True), after import timm_memwrap.')


def pull(repo_id: str, folder: str, overwrite: bool = False) -> None:
    """Downloads a model with its memory from the Hugging Face Hub to a folder, and checks that it is whole.

    Args:
        repo_id: The repository, owner/name or owner/name@revision.
        folder: Folder to write to; made if absent.
        overwrite: Whether to replace a model that the folder holds.
    """
    from timm_memwrap.hub import pull as download

    path = download(repo_id, folder, overwrite=overwrite)
    print(f"Pulled {repo_id} to {path}: {', '.join(sorted(file.name for file in path.iterdir()))}")


def inspect(source: str) -> None:
    """Says what a model in a folder or on the Hugging Face Hub is and remembers.

    Args:
        source: A folder, or a repository, owner/name or owner/name@revision.
    """
    from timm_memwrap.hub import summarize

    print(summarize(source).report())


def explain(
    source: str,
    images: list[str],
    out: str | None = None,
    top_k: int = 5,
    memory_data: str | None = None,
    heatmaps: str | None = None,
    json: str | None = None,
    progress: bool | None = None,
) -> None:
    """Explains images by the remembered images that their predictions used.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        images: Image files, or folders of them.
        out: HTML file to write a report to, with pictures.
        top_k: How many remembered images to show for each.
        memory_data: The data that the memory was built from, for pictures that the model does not hold. As in evaluate;
            an image folder is taken as it is, and of other data the training split.
        heatmaps: Show in the report where in the images the prediction comes from, by this method:
            integrated_gradients, input_x_gradient or saliency. Needs memory_data and out.
        json: File to write the explanations to as JSON, or - to print that instead of tables.
        progress: Whether to show progress bars; null for if there is a terminal.
    """
    from timm_memwrap.explaining.commands import describe, explain_files, find_images, to_json
    from timm_memwrap.hub import from_pretrained
    from timm_memwrap.training.datasets import open_remembered

    found = find_images(images)
    model = from_pretrained(source).eval()
    memory = None if memory_data is None else open_remembered(memory_data)
    explanations = explain_files(model, found, top_k, memory, heatmaps, out, _shown(progress))
    named = [(name, explanation) for (_, name), explanation in zip(found, explanations, strict=True)]
    text = to_json([{"image": name, **explanation.to_dict()} for name, explanation in named], json) if json else ""
    if json == "-":
        print(text)
        return
    print("\n\n".join(describe(model, name, explanation) for name, explanation in named))
    for path in filter(None, (out, json)):
        print(f"\nWritten: {path}")


def evaluate(
    source: str, data: str = "", split: str = "test", json: str | None = None, progress: bool | None = None
) -> None:
    """Evaluates a model and its explanations over labelled images.

    Labels are matched to the model's classes by name, where the data and the model both name them.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        data: The images: an image folder or tar file, digits, or torch/NAME or hfds/OWNER/NAME as timm reads them.
        split: The split; of an image folder the folder in it, or '' if the classes are in the folder itself.
        json: File to write the numbers to as JSON, or - to print that instead of a table.
        progress: Whether to show progress bars; null for if there is a terminal.
    """
    from timm_memwrap.explaining import evaluate_explanations
    from timm_memwrap.explaining.commands import to_json
    from timm_memwrap.explaining.labels import match_labels
    from timm_memwrap.hub import from_pretrained
    from timm_memwrap.training.datasets import open_source

    dataset = open_source(data, split)
    model = from_pretrained(source).eval()
    metrics = evaluate_explanations(model, match_labels(model, dataset), progress=_shown(progress))
    text = to_json({"source": source, "data": data, "split": split, **metrics.to_dict()}, json) if json else ""
    print(text if json == "-" else metrics)


def report(
    source: str,
    data: str = "",
    split: str = "test",
    out: str | None = None,
    memory_data: str | None = None,
    json: str | None = None,
    progress: bool | None = None,
) -> None:
    """Finds remembered images that mislead, that are never read, or whose label the model disputes.

    Args:
        source: The model: a folder, or a repository on the Hub, owner/name or owner/name@revision.
        data: Labelled images that the memory was not taken from, as in evaluate.
        split: As in evaluate.
        out: File to draw the worst to, by its suffix a PNG, PDF or SVG.
        memory_data: As in explain.
        json: File to write what was counted to as JSON, or - to print that instead of a table.
        progress: Whether to show progress bars; null for if there is a terminal.
    """
    from timm_memwrap.explaining import memory_report, plot_memory_report
    from timm_memwrap.explaining.commands import to_json
    from timm_memwrap.explaining.labels import match_labels
    from timm_memwrap.hub import from_pretrained
    from timm_memwrap.training.datasets import open_remembered, open_source

    dataset = open_source(data, split)
    memory = None if memory_data is None else open_remembered(memory_data)
    model = from_pretrained(source).eval()
    found = memory_report(model, match_labels(model, dataset), progress=_shown(progress))
    if out is not None:
        plot_memory_report(model, found, path=out, dataset=memory)
    text = to_json(found.to_dict(), json) if json else ""
    print(text if json == "-" else found)


def _shown(progress: bool | None) -> bool:
    """Returns whether to show progress bars; by default where someone can see them move."""
    return sys.stderr.isatty() if progress is None else progress


def export(
    source: str,
    out: str | None = None,
    format: str = "onnx",
    with_evidence: bool = False,
    top_k: int = 5,
) -> None:
    """Exports a model with its memory to one file that needs neither timm nor this package, and checks it.

    Args:
        source: A folder, or a repository, owner/name or owner/name@revision.
        out: File to write; null for the name of the source, here.
        format: onnx, or export for a .pt2 file of torch.export.
        with_evidence: Whether the file also gives the weights of the strongest samples, and their indices.
        top_k: How many samples with_evidence gives.
    """
    from timm_memwrap.exporting import default_path, export_model

    path = default_path(source, format) if out is None else out
    report = export_model(source, path, format, with_evidence=with_evidence, top_k=top_k)
    size = ", ".join(map(str, report.input_size))
    checked = "not checked" if report.difference is None else f"{report.difference:.1e} from the model at most"
    print(f"Exported {source} to {report.path}: {checked}.")
    print(f"  image [batch, {size}], of any batch size -> {', '.join(report.outputs)}")


def compare(
    model: ModelConfig = ModelConfig(),  # noqa: B008
    data: DataConfig = DataConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008
    comparison: ComparisonConfig = ComparisonConfig(),  # noqa: B008
    out: str = "comparison",
    progress: bool | None = None,
) -> None:
    """Trains heads side by side on the same images and seeds, and measures them and their evidence.

    Started again with the same folder it goes on where it was; heads and seeds may be added.

    Args:
        model: The backbone.
        data: The images; the validation split is what the heads are compared on.
        training: The schedule.
        memory: The memory of the heads that are trained with one.
        comparison: Which heads, and how they are measured.
        out: Folder for the trainings, the measures, the table and the figure.
        progress: Whether to show progress bars; null for if there is a terminal.
    """
    from timm_memwrap.comparing.comparison import compare as run
    from timm_memwrap.comparing.configuration import Comparison

    report = run(Comparison(model, data, training, memory, comparison=comparison), out, _shown(progress))
    print(f"{report}\n\nWritten: {report.directory}")


COMMANDS: dict[str, Any] = {
    "quickstart": quickstart,
    "train": train,
    "wrap": wrap,
    "push": push,
    "pull": pull,
    "inspect": inspect,
    "explain": explain,
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "compare": compare,
}


def main(args: list[str] | None = None) -> int:
    """Runs the command line, and returns the exit status: 0, or 1 with one line that says what is wrong."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("timm_memwrap").setLevel(logging.INFO)
    try:
        arguments = expand(sys.argv[1:] if args is None else args)
        auto_cli(
            COMMANDS,
            args=arguments,
            prog="timm-memwrap",
            as_positional=True,
            parser_class=Parser,
            config_help="Options from a YAML file, or a recipe that comes with the package, by its name.",
        )
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"timm-memwrap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
