"""Creates the model that a recipe describes, before training and after it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from timm_memwrap import registry
from timm_memwrap._utils import check_choice
from timm_memwrap.constants import BASELINE_PREFIX, PREFIX
from timm_memwrap.data import DIGITS, data_config, known_class_names
from timm_memwrap.memory_args import (
    DEFAULT_OWN_READ_HEAD,
    MEMORY_ARGS,
    MULTI_LABEL_READ_HEAD,
    OWN_READ_HEADS,
    resolve_memory_args,
)
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.configuration import DataConfig, ModelConfig, Recipe
from timm_memwrap.whole_model import split_revision
from timm_memwrap.wrapping import wrap

__all__ = [
    "adapt_source",
    "check_model_config",
    "check_safetensors",
    "create_model",
    "in_chans_of",
    "load_source",
    "source_of",
    "wrap_trained",
]

_logger = logging.getLogger(__name__)


def check_model_config(config: ModelConfig, memory_mode: str) -> None:
    """Raises if the model of a recipe cannot be built."""
    name = config.name
    if source_of(name):
        if config.pretrained_path is not None:
            raise ValueError(
                f"model.name={name!r} is a model with weights, so model.pretrained_path={config.pretrained_path!r} "
                f"cannot be loaded too. Pass one of them."
            )
    elif name.startswith(PREFIX):
        backbone = name.removeprefix(PREFIX).removeprefix("baseline_").removeprefix("evidence_")
        raise ValueError(
            f"model.name={name!r} is a Memory Wrap model. Pass the backbone, {backbone!r}: memory.mode says how it is "
            f"used with a memory."
        )
    elif not is_model(name):
        raise ValueError(
            f"Unknown model.name={name!r}. Pass one of timm.list_models(), 'hf-hub:owner/name', or a folder."
        )
    elif not is_model(PREFIX + name.split(".")[0]):
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
            f"{name}={path!r} is not a safetensors file. Pickles are not read: convert a checkpoint of timm's train.py "
            f"with timm's clean_checkpoint.py --checkpoint {Path(path).name} --safetensors, other weights with "
            f"safetensors.torch.save_file."
        )


def in_chans_of(recipe: Recipe) -> int:
    """Returns the number of channels of a recipe's images."""
    return recipe.model.in_chans or (1 if recipe.data.dataset == DIGITS else 3)


def source_of(name: str) -> str | None:
    """Returns what `timm.create_model` calls a model on the Hub or in a folder; `None` for an architecture."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return name
    return f"local-dir:{name}" if name and os.path.isdir(name) and not is_model(name) else None


def load_source(recipe: Recipe) -> nn.Module | None:
    """Loads the model on the Hub or in a folder that a recipe continues to train; `None` for an architecture."""
    config, data = recipe.model, recipe.data
    source = source_of(config.name)
    if source is None:
        return None
    kwargs = _given(in_chans=config.in_chans)
    model = _timm_model(source, config, pretrained=True, **kwargs)
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if data.img_size is not None and cfg["fixed_input_size"]:
        model = _timm_model(source, config, pretrained=True, **{"img_size": data.img_size, **kwargs})
    model.pretrained_cfg |= _image_cfg(data, cfg["input_size"], model.in_chans)  # type: ignore[operator, arg-type]
    return model


def adapt_source(source: nn.Module, recipe: Recipe, classes: list[str]) -> nn.Module:
    """Makes the model to train of one from `load_source`, as `create_model` makes one of an architecture.

    A classifier or head of the same classes that the recipe can go on with is kept, else there is a new one.
    """
    config, num_classes, plain = recipe.model, len(classes), recipe.memory.mode == "none"
    same = source.num_classes == num_classes and known_class_names(source) in ([], classes)
    args, backbone = _memory_args(config), source
    cfg: dict[str, Any] = source.pretrained_cfg  # type: ignore[assignment]
    if not same:
        cfg.pop("label_names", None)
        cfg.pop("label_descriptions", None)
    if isinstance(source, MemoryWrapModel):
        wanted = {"memory_only": config.memory_only, **args}
        has = {"memory_only": source.memory_only, **source.memory_args}
        if not plain and same and not source.keeps_classifier and all(has[name] == wanted[name] for name in wanted):
            source.memory_bank.clear()
            source.temperature = 1.0 if config.temperature is None else config.temperature
            source.base_model = split_revision(cfg["hf_hub_id"])[0] if cfg.get("source") == "hf-hub" else None
            return source
        backbone = source.backbone
        architecture = backbone.pretrained_cfg["architecture"]
        backbone.pretrained_cfg = registry.backbone_cfg(cfg, architecture)
        backbone._model_args = {k: v for k, v in source._model_args.items() if k not in MEMORY_ARGS}
    scale = config.head_init_scale
    if not plain:
        options = {"memory_only": config.memory_only, "read_head": "linear", **args}
        wrapped = wrap(backbone, num_classes=num_classes, **options)
        _scale_classifier(wrapped, 1.0 if scale is None else scale)
        wrapped.temperature = 1.0 if config.temperature is None else config.temperature
        return wrapped
    if not same or backbone.num_classes != num_classes:
        _logger.info("%s gets a new classifier, of the classes of the data.", config.name)
        _reset_classifier(backbone, num_classes)
        _scale_classifier(backbone, 0.0 if scale is None else scale)
    return backbone


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
    name, kwargs = config.name, dict[str, Any]()
    if data.img_size is not None and cfg.fixed_input_size:
        kwargs["img_size"] = data.img_size
    if not plain:
        name = (BASELINE_PREFIX if config.memory_only else PREFIX) + name
        kwargs |= _memory_args(config)
    model = _timm_model(
        name,
        config,
        pretrained=pretrained,
        # timm drops the classifier's weights if the number of classes changes, without checking that they fit.
        num_classes=cfg.num_classes if pretrained and plain else num_classes,
        in_chans=in_chans,
        pretrained_cfg_overlay=_given(file=config.pretrained_path) | _image_cfg(data, cfg.input_size, in_chans),
        **kwargs,
    )
    images = data_config(model)
    model.pretrained_cfg |= {"mean": tuple(images["mean"]), "std": tuple(images["std"])}  # type: ignore[operator]
    if model.num_classes != num_classes:
        _reset_classifier(model, num_classes)
    scale = config.head_init_scale
    if scale is None:
        # A large random classifier spoils the backbone before it has learnt anything: with the range that timm's
        # EfficientNets start from, 61 % instead of 73 % (1,000 CIFAR-10 images, fine-tuned for 8 epochs).
        scale = 0.0 if pretrained and plain and cfg.num_classes != num_classes else 1.0
    _scale_classifier(model, scale)
    if not plain and config.temperature is not None:
        model.temperature = config.temperature  # type: ignore[assignment]
    return model


def wrap_trained(model: nn.Module, config: ModelConfig, multi_label: bool = False) -> MemoryWrapModel:
    """Wraps a plain model that was trained, on images of several classes or not, to be read through its classifier."""
    several = {"read_head": MULTI_LABEL_READ_HEAD} if multi_label else {}
    wrapped = wrap(model, **{**several, **_memory_args(config)})
    if config.temperature is not None:
        wrapped.temperature = config.temperature
    return wrapped


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _timm_model(name: str, config: ModelConfig, **kwargs: Any) -> nn.Module:
    kwargs |= config.kwargs | _given(drop_path_rate=config.drop_path_rate, drop_rate=config.drop_rate or None)
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f"{config.name} does not accept an argument of the recipe: {error}") from error
    except RuntimeError as error:
        source = config.pretrained_path or "the pretrained weights"
        raise ValueError(f"{source} do not fit {config.name}: {' '.join(str(error).split())[:300]}") from error


def _image_cfg(data: DataConfig, input_size: Sequence[int], in_chans: int) -> dict[str, Any]:
    """Returns what a recipe says of its images as entries of a pretrained cfg whose images have another size."""
    entries = _given(mean=data.mean, std=data.std, interpolation=data.interpolation, crop_pct=data.crop_pct)
    for key in ("mean", "std"):
        if len(entries.get(key, range(in_chans))) != in_chans:
            raise ValueError(f"data.{key}={entries[key]} has {len(entries[key])} values for {in_chans} channels.")
    size = data.img_size or input_size[-1]
    if size != input_size[-1] or in_chans != input_size[0]:
        entries |= {"input_size": (in_chans, size, size), "test_input_size": None}
    return entries


def _reset_classifier(model: nn.Module, num_classes: int) -> None:
    model.reset_classifier(num_classes)  # type: ignore[operator]
    model._model_args = {**getattr(model, "_model_args", {}), "num_classes": num_classes}  # type: ignore[assignment]


def _memory_args(config: ModelConfig) -> dict[str, Any]:
    return _given(**{name: getattr(config, name) for name in MEMORY_ARGS})


@torch.no_grad()
def _scale_classifier(model: nn.Module, scale: float) -> None:
    classifiers = model.get_classifier()  # type: ignore[operator]
    for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        for parameter in classifier.parameters():
            parameter.mul_(scale)
