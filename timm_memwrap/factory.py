"""Makes Memory Wrap models behind timm's entrypoints: new ones, and those of a whole model's files."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, is_model, load_pretrained, model_entrypoint
from torch import Tensor, nn

from timm_memwrap import checks, registry
from timm_memwrap._utils import plain_state
from timm_memwrap.bases import Base
from timm_memwrap.constants import BACKBONE, BASELINE_PREFIX, CONFIG_FILE, EVIDENCE_PREFIX, PREFIX
from timm_memwrap.heads import CLASSIFIER_NAMES
from timm_memwrap.memory_args import DEFAULT_OWN_READ_HEAD, LAYOUT_ARG, MEMORY_ARGS, OWN_READ_HEADS, check_global_pool
from timm_memwrap.memory_args import resolve_memory_args as resolve
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.tensor_files import FileError
from timm_memwrap.timm_interface import add_prefix
from timm_memwrap.whole_model import WholeModel, find_weights

__all__ = ["base_tensors", "build_shell", "create", "register_backbones"]

_logger = logging.getLogger(__name__)

# What the backbone is not given.
_OWN_ARGS = (*MEMORY_ARGS, LAYOUT_ARG)


def register_backbones(names: Iterable[str] | None = None) -> list[str]:
    """Registers `memwrap_<name>`, `memwrap_baseline_<name>` and `memwrap_evidence_<name>` for timm architectures.

    Importing the package does this for all that timm has by then. An architecture that is registered later with
    `timm.models.register_model` needs this call before it can be created by its Memory Wrap names.

    Args:
        names: Names of architectures that have a classifier; `None` for all of timm's. Those already registered are
            passed over.

    Returns:
        The names that are new in timm's registry.

    Raises:
        ValueError: If a given architecture is not in timm's registry, or is a bare encoder.
    """
    added = []
    for name in timm.list_models() if names is None else list(names):
        if name.startswith(PREFIX) or is_model(PREFIX + name):
            continue
        if not is_model(name):
            raise ValueError(f"{name!r} is not in timm's registry. Register it with timm.models.register_model first.")
        if registry.can_classify(name):
            added += [registry.add(prefix, name, partial(create, prefix, name)) for prefix in registry.PREFIXES]
        elif names is not None:
            raise ValueError(f"{name!r} is a bare encoder: it has no classifier that Memory Wrap could replace.")
    return added


# Weights that are made in inference mode cannot be watched, and all keys would be made again at every forward.
@torch.inference_mode(False)
def create(
    prefix: str,
    backbone: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Creates a model; the arguments are those of timm's entrypoints, and the memory's among `kwargs`.

    From a repository or folder (`hf-hub:`, `local-dir:`) the weights are a whole Memory Wrap model; else they are the
    backbone's, and the backbone's own entrypoint loads them.
    """
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = dataclasses.asdict(pretrained_cfg)
    whole = None
    if pretrained and isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source") in ("hf-hub", "local-dir"):
        whole = find_weights(pretrained_cfg, cache_dir)
        if whole.base is not None:
            tensors = base_tensors(whole, whole.base, pretrained_cfg, cache_dir)
            whole = dataclasses.replace(whole, tensors={**tensors, **whole.tensors})
        check_whole(whole, pretrained_cfg)
        # As the weights say: timm may have read a config.json of another save.
        architecture, pretrained_cfg, kwargs = whole.arguments(pretrained_cfg, kwargs)
        prefix, backbone = registry.split_name(architecture)
    backbone_args = {
        "pretrained_cfg": registry.backbone_cfg(pretrained_cfg, backbone),
        "pretrained_cfg_overlay": registry.backbone_cfg(pretrained_cfg_overlay, None),
        "cache_dir": cache_dir,
    }
    if features_only:
        return _create_features(backbone, pretrained, whole, backbone_args, kwargs)
    build = partial(_build, prefix, backbone, kwargs, backbone_args, pretrained_cfg, pretrained_cfg_overlay)
    if whole is not None:
        return _load(build, whole, kwargs)
    model = build(pretrained=pretrained)
    _reserve_memory(model, kwargs.get(LAYOUT_ARG))
    if pretrained:
        model.base_model = model.pretrained_cfg.get("hf_hub_id")
    return model


def check_whole(whole: WholeModel, source: dict[str, Any]) -> None:
    """Raises a `FileError` if the weights of a whole model from `source` are not those that its config describes.

    Every load does so before anything of their size is built.
    """
    checks.check_fits(build_shell(whole, source), whole.tensors, whole.name)


def build_shell(whole: WholeModel, source: dict[str, Any]) -> MemoryWrapModel:
    """Builds the model that the config of a whole model from `source` describes, without storage.

    Raises:
        FileError: If it cannot be built, or would be out of proportion to the weights.
    """
    architecture, cfg, args = whole.described(source)
    checks.check_sizes(args, cfg, whole.tensors, whole.name)
    prefix, backbone = registry.split_name(architecture)
    try:
        with checks.shapes_only(whole.tensors, whole.name):
            return _build(prefix, backbone, args, {"pretrained_cfg": registry.backbone_cfg(cfg, backbone)}, cfg)
    except FileError:
        raise
    except Exception as error:
        # A constructor may fail in any way on arguments that it was never meant for.
        raise FileError(
            f"The {CONFIG_FILE} of {whole.name} describes a {architecture} that cannot be built "
            f"({type(error).__name__}: {error}). It is damaged, or of another version of timm."
        ) from error


def base_tensors(
    whole: WholeModel, base: Base, source: dict[str, Any], cache_dir: str | Path | None = None
) -> dict[str, Tensor]:
    """Returns the state of the model that the config of `whole` describes as its base makes it, without a memory.

    Args:
        whole: What is beside the base, and its config.
        base: Where the base is.
        source: The pretrained cfg that says where `whole` is from.
        cache_dir: As of `timm.create_model`.

    Raises:
        FileError: If the base has changed, or does not fit.
        OSError: As of `Base.load`.
    """
    architecture, cfg, args = whole.described(source)
    prefix, backbone = registry.split_name(architecture)
    found = base.load(whole.name, backbone, cfg.get("tag"), cache_dir)
    if found.architecture.startswith(PREFIX):
        return checks.split_bank(found.tensors)[0]
    build_shell(dataclasses.replace(whole, tensors={**found.tensors, **whole.tensors}), source)
    # timm takes weights in hand before any other source.
    weights = {**found.cfg, "source": "", "state_dict": dict(found.tensors)}
    try:
        model = _build(prefix, backbone, args, {"pretrained_cfg": weights}, cfg, pretrained=True)
    except ValueError as error:
        raise FileError(f"{whole.name} holds a memory for {str(base)!r}, which does not fit: {error}") from error
    return checks.split_bank(plain_state(model))[0]


def _resolve(prefix: str, memory_args: dict[str, Any]) -> dict[str, Any]:
    """Checks memory arguments against the prefix, which says how the memory is read."""
    memory_args = {"read_head": DEFAULT_OWN_READ_HEAD if prefix == EVIDENCE_PREFIX else None, **memory_args}
    resolved = resolve(prefix != PREFIX, **memory_args)
    if (resolved["read_head"] in OWN_READ_HEADS) != (prefix == EVIDENCE_PREFIX):
        raise ValueError(
            f"read_head={resolved['read_head']!r} does not fit '{prefix}<name>': {', '.join(OWN_READ_HEADS)} read with "
            f"the backbone's own classifier, as '{EVIDENCE_PREFIX}<name>' does; the others are trained, for "
            f"'{PREFIX}<name>' and '{BASELINE_PREFIX}<name>'."
        )
    return resolved


def _build(
    prefix: str,
    backbone: str,
    kwargs: dict[str, Any],
    backbone_args: dict[str, Any],
    cfg: Any,
    overlay: dict[str, Any] | None = None,
    pretrained: bool = False,
) -> MemoryWrapModel:
    """Builds a model by timm's builder; `pretrained` is for the backbone's weights."""
    memory_args = _resolve(prefix, {name: value for name, value in kwargs.items() if name in MEMORY_ARGS})
    classifier = CLASSIFIER_NAMES.get(memory_args["classifier"])
    if prefix == EVIDENCE_PREFIX:
        classifier = add_prefix(timm.models.resolve_pretrained_cfg(backbone).classifier)
    model = build_model_with_cfg(
        partial(_construct, prefix, backbone, memory_args, pretrained, backbone_args),
        prefix + backbone,
        pretrained=False,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay={**(overlay or {}), "classifier": classifier},
        **{name: value for name, value in kwargs.items() if name not in _OWN_ARGS},
    )
    model._model_args = {**model._model_args, **memory_args}
    return model


def _construct(
    prefix: str,
    backbone: str,
    memory_args: dict[str, Any],
    pretrained: bool,
    backbone_args: dict[str, Any],
    num_classes: int = 1000,
    **kwargs: Any,
) -> MemoryWrapModel:
    """Makes the backbone, its weights loaded strictly, and the model around it.

    timm loads loosely when the number of classes changes, and only logs what is missing. So the backbone is built with
    the classes that its weights have, and its classifier is changed afterwards.
    """
    check_global_pool(kwargs.get("global_pool"), num_classes)
    wanted = num_classes if prefix == EVIDENCE_PREFIX else 0
    cfg, overlay = backbone_args["pretrained_cfg"], backbone_args.get("pretrained_cfg_overlay")
    own = timm.models.resolve_pretrained_cfg(backbone, cfg, overlay).num_classes
    # Constructed with a classifier wherever it can have one, so that all models are made in the same way.
    # Some backbones refuse a classifier without pooling, so the pooling goes with it.
    classes = own if pretrained else wanted or min(own, 1)
    unpooled = kwargs.get("global_pool") == ""
    if unpooled:
        del kwargs["global_pool"]
    try:
        module = model_entrypoint(backbone)(pretrained=pretrained, num_classes=classes, **backbone_args, **kwargs)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        if f'"{BACKBONE}.' in str(error):
            reason = "they are those of a whole Memory Wrap model. Load it with timm_memwrap.from_pretrained."
        else:
            reason = (
                f"{error}\nPass weights that timm saved for it; for weights of another number of classes: "
                f"pretrained_cfg_overlay=dict(file=..., num_classes=...)."
            )
        raise ValueError(f"The weights do not fit the backbone {backbone!r}: {reason}") from error
    if unpooled:
        module.reset_classifier(wanted, "")
    elif module.num_classes != wanted:
        module.reset_classifier(wanted)
    model = MemoryWrapModel(module, num_classes, prefix != PREFIX, **memory_args)
    if wanted and not (pretrained and wanted == own):
        model.new_classifier = model.classifier_fingerprint()
    return model


def _reserve_memory(model: MemoryWrapModel, layout: dict[str, Any] | None) -> None:
    """Makes room for the memory that a loader is to fill in place, unless it is one of other classes."""
    if layout is None:
        return
    classes = layout.get("num_classes", model.num_classes)
    if classes == model.num_classes:
        model.memory_bank.reserve(layout)
    else:
        _warn_of_other_classes(model.num_classes, classes)
        layout.clear()
        model.memory_bank.reserve(layout)
    layout["num_classes"] = model.num_classes


def _warn_of_other_classes(num_classes: int, classes: int) -> None:
    _logger.warning(
        "num_classes=%d instead of %d: the memory bank is not loaded, since its labels are of other classes. Call "
        "build_memory_bank to build a new one.",
        num_classes,
        classes,
    )


def _load(build: Callable[[], MemoryWrapModel], whole: WholeModel, kwargs: dict[str, Any]) -> MemoryWrapModel:
    """Builds a model for the weights of a whole one, and has timm load and adapt them."""
    args = kwargs.get("pretrained_model_args") or {}
    adapts = any(kwargs.get(name, args.get(name)) != args.get(name) for name in ("num_classes", "in_chans"))
    with nullcontext() if adapts else checks.without_values():
        model = build()
    # What was checked is what is loaded: timm takes weights in hand before any other source.
    cfg = {**model.pretrained_cfg, "source": "", "state_dict": dict(whole.tensors)}
    try:
        load_pretrained(model, cfg, model.num_classes, model.in_chans, _prepare_state_dict)
    except (ValueError, RuntimeError) as error:
        # PyTorch raises this one type for all it finds wrong with weights, and for much that is not about the file.
        if not isinstance(error, ValueError | RecursionError) and "loading state_dict" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if "loading state_dict" not in line]
        raise FileError(f"{whole.name} cannot be loaded: {' '.join(lines)}") from error
    base_model = whole.config.get("base_model")
    model.base_model = base_model if isinstance(base_model, str) else None
    if (adapts or not whole.verified) and model.memory_is_stale():
        _logger.warning(
            "%s: its memory bank is stale, that is, it was encoded with other weights than these. Call "
            "build_memory_bank to build a new one.",
            whole.name,
        )
    return model


def _create_features(
    backbone: str, pretrained: bool, whole: WholeModel | None, backbone_args: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    """Creates timm's own feature extractor around the backbone: features need neither head nor memory."""
    kwargs = {name: value for name, value in kwargs.items() if name not in (*_OWN_ARGS, "num_classes")}
    if whole is not None:
        prefix = f"{BACKBONE}."
        state_dict = {key.removeprefix(prefix): value for key, value in whole.tensors.items() if key.startswith(prefix)}
        cfg = {**backbone_args["pretrained_cfg"], "source": "", "state_dict": state_dict}
        backbone_args = {**backbone_args, "pretrained_cfg": cfg}
    model = model_entrypoint(backbone)(pretrained=pretrained, features_only=True, **backbone_args, **kwargs)
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _prepare_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Drops a bank of other classes, and raises if other names do not fit: timm loads loosely for other classes."""
    assert isinstance(model, MemoryWrapModel)
    weights, bank = checks.split_bank(state_dict)
    expected = checks.split_bank(model.state_dict())[0]
    if model.num_classes == 0:
        # Neither head nor classifier is wanted.
        weights = {name: tensor for name, tensor in weights.items() if name in expected}
    if wrong := checks.other_names(expected, weights):
        raise ValueError(
            f"The weights do not fit {model.pretrained_cfg['architecture']!r}: {wrong} Load them with the architecture "
            f"and arguments in their {CONFIG_FILE}."
        )
    if bank and model.num_classes != model.pretrained_cfg["num_classes"]:
        _warn_of_other_classes(model.num_classes, model.pretrained_cfg["num_classes"])
    elif bank:
        # The tensors of the file themselves: a large memory is not in memory twice.
        model.load_state_dict(bank, strict=False, assign=True)
    return weights
