"""The main job from end to end, on images that come with scikit-learn."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_memwrap.building import build_memory_bank
from timm_memwrap.explaining import explain, plot_explanations
from timm_memwrap.hub import save_pretrained
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.registration import wrap
from timm_memwrap.training.configuration import QuickstartConfig
from timm_memwrap.training.datasets import Digits
from timm_memwrap.training.loop import evaluate, train

__all__ = ["QuickstartReport", "run_quickstart"]

# Images in the figure.
_SHOWN = 4


@dataclass(frozen=True)
class QuickstartReport:
    """What the quickstart measured and left.

    Args:
        plain: Test accuracy of the plain timm model, 0 to 1.
        memory: Test accuracy of the same weights read through the memory alone.
        test_size: Number of test images.
        published: Test accuracy of a model trained with the published Memory Wrap head.
        strongest_agrees: Fraction of test images whose strongest memory sample is of the predicted class.
        support: Mean number of memory samples that a prediction used.
        memory_size: Number of samples in the bank.
        directory: Folder of the saved model.
        figure: Picture of predictions with the memory samples that they used.
        reloaded_equal: Whether the model reloaded by stock timm gives bit-identical logits.
    """

    plain: float
    memory: float
    test_size: int
    published: float
    strongest_agrees: float
    support: float
    memory_size: int
    directory: Path
    figure: Path
    reloaded_equal: bool


def run_quickstart(config: QuickstartConfig, out: str | os.PathLike, progress: bool = True) -> QuickstartReport:
    """Trains, wraps, remembers, explains, saves and reloads a small model.

    Args:
        config: What to train and how.
        out: Folder for the model and the figure.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the configuration does not fit.
    """
    name = config.model.name
    if not timm.is_model(f"memwrap_{name}"):
        raise ValueError(f"model.name={name!r} is not a timm architecture that can classify. See timm.list_models().")
    torch.manual_seed(config.training.seed)
    # What the images are goes into the cfg, so that the saved model's own transform suits them.
    size = (1, config.data.img_size, config.data.img_size)
    images = {"input_size": size, "test_input_size": None, "mean": (0.3,), "std": (0.38,), "crop_pct": 1.0}
    args: dict[str, Any] = {"num_classes": 10, "in_chans": 1, "pretrained_cfg_overlay": images}
    plain = timm.create_model(name, **args)
    data = resolve_model_data_config(plain)
    # Digits have no mirror images, and at 8x8 no detail to lose.
    augment = create_transform(**data, is_training=True, hflip=0.0, scale=(0.7, 1.0), color_jitter=0.0, re_prob=0.0)
    plain_transform = create_transform(**data)
    generator = torch.Generator().manual_seed(config.training.seed)
    train_loader = DataLoader(
        Digits("train", augment), config.data.batch_size, shuffle=True, drop_last=True, generator=generator
    )
    test_data = Digits("test", plain_transform)
    test_loader = DataLoader(test_data, 128)
    memory_data = Digits("train", plain_transform)

    def remember(model: MemoryWrapModel) -> None:
        build_memory_bank(
            model,
            memory_data,
            size=config.memory.size,
            selection=config.memory.selection,
            store_images=config.memory.store_images,
            progress=progress,
            dataset_name="scikit-learn digits",
        )

    train(plain, train_loader, config.training, f"Plain {name}", progress)
    plain_accuracy = evaluate(plain, test_loader)

    model = wrap(plain)
    remember(model)
    memory_accuracy = evaluate(model, test_loader)
    agrees, support = _evidence(model, test_loader)

    published = timm.create_model(
        f"memwrap_{name}",
        distance=config.model.distance,
        read_head=config.model.read_head,
        classifier=config.model.classifier,
        **args,
    )
    assert isinstance(published, MemoryWrapModel)
    train(published, train_loader, config.training, f"memwrap_{name}", progress)
    remember(published)
    published_accuracy = evaluate(published, test_loader)

    card = {"name": "Digits with their evidence", "accuracy": memory_accuracy}
    directory = save_pretrained(model, out, model_card=card, overwrite_card=True)
    figure = directory / "explanations.png"
    shown, labels = _interesting(model, test_loader)
    plot_explanations(model, shown, explain(model, shown), labels=labels, path=figure)
    reloaded = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    with torch.inference_mode():
        equal = all(torch.equal(model(x), reloaded(x)) for x, _ in test_loader)
    return QuickstartReport(
        plain_accuracy,
        memory_accuracy,
        len(test_data),
        published_accuracy,
        agrees,
        support,
        len(model.memory_bank),
        directory,
        figure,
        equal,
    )


@torch.inference_mode()
def _evidence(model: MemoryWrapModel, loader: DataLoader) -> tuple[float, float]:
    """Returns how often the strongest sample is of the predicted class, and the mean number of samples used."""
    assert model.memory_bank.labels is not None
    agrees, support = [], []
    for images, _ in loader:
        readout = model.read_memory(images)
        agrees.append(model.memory_bank.labels[readout.indices[:, 0]] == readout.logits.argmax(dim=-1))
        support.append((readout.weights > 0).sum(dim=-1).float())
    return torch.cat(agrees).float().mean().item(), torch.cat(support).mean().item()


@torch.inference_mode()
def _interesting(model: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Returns the test images that the model is least sure of, one a class: they show the most."""
    images = torch.cat([x for x, _ in loader])
    labels = torch.cat([y for _, y in loader])
    best = torch.cat([model(x) for x, _ in loader]).softmax(dim=-1).amax(dim=-1)
    chosen: list[int] = []
    for i in best.argsort().tolist():
        if len(chosen) < _SHOWN and int(labels[i]) not in {int(labels[j]) for j in chosen}:
            chosen.append(i)
    return images[chosen], labels[chosen]
