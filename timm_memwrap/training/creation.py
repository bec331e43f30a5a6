"""Creates the model that a recipe describes, before training and after it."""

from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from timm_memwrap._utils import check_choice
from timm_memwrap.constants import BASELINE_PREFIX, PREFIX
from timm_memwrap.data import DIGITS, data_config
from timm_memwrap.memory_args import DEFAULT_OWN_READ_HEAD, OWN_READ_HEADS, resolve_memory_args
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.configuration import ModelConfig, Recipe
from timm_memwrap.wrapping import wrap

__all__ = ["check_model_config", "check_safetensors", "create_model", "in_chans_of", "wrap_trained"]


def check_model_config(config: ModelConfig, memory_mode: str) -> None:
    """Raises if the model of a recipe cannot be built."""
    name = config.name
    if name.startswith(PREFIX):
        backbone = name.removeprefix(PREFIX).removeprefix("baseline_").removeprefix("evidence_")
        raise ValueError(
            f"model.name={name!r} is a Memory Wrap model. Pass the backbone, {backbone!r}: memory.mode says how it is "
            f"used with a memory."
        )
    if not is_model(name):
        raise ValueError(f"Unknown model.name={name!r}. See timm.list_models().")
    if not is_model(PREFIX + name.split(".")[0]):
        raise ValueError(f"model.name={name!r} is a bare encoder: it has no classifier.")
    check_safetensors("model.pretrained_path", config.pretrained_path)
    # Images are read in grey or colour.
    check_choice("model.in_chans", config.in_chans, (None, 1, 3))
    wraps = memory_mode == "none"
    if config.read_head is not None and wraps != (config.read_head in OWN_READ_HEADS):
        raise ValueError(
            f"model.read_head={config.read_head!r} needs training with a memory, but memory.mode=none trains the plain "
            f"classifier. Leave read_head out, or pass memory.mode=batch, sample or queue."
            if wraps
            else f"model.read_head={config.read_head!r} reads with the backbone's own classifier, so memory.mode="
            f"{memory_mode!r} has no head to train. Pass memory.mode=none."
        )
    if wraps and config.scale == "learned":
        raise ValueError("model.scale='learned' needs training with a memory. Pass a number, or another memory.mode.")
    if not wraps and config.classifier == "vote":
        raise ValueError("model.classifier='vote' has no layer to train. Pass memory.mode=none, or another classifier.")
    read_head = config.read_head or (DEFAULT_OWN_READ_HEAD if wraps else "linear")
    resolve_memory_args(wraps or config.memory_only, **{**_memory_args(config), "read_head": read_head})


def check_safetensors(name: str, path: str | None) -> None:
    """Raises if a file of weights, which the option `name` gives, may hold pickles."""
    if path is not None and not path.endswith(".safetensors"):
        raise ValueError(
            f"{name}={path!r} is not a safetensors file. Pickles are not read: convert it with "
            f"safetensors.torch.save_file."
        )


def in_chans_of(recipe: Recipe) -> int:
    """Returns the number of channels of a recipe's images."""
    return recipe.model.in_chans or (1 if recipe.data.dataset == DIGITS else 3)


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Creates the model to train: the plain timm model for the mode `"none"`, else the Memory Wrap model.

    Size and normalisation of the images go into its pretrained cfg, from which timm makes transforms for the saved
    model.
    """
    config, data, in_chans = recipe.model, recipe.data, in_chans_of(recipe)
    cfg = get_pretrained_cfg(config.name)
    assert cfg is not None
    plain = recipe.memory.mode == "none"
    pretrained = config.pretrained or config.pretrained_path is not None
    overlay = _given(
        file=config.pretrained_path,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
    )
    for key in ("mean", "std"):
        if len(overlay.get(key, range(in_chans))) != in_chans:
            raise ValueError(f"data.{key}={overlay[key]} has {len(overlay[key])} values for {in_chans} channels.")
    size = data.img_size or cfg.input_size[-1]
    if size != cfg.input_size[-1] or in_chans != cfg.input_size[0]:
        overlay |= {"input_size": (in_chans, size, size), "test_input_size": None}
    name = config.name
    kwargs = config.kwargs | _given(drop_path_rate=config.drop_path_rate, drop_rate=config.drop_rate or None)
    if data.img_size is not None and cfg.fixed_input_size:
        kwargs.setdefault("img_size", data.img_size)
    if not plain:
        name = (BASELINE_PREFIX if config.memory_only else PREFIX) + name
        kwargs |= _memory_args(config)
    try:
        model = timm.create_model(
            name,
            pretrained=pretrained,
            # timm drops the classifier's weights if the number of classes changes, without checking that they fit.
            num_classes=cfg.num_classes if pretrained and plain else num_classes,
            in_chans=in_chans,
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )
    except TypeError as error:
        raise ValueError(f"{config.name} does not accept an argument of the recipe: {error}") from error
    except RuntimeError as error:
        source = config.pretrained_path or "the pretrained weights"
        raise ValueError(f"{source} do not fit {config.name}: {' '.join(str(error).split())[:300]}") from error
    images = data_config(model)
    model.pretrained_cfg |= {"mean": tuple(images["mean"]), "std": tuple(images["std"])}  # type: ignore[operator]
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
        model._model_args = {**getattr(model, "_model_args", {}), "num_classes": num_classes}  # type: ignore[assignment]
    scale = config.head_init_scale
    if scale is None:
        # A large random classifier spoils the backbone before it has learnt anything: with the range that timm's
        # EfficientNets start from, 61 % instead of 73 % (1,000 CIFAR-10 images, fine-tuned for 8 epochs).
        scale = 0.0 if pretrained and plain and cfg.num_classes != num_classes else 1.0
    if scale != 1.0:
        _scale_classifier(model, scale)
    if not plain and config.temperature is not None:
        model.temperature = config.temperature  # type: ignore[assignment]
    return model


def wrap_trained(model: nn.Module, config: ModelConfig) -> MemoryWrapModel:
    """Wraps a plain model that was trained; its classifier is read through the memory."""
    wrapped = wrap(model, **_memory_args(config))
    if config.temperature is not None:
        wrapped.temperature = config.temperature
    return wrapped


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _memory_args(config: ModelConfig) -> dict[str, Any]:
    return _given(**{name: getattr(config, name) for name in ("distance", "scale", "read_head", "classifier")})


@torch.no_grad()
def _scale_classifier(model: nn.Module, scale: float) -> None:
    classifiers = model.get_classifier()  # type: ignore[operator]
    for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        for parameter in classifier.parameters():
            parameter.mul_(scale)
