"""Makes Memory Wrap models behind timm's entrypoints: new ones, and those of a whole model's files."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, is_model, model_entrypoint
from torch import Tensor, nn

from timm_memwrap import checks, registry
from timm_memwrap.constants import BACKBONE, BASELINE_PREFIX, CONFIG_FILE, EVIDENCE_PREFIX, MEMORY_BANK, PREFIX
from timm_memwrap.heads import CLASSIFIER_NAMES
from timm_memwrap.memory_args import (
    DEFAULT_OWN_READ_HEAD,
    MEMORY_ARGS,
    OWN_READ_HEADS,
    check_global_pool,
    resolve_memory_args,
)
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.tensor_files import FileError
from timm_memwrap.timm_interface import add_prefix
from timm_memwrap.whole_model import WholeModel, find_weights

__all__ = ["check_whole", "create", "register_backbones"]

_logger = logging.getLogger(__name__)

_WHOLE_MODEL_SOURCES = ("hf-hub", "local-dir")


def register_backbones(names: Iterable[str] | None = None) -> list[str]:
    """Registers `memwrap_<name>`, `memwrap_baseline_<name>` and `memwrap_evidence_<name>` for timm architectures.

    Importing the package does this for all that timm has by then. An architecture that is registered later with
    `timm.models.register_model` needs this call before it can be created by its Memory Wrap names.

    An architecture can classify if its default cfg names a classifier and its name does not end in `_enc`, as those of
    timm's bare encoders do, which have no `reset_classifier`.

    Args:
        names: Names of architectures; `None` for all of timm's that can classify. Those already registered are passed
            over.

    Returns:
        The names that are new in timm's registry.

    Raises:
        ValueError: If a given architecture is not in timm's registry, or cannot classify.
    """
    added = []
    for name in timm.list_models() if names is None else list(names):
        if name.startswith(PREFIX) or is_model(PREFIX + name):
            continue
        if not is_model(name):
            raise ValueError(f"{name!r} is not in timm's registry. Register it with timm.models.register_model first.")
        if registry.can_classify(name):
            added += [registry.add(prefix, name, _entrypoint(prefix, name)) for prefix in registry.PREFIXES]
        elif names is not None:
            raise ValueError(f"{name!r} is a bare encoder: it has no classifier that Memory Wrap could replace.")
    return added


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
    """Creates a model through timm's own builder, which resolves the cfg and adapts weights.

    From a repository or folder (`hf-hub:`, `local-dir:`) the weights are a whole Memory Wrap model; else they are the
    backbone's, and the backbone's own entrypoint loads them.

    Args:
        prefix: One of `registry.PREFIXES`.
        backbone: The backbone's architecture.
        pretrained: As in `timm.create_model`, and so are all that follow.
        pretrained_cfg: See `pretrained`.
        pretrained_cfg_overlay: See `pretrained`.
        cache_dir: See `pretrained`.
        features_only: See `pretrained`.
        **kwargs: Arguments of the backbone, and any of `MEMORY_ARGS`.

    Raises:
        ValueError: If arguments do not fit each other, or files that are loaded are damaged.
    """
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = dataclasses.asdict(pretrained_cfg)
    whole = None
    if pretrained and isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source") in _WHOLE_MODEL_SOURCES:
        whole = find_weights(pretrained_cfg, cache_dir)
        other = whole.replacement(prefix + backbone, pretrained_cfg, kwargs)
        if other is not None:
            architecture, cfg, args = other
            return create(
                *registry.split_name(architecture), True, cfg, pretrained_cfg_overlay, cache_dir, features_only, **args
            )
        check_whole(whole, pretrained_cfg)
    memory_args = {name: kwargs.pop(name) for name in MEMORY_ARGS if name in kwargs}
    own_cfg = pretrained_cfg if isinstance(pretrained_cfg, str) else registry.backbone_cfg(pretrained_cfg, backbone)
    backbone_args = {
        "pretrained_cfg": own_cfg,
        "pretrained_cfg_overlay": registry.backbone_cfg(pretrained_cfg_overlay, None),
        "cache_dir": cache_dir,
    }
    if features_only:
        return _create_features(backbone, pretrained, whole, backbone_args, kwargs)
    resolved = _resolve(prefix, memory_args)
    if whole is None:
        model = _build(
            prefix, backbone, resolved, pretrained, backbone_args, pretrained_cfg, pretrained_cfg_overlay, kwargs
        )
        if pretrained:
            model.base_model = model.pretrained_cfg.get("hf_hub_id")
        return model
    assert isinstance(pretrained_cfg, dict)
    # What was checked is what is loaded: timm takes weights in hand before any other source.
    cfg = {**pretrained_cfg, "source": "", "state_dict": dict(whole.tensors)}
    args = dict(kwargs.get("pretrained_model_args") or {})
    adapted = any(
        name in kwargs and kwargs[name] != args.get(name, kwargs[name]) for name in ("num_classes", "in_chans")
    )
    with checks.loading_errors(whole.name), nullcontext() if adapted else checks.without_values():
        model = _build(
            prefix,
            backbone,
            resolved,
            False,
            {"pretrained_cfg": own_cfg},
            cfg,
            pretrained_cfg_overlay,
            kwargs,
            whole=True,
        )
    for known in (model.pretrained_cfg, model.default_cfg):
        known.pop("state_dict", None)
        known["source"] = pretrained_cfg["source"]
    model.base_model = whole.base_model
    if not whole.verified and model.memory_is_stale():
        _logger.warning(
            "%s: its memory bank is stale, that is, it was encoded with other weights than these. Call "
            "build_memory_bank to build a new one.",
            whole.name,
        )
    return model


def check_whole(whole: WholeModel, source: dict[str, Any] | None = None) -> None:
    """Compares the files of a whole model with each other, before anything of their size is built.

    The model that the configuration describes is built without storage, and compared with the weights. It is what every
    load does first, and so what a save does before it replaces anything.

    Args:
        whole: Weights and configuration.
        source: A pretrained cfg that says where they are from.

    Raises:
        FileError: If they do not fit each other.
    """
    checks.check_config(whole.config, f"The {CONFIG_FILE} of {whole.name}")
    architecture, cfg, args = whole.described(source or {})
    checks.check_model_args(args, cfg, whole.tensors, whole.name)
    prefix, backbone = registry.split_name(architecture)
    try:
        memory_args = {name: args.pop(name) for name in MEMORY_ARGS if name in args}
        backbone_args = {"pretrained_cfg": registry.backbone_cfg(cfg, backbone)}
        with checks.shapes_only(whole.tensors, whole.name):
            shell = _build(prefix, backbone, _resolve(prefix, memory_args), False, backbone_args, cfg, None, args)
    except FileError:
        raise
    except Exception as error:
        # A constructor may fail in any way on arguments that it was never meant for.
        raise FileError(
            f"The {CONFIG_FILE} of {whole.name} describes a {architecture} that cannot be built "
            f"({type(error).__name__}: {error}). It is damaged, or of another version of timm."
        ) from error
    checks.check_fits(shell, whole.tensors, whole.name)
    encodings, labels = (whole.tensors.get(f"{MEMORY_BANK}.{name}") for name in ("encodings", "labels"))
    if encodings is not None and labels is not None:
        try:
            shell.check_bank(encodings, labels)
        except ValueError as error:
            raise FileError(f"{whole.name} cannot be loaded: {error}") from error


def _entrypoint(prefix: str, backbone: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(prefix, backbone, pretrained, **kwargs)

    entrypoint.__doc__ = f"Memory Wrap around timm's {backbone}."
    return entrypoint


def _resolve(prefix: str, memory_args: dict[str, Any]) -> dict[str, Any]:
    """Checks memory arguments against the prefix, which says how the memory is read."""
    own = memory_args.get("read_head", "") in OWN_READ_HEADS
    if prefix == EVIDENCE_PREFIX:
        memory_args = {"read_head": DEFAULT_OWN_READ_HEAD, **memory_args}
        if memory_args["read_head"] not in OWN_READ_HEADS:
            raise ValueError(
                f"'{EVIDENCE_PREFIX}<name>' reads with the backbone's own classifier; read_head="
                f"{memory_args['read_head']!r} does not. Pass one of {', '.join(map(repr, OWN_READ_HEADS))}, or create "
                f"'{PREFIX}<name>' or '{BASELINE_PREFIX}<name>'."
            )
    elif own:
        raise ValueError(
            f"read_head={memory_args['read_head']!r} reads with the backbone's own classifier. Create "
            f"'{EVIDENCE_PREFIX}<name>'."
        )
    return resolve_memory_args(prefix != PREFIX, **memory_args)


def _build(
    prefix: str,
    backbone: str,
    memory_args: dict[str, Any],
    pretrained: bool,
    backbone_args: dict[str, Any],
    cfg: Any,
    overlay: dict[str, Any] | None,
    kwargs: dict[str, Any],
    whole: bool = False,
) -> MemoryWrapModel:
    """Builds a model by timm's builder; `pretrained` is for the backbone's weights, `whole` for all of them."""
    own = memory_args["read_head"] in OWN_READ_HEADS
    name = (
        add_prefix(timm.models.resolve_pretrained_cfg(backbone).classifier)
        if own
        else CLASSIFIER_NAMES[memory_args["classifier"]]
    )
    model = build_model_with_cfg(
        partial(_construct, prefix, backbone, memory_args, pretrained, backbone_args),
        prefix + backbone,
        pretrained=whole,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay={**(overlay or {}), "classifier": name},
        pretrained_filter_fn=_prepare_state_dict,
        **kwargs,
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
    wanted = num_classes if memory_args["read_head"] in OWN_READ_HEADS else 0
    own = timm.models.resolve_pretrained_cfg(
        backbone, backbone_args["pretrained_cfg"], backbone_args.get("pretrained_cfg_overlay")
    ).num_classes
    # Constructed with a classifier wherever it can have one, so that all models are made in the same way.
    # Some backbones refuse a classifier without pooling, so the pooling goes with it.
    classes = own if pretrained else wanted or min(own, 1)
    unpooled = kwargs.get("global_pool") == ""
    if unpooled:
        del kwargs["global_pool"]
    try:
        module = model_entrypoint(backbone)(pretrained=pretrained, num_classes=classes, **backbone_args, **kwargs)
    except RuntimeError as error:
        raise _why_weights_do_not_fit(backbone, error) from error
    if unpooled:
        module.reset_classifier(wanted, "")
    elif module.num_classes != wanted:
        module.reset_classifier(wanted)
    return MemoryWrapModel(module, num_classes, prefix != PREFIX, **memory_args)


def _why_weights_do_not_fit(backbone: str, error: RuntimeError) -> Exception:
    """Returns what to raise for an error in loading a backbone's weights; any other is returned as it is."""
    reason = str(error)
    if "state_dict" not in reason:
        return error
    if f'"{BACKBONE}.' in reason:
        return ValueError(
            f"The weights are those of a whole Memory Wrap model, but pretrained=True on a name of timm's loads the "
            f"backbone's, here {backbone!r}. Load the folder or repository that they come from with "
            f"timm_memwrap.from_pretrained."
        )
    return ValueError(
        f"The weights do not fit the backbone {backbone!r}: {reason}\nPass weights that timm saved for it; for weights "
        f"of another number of classes, say so: pretrained_cfg_overlay=dict(file=..., num_classes=...)."
    )


def _create_features(
    backbone: str,
    pretrained: bool,
    whole: WholeModel | None,
    backbone_args: dict[str, Any],
    kwargs: dict[str, Any],
) -> nn.Module:
    """Creates timm's own feature extractor around the backbone: features need neither head nor memory."""
    kwargs = {name: value for name, value in kwargs.items() if name != "num_classes"}
    if whole is None:
        return model_entrypoint(backbone)(pretrained=pretrained, features_only=True, **backbone_args, **kwargs)
    prefix = f"{BACKBONE}."
    state_dict = {
        name.removeprefix(prefix): tensor for name, tensor in whole.tensors.items() if name.startswith(prefix)
    }
    cfg = {**backbone_args["pretrained_cfg"], "source": "", "state_dict": state_dict}
    args = {**backbone_args, "pretrained_cfg": cfg}
    model = model_entrypoint(backbone)(pretrained=True, features_only=True, **args, **kwargs)
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _prepare_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Checks a whole model's weights before timm loads them, and drops a bank of other classes.

    timm loads loosely when the number of classes changes; missing and unexpected names are an error here.
    """
    assert isinstance(model, MemoryWrapModel)
    bank = {name: tensor for name, tensor in state_dict.items() if name.startswith(f"{MEMORY_BANK}.")}
    weights = {name: tensor for name, tensor in state_dict.items() if name not in bank}
    expected = {name for name in model.state_dict() if not name.startswith(f"{MEMORY_BANK}.")}
    if model.num_classes == 0:
        # Neither head nor classifier is wanted.
        weights = {name: tensor for name, tensor in weights.items() if name in expected}
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        raise ValueError(
            f"The weights do not fit {model.pretrained_cfg['architecture']!r}: "
            f"missing {missing[:5]}{' ...' if len(missing) > 5 else ''}, "
            f"unexpected {unexpected[:5]}{' ...' if len(unexpected) > 5 else ''}. "
            f"Load them with the architecture and arguments in their {CONFIG_FILE}."
        )
    if bank and model.num_classes != model.pretrained_cfg["num_classes"]:
        _logger.warning(
            "num_classes=%d instead of %d: the memory bank is not loaded, since its labels are of other classes. "
            "Call build_memory_bank to build a new one.",
            model.num_classes,
            model.pretrained_cfg["num_classes"],
        )
        return weights
    return {**weights, **bank}
