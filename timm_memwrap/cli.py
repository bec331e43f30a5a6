"""The `timm-memwrap` command: parses, calls, prints. Each function below `COMMANDS` is a subcommand.

Heavy imports stand inside the functions, so that `--help` is quick.
"""

import logging
import sys
from typing import Any

from jsonargparse import auto_cli

__all__ = ["main"]


def quickstart(out: str = "quickstart", recipe: str = "quickstart", progress: bool = True) -> None:
    """Trains a small model on digits, gives it a memory, explains, saves and reloads it, with nothing to download.

    Args:
        out: Folder for the model and the figure.
        recipe: Name of a recipe in hub_configs, or path of a YAML file of that form.
        progress: Whether to show progress bars.
    """
    from timm_memwrap.training.configuration import QuickstartConfig, find_recipe, load_config
    from timm_memwrap.training.quickstart import run_quickstart

    path = find_recipe(recipe)
    print(f"Recipe {path}")
    config = load_config(QuickstartConfig, path)
    report = run_quickstart(config, out, progress)
    name = config.model.name
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


COMMANDS: dict[str, Any] = {"quickstart": quickstart}


def main(args: list[str] | None = None) -> int:
    """Runs the command line, and returns the exit status: 0, or 1 with one line that says what is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        auto_cli(COMMANDS, args=args, prog="timm-memwrap", as_positional=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"timm-memwrap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
