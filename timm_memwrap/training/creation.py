"""The model that a recipe describes, before training and after it."""

from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from timm_memwrap.constants import BASELINE_PREFIX, PREFIX
from timm_memwrap.model import DEFAULT_KEPT, KEPT_CLASSIFIER, MemoryWrapModel, resolve_memory_args
from timm_memwrap.registration import wrap
from timm_memwrap.training.configuration import DataConfig, ModelConfig

__all__ = ["check_model_config", "create_model", "image_config", "wrap_trained"]

_MODES = {1: "L", 3: "RGB"}


def check_model_config(config: ModelConfig, memory_mode: str) -> None:
    """Refuses what cannot be built, before data is read.

    Raises:
        ValueError: If the architecture is unknown, or arguments do not fit each other.
    """
    if config.name.startswith(PREFIX):
        raise ValueError(
            f"model.name={config.name!r} is a Memory Wrap model. Name the backbone, {config.name[len(PREFIX) :]!r}: "
            f"memory.mode says how the memory is used."
        )
    if not is_model(config.name):
        raise ValueError(f"Unknown model.name={config.name!r}. See timm.list_models().")
    if not is_model(PREFIX + config.name.split(".")[0]):
        raise ValueError(f"model.name={config.name!r} is a bare encoder: it has no classifier.")
    if config.pretrained_path is not None and not config.pretrained_path.endswith(".safetensors"):
        raise ValueError(
            f"model.pretrained_path={config.pretrained_path!r} is not a safetensors file. Pickles are not read: "
            f"convert it with safetensors.torch.save_file."
        )
    if config.in_chans is not None and config.in_chans not in _MODES:
        raise ValueError(f"model.in_chans={config.in_chans}: images are read in grey (1) or colour (3).")
    args = memory_args(config, memory_mode)
    resolve_memory_args(**args)
    if memory_mode == "none" and config.scale == "learned":
        raise ValueError(
            "model.scale='learned' needs training with a memory, but memory.mode=none trains without. Pass a number, "
            "or another mode."
        )
    if memory_mode != "none" and config.classifier == "vote":
        raise ValueError(
            f"model.classifier='vote' has no layer to train, so memory.mode={memory_mode!r} cannot train it. Pass "
            f"memory.mode=none."
        )


def memory_args(config: ModelConfig, memory_mode: str) -> dict[str, Any]:
    """Returns the memory's arguments, with what suits the mode where nothing is said."""
    read_head = config.read_head or (DEFAULT_KEPT if memory_mode == "none" else "linear")
    memory_only = config.memory_only
    if memory_only is None:
        memory_only = read_head in KEPT_CLASSIFIER or config.classifier == "vote"
    if memory_mode == "none" and read_head not in KEPT_CLASSIFIER:
        raise ValueError(
            f"model.read_head={read_head!r} needs training, but memory.mode=none trains the plain classifier. Leave "
            f"read_head out, or pass memory.mode=batch, sample or queue."
        )
    return {
        "memory_only": memory_only,
        "distance": config.distance,
        "scale": config.scale,
        "read_head": read_head,
        "classifier": config.classifier,
        "temperature": 1.0 if config.temperature is None else config.temperature,
    }


def create_model(config: ModelConfig, data: DataConfig, memory_mode: str, num_classes: int, in_chans: int) -> nn.Module:
    """Creates the model that is trained: the plain timm model for the mode `"none"`, else the Memory Wrap model.

    What the images are like goes into its pretrained cfg, so that the saved model's own transform suits them.

    Raises:
        ValueError: If the weights do not fit the architecture.
    """
    cfg = get_pretrained_cfg(config.name)
    assert cfg is not None
    overlay: dict[str, Any] = {}
    if config.pretrained_path is not None:
        overlay["file"] = config.pretrained_path
    if in_chans != len(cfg.mean):
        # As timm's loaders do for other channel counts.
        overlay["mean"] = (sum(cfg.mean) / len(cfg.mean),) * in_chans
        overlay["std"] = (sum(cfg.std) / len(cfg.std),) * in_chans
    for key, value in (("mean", data.mean), ("std", data.std)):
        if value is not None:
            if len(value) != in_chans:
                raise ValueError(f"data.{key}={value} has {len(value)} values for {in_chans} channels.")
            overlay[key] = tuple(value)
    size = data.img_size or cfg.input_size[-1]
    if size != cfg.input_size[-1] or in_chans != cfg.input_size[0]:
        overlay |= {"input_size": (in_chans, size, size), "test_input_size": None}
    for key in ("interpolation", "crop_pct"):
        if getattr(data, key) is not None:
            overlay[key] = getattr(data, key)
    kwargs = dict(config.kwargs)
    if data.img_size is not None and cfg.fixed_input_size:
        kwargs.setdefault("img_size", data.img_size)
    name = config.name
    if memory_mode != "none":
        args = memory_args(config, memory_mode)
        name = (BASELINE_PREFIX if args.pop("memory_only") else PREFIX) + name
        kwargs |= {key: value for key, value in args.items() if value is not None}
    if config.drop_path_rate is not None:
        kwargs["drop_path_rate"] = config.drop_path_rate
    if config.drop_rate:
        kwargs["drop_rate"] = config.drop_rate
    pretrained = config.pretrained or config.pretrained_path is not None
    plain = memory_mode == "none"
    try:
        model = timm.create_model(
            name,
            pretrained=pretrained,
            # timm loads loosely when the number of classes changes, and a file of other weights would pass unseen.
            num_classes=cfg.num_classes if pretrained and plain else num_classes,
            in_chans=in_chans,
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )
    except TypeError as error:
        raise ValueError(f"{config.name} does not take an argument that the recipe gives: {error}") from error
    except RuntimeError as error:
        source = config.pretrained_path or "the pretrained weights"
        raise ValueError(f"{source} do not fit {config.name}: {' '.join(str(error).split())[:300]}") from error
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
    return model


def _scale_classifier(model: nn.Module, scale: float) -> None:
    classifiers = model.get_classifier()  # type: ignore[operator]
    for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        for parameter in classifier.parameters():
            parameter.data.mul_(scale)


def image_config(model: nn.Module) -> dict[str, Any]:
    """Returns input size, normalisation and interpolation of a model's images, in timm's words."""
    return resolve_model_data_config(model)


def image_mode(in_chans: int) -> str:
    """Returns the PIL mode of images with so many channels."""
    return _MODES[in_chans]


def wrap_trained(model: nn.Module, config: ModelConfig) -> MemoryWrapModel:
    """Wraps a plain model that was trained, its classifier as the read head."""
    args = memory_args(config, "none")
    return wrap(model, **args)
