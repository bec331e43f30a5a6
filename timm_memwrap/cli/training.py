"""The commands that make a model: the quickstart, training, wrapping a trained classifier, and timm's own scripts."""

import runpy
import sys
from pathlib import Path
from typing import Any

from timm_memwrap._utils import printable
from timm_memwrap.cli.arguments import IN_TERMINAL
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.recipes import find_recipe, load_recipe

__all__ = ["quickstart", "run", "train", "wrap"]


def quickstart(out: str = "quickstart", recipe: str = "quickstart", progress: bool = IN_TERMINAL) -> None:
    """Trains a small model on digits, gives it a memory, explains, saves and reloads it, with nothing to download.

    Args:
        out: Folder for the model and the figure.
        recipe: Name of a recipe in hub_configs, or path of a YAML file of that form.
        progress: Whether to show progress bars; by default in a terminal.
    """
    from timm_memwrap.jobs.quickstart import run_quickstart

    path = find_recipe(recipe)
    print(f"Recipe {path}")
    loaded = load_recipe(path)
    report = run_quickstart(loaded, out, progress)
    name, trained = loaded.model.name, report.trained
    print(f"\nTest accuracy on scikit-learn's digits, {report.test_size} images")
    published = (report.published, f"memwrap_{name}, trained with the published head")
    _print_report(trained, f"plain {name}, trained here", published)
    print(
        f"Reloaded with timm.create_model: logits are "
        f"{'bit-identical' if report.reloaded_equal else 'DIFFERENT, which is a bug: please report it'}.\n"
        f"Figure: {report.figure}\n\n"
        f"Next, in Python:\n"
        f"  import timm, timm_memwrap\n"
        f'  model = timm.create_model("local-dir:{trained.directory}", pretrained=True).eval()\n'
        f"  for e in timm_memwrap.explain(model, images): print(e.prediction, e.examples, e.counterfactuals)"
    )


def train(
    out: str = "output", resume: bool = False, overwrite: bool = False, progress: bool = IN_TERMINAL, **sections: Any
) -> None:
    """Trains a model from a recipe, and leaves it with its memory, model card, metrics and curves in a folder.

    Args:
        out: Folder for all of it.
        resume: Whether to resume the training in this folder; with more epochs, a finished one goes on.
        overwrite: Whether to start over in a folder that holds a training.
        progress: Whether to show progress bars; by default in a terminal.
        **sections: As of Recipe.
    """
    from timm_memwrap.jobs.train import train as run

    recipe = Recipe(**sections)
    report = run(recipe, out, resume, overwrite, progress)
    if not report.first:
        return
    sampled = []
    if report.sampled_accuracies:
        mean = sum(report.sampled_accuracies) / len(report.sampled_accuracies)
        sampled = [(mean, f"with {recipe.memory.train_size} training images drawn for each batch, as in the paper")]
    print("\nValidation accuracy")
    _print_report(report, f"plain {recipe.model.name}", *sampled)


def wrap(model: str, data: str = "", out: str = "output", progress: bool = IN_TERMINAL, **options: Any) -> None:
    """Gives a trained classifier a memory in one pass over its training images, with nothing to train.

    Args:
        model: What timm.create_model takes, e.g. resnet50.a1_in1k, hf-hub:owner/name or local-dir:path; or a folder.
        data: The training images: an image folder, a tar file, digits, or a data set that timm can read.
        out: Folder for the model with its memory.
        progress: Whether to show progress bars; by default in a terminal.
        **options: As of wrap_classifier.
    """
    from timm_memwrap.jobs.wrap import wrap_classifier

    report = wrap_classifier(model, data, out, progress=progress, **options)
    _print_report(report, "accuracy of the classifier as it was")


def run(*args: str) -> None:
    """Runs a Python script, such as timm's train.py, with the Memory Wrap architectures registered in timm."""
    if not args or not Path(args[0]).is_file():
        raise SystemExit(
            f"usage: timm-memwrap run SCRIPT [ARGUMENTS ...]\n"
            f"{args[0] if args else 'SCRIPT'!r} is not a file. Pass the path of a script, e.g. of timm's train.py."
        )
    sys.argv = list(args)
    sys.path.insert(0, str(Path(args[0]).resolve().parent))
    runpy.run_path(args[0], run_name="__main__")


def _print_report(report: Any, plain: str, *more: tuple[float, str]) -> None:
    """Prints the accuracies of a training or wrapping, what its evidence is, and how to load the model."""
    if report.metrics is not None:
        through_memory = (report.metrics.accuracy, f"with the memory of {len(report.model.memory_bank)} samples")
        for accuracy, what in ((report.plain_accuracy, plain), through_memory, *more):
            if accuracy is not None:
                print(f"  {accuracy:7.2%}  {what}")
        metrics, wrong = report.metrics, report.metrics.identical_class_rate_wrong
        if report.model.multi_label:
            ranked = (metrics.mean_average_precision, through_memory[1])
            for precision, what in ((metrics.mean_average_precision_plain, plain), ranked):
                if precision is not None:
                    print(f"  {precision:7.2%}  {what}, by mean average precision (mAP) over the classes")
        errors = "" if wrong is None else f", and in {wrong:.1%} of the wrong ones"
        print(
            f"A prediction uses {metrics.support_size:.1f} samples on average. The strongest is of the predicted class "
            f"in {metrics.identical_class_rate:.1%} of predictions{errors}."
        )
        missed = [each for each in metrics.by_class if each.count and each.accuracy < 1]
        low = sorted(missed, key=lambda each: each.accuracy)[:3]
        if low:
            print(
                printable(f"Least accurate: {', '.join(f'{each.class_name} ({each.accuracy:.1%})' for each in low)}.")
            )
    source = f"local-dir:{report.directory}"
    print(f'Saved in {report.directory}: timm.create_model("{source}", pretrained=True), after import timm_memwrap.')
