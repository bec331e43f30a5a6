"""Trains, wraps, explains, saves and reloads a small model on images that come with scikit-learn."""

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader

from timm_memwrap.data import data_config
from timm_memwrap.hub import save_pretrained
from timm_memwrap.jobs.figures import plot_least_sure
from timm_memwrap.jobs.train import TrainingReport, train
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.fitting import check_one_class_each, open_data

__all__ = ["QuickstartReport", "run_quickstart"]


@dataclass(frozen=True)
class QuickstartReport:
    """The result of the quickstart."""

    trained: TrainingReport  # of the plain timm model, which is then read through its memory alone
    published: float  # test accuracy of a model trained with the published Memory Wrap head, 0 to 1
    test_size: int  # number of test images
    figure: Path  # predictions with the memory samples that they used
    reloaded_equal: bool  # whether the model reloaded with timm gives bit-identical logits


def run_quickstart(recipe: Recipe, out: str | os.PathLike, progress: bool = True) -> QuickstartReport:
    """Trains, wraps, explains, saves and reloads a model in a folder, and trains another with the published head."""
    if recipe.memory.mode != "none":
        raise ValueError(
            f"memory.mode={recipe.memory.mode!r}: the quickstart trains the plain classifier. Pass none, or call train."
        )
    check_one_class_each(recipe, "The quickstart")
    report = train(recipe, out, overwrite=True, progress=progress)
    with_head = copy.deepcopy(recipe)
    with_head.memory.mode = "batch"
    with tempfile.TemporaryDirectory() as folder:
        published = train(with_head, folder, progress=progress).accuracy

    model = report.model
    _, test_data = open_data(recipe, progress=False)
    loader: DataLoader = DataLoader(test_data.with_transform(create_transform(**data_config(model))), 128)
    figure = plot_least_sure(model, loader, report.directory / "explanations.png")
    card = {"name": "Digits with their evidence", "accuracy": report.accuracy}
    save_pretrained(model, report.directory, model_card=card, overwrite_card=True)
    reloaded = timm.create_model(f"local-dir:{report.directory}", pretrained=True).eval()
    with torch.inference_mode():
        equal = all(torch.equal(model(x), reloaded(x)) for x, _ in loader)
    return QuickstartReport(report, published, len(test_data), figure, equal)
