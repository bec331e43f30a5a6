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


COMMANDS: dict[str, Any] = {"quickstart": quickstart, "push": push, "pull": pull, "inspect": inspect}


def main(args: list[str] | None = None) -> int:
    """Runs the command line, and returns the exit status: 0, or 1 with one line that says what is wrong."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("timm_memwrap").setLevel(logging.INFO)
    try:
        auto_cli(COMMANDS, args=args, prog="timm-memwrap", as_positional=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"timm-memwrap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
