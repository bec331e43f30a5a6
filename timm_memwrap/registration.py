"""Makes and registers the `memwrap_*` entrypoints and their pretrained cfgs, and wraps models already in hand."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from timm.models import PretrainedCfg, build_model_with_cfg, is_model, model_entrypoint, register_model
from timm.models._pretrained import DefaultCfg
from torch import Tensor, nn

from timm_memwrap import constants, loading
from timm_memwrap.constants import BACKBONE, BASELINE_PREFIX, MEMORY_BANK, PREFIX, WEIGHTS_FILE
from timm_memwrap.model import (
    DEFAULT_KEPT,
    HEAD_CLASSIFIER_NAMES,
    KEPT_CLASSIFIER,
    MemoryWrapModel,
    check_global_pool,
    resolve_memory_args,
)
from timm_memwrap.timm_interface import add_prefix

__all__ = ["backbone_name", "register_backbones", "wrap"]

_logger = logging.getLogger(__name__)

# What `register_model` reads: the pretrained cfgs by architecture.
default_cfgs: dict[str, DefaultCfg] = {}

_WHOLE_MODEL_SOURCES = ("hf-hub", "local-dir")
# timm's mark of an encoder that returns tokens and cannot be given a classifier.
_ENCODER_SUFFIX = "_enc"
_MEMORY_ARGS = ("distance", "scale", "read_head", "classifier", "temperature")


def backbone_name(name: str) -> str:
    """Returns the backbone's architecture for the name of a `memwrap_*` architecture."""
    return name.removeprefix(BASELINE_PREFIX) if name.startswith(BASELINE_PREFIX) else name.removeprefix(PREFIX)


def register_backbones(names: Iterable[str] | None = None) -> list[str]:
    """Registers `memwrap_<name>` and `memwrap_baseline_<name>` for timm architectures that can classify.

    Importing the package does this for all that timm has by then. An architecture that is registered later with
    `timm.models.register_model` needs this call before it can be created by its Memory Wrap name.

    The rule for what can classify: its default cfg names a classifier, and its name does not end in `_enc`, as those
    of timm's bare encoders do, which have no `reset_classifier`.

    Args:
        names: Names of architectures; `None` for all of timm's. Those already registered are passed over.

    Returns:
        The names that are new in timm's registry.

    Raises:
        ValueError: If a given architecture is not in timm's registry, or cannot classify.
    """
    module = sys.modules[__name__]
    exported, added = list(__all__), []
    for name in timm.list_models() if names is None else list(names):
        if name.startswith(PREFIX) or is_model(PREFIX + name):
            continue
        if not is_model(name):
            raise ValueError(f"{name!r} is not in timm's registry. Register it with timm.models.register_model first.")
        cfgs = _memory_cfgs(name)
        if cfgs is None:
            if names is None:
                continue
            raise ValueError(f"{name!r} is a bare encoder: it has no classifier that Memory Wrap could replace.")
        for prefix, memory_only in ((PREFIX, False), (BASELINE_PREFIX, True)):
            entrypoint = _entrypoint(prefix + name, name, memory_only)
            default_cfgs[prefix + name] = cfgs
            setattr(module, prefix + name, entrypoint)
            # timm looks through the list for each name: with thousands of them that is half of the import's time.
            module.__all__ = []  # type: ignore[attr-defined]
            register_model(entrypoint)
            added.append(prefix + name)
    module.__all__ = exported + added  # type: ignore[attr-defined]
    return added


def wrap(
    model: nn.Module,
    *,
    num_classes: int | None = None,
    memory_only: bool | None = None,
    distance: str = "cosine",
    scale: float | str | None = None,
    read_head: str | None = None,
    classifier: str | None = None,
    temperature: float = 1.0,
) -> MemoryWrapModel:
    """Makes a Memory Wrap model of a timm model in hand, its weights kept bit for bit.

    A model with a trained classifier keeps it, and reads the memory with it: logits are the weighted logits of the
    memory samples that the classifier finds most like the input. There is nothing to train; build the memory bank and
    predict. A model without a classifier (`num_classes=0`), or with another `read_head`, gets a new head to train.

    Args:
        model: A timm model. It becomes the backbone and is shared, not copied, except where its classifier has to go.
        num_classes: Number of classes; `None` for the model's own.
        memory_only: Whether to predict from the memory alone. `None` means yes with the kept classifier, else no.
        distance: As in `MemoryWrapModel`.
        scale: As in `MemoryWrapModel`.
        read_head: As in `MemoryWrapModel`. `None` is `"linear"` for a model without a classifier; with one it is
            `"probabilities"`.
        classifier: As in `MemoryWrapModel`.
        temperature: As in `MemoryWrapModel`.

    Raises:
        ValueError: If `model` is not a timm model in timm's registry, or the arguments do not fit.

    Example:
        ```python
        >>> import timm, timm_memwrap
        >>> model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=10))
        >>> model.pretrained_cfg["architecture"]
        'memwrap_baseline_test_resnet'

        ```
    """
    if isinstance(model, MemoryWrapModel):
        raise ValueError("The model is a Memory Wrap model already. Pass the timm model: wrap(model.backbone).")
    needed = ("forward_features", "forward_head", "reset_classifier", "head_hidden_size", "pretrained_cfg")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"{type(model).__name__} lacks {', '.join(missing)}, which timm's classification models have. Pass a model "
            f"from timm.create_model, made without features_only."
        )
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    has_classifier = model.num_classes > 0  # type: ignore[operator]
    num_classes = model.num_classes if num_classes is None else num_classes  # type: ignore[assignment]
    assert isinstance(num_classes, int)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: the model has no classes of its own. Pass num_classes to wrap.")
    if read_head is None:
        read_head = DEFAULT_KEPT if has_classifier and num_classes == model.num_classes else "linear"
    if memory_only is None:
        memory_only = read_head in KEPT_CLASSIFIER or classifier == "vote"
    # Before anything is copied or registered.
    resolve_memory_args(memory_only, distance, scale, read_head, classifier, temperature)
    if read_head in KEPT_CLASSIFIER:
        if model.num_classes != num_classes:
            raise ValueError(
                f"read_head={read_head!r} keeps the model's classifier of {model.num_classes} classes, but "
                f"num_classes={num_classes}. Leave num_classes out, or pass read_head='linear' for a new head to train."
            )
        backbone = model
    else:
        backbone = deepcopy(model)
        if has_classifier:
            backbone.reset_classifier(0)  # type: ignore[operator]

    architecture = cfg.get("architecture", "")
    register_backbones([architecture])
    wrapped = MemoryWrapModel(backbone, num_classes, memory_only, distance, scale, read_head, classifier, temperature)
    wrapped.pretrained_cfg = wrapped.default_cfg = {
        **_memory_cfg_dict(cfg, architecture, memory_only),
        "classifier": wrapped.classifier_name(),
        "num_classes": num_classes,
    }
    wrapped.pretrained_model_args = {}
    if cfg.get("source") == "hf-hub" and cfg.get("hf_hub_id"):
        wrapped.base_model = loading.split_revision(cfg["hf_hub_id"])[0]
    wrapped._model_args = {**getattr(model, "_model_args", {}), **wrapped.memory_args, "num_classes": num_classes}
    return wrapped.train(model.training)


def _entrypoint(variant: str, backbone: str, memory_only: bool) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, backbone, memory_only, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"Memory Wrap around timm's {backbone}{', memory only' if memory_only else ''}."
    return create


def _create(
    variant: str,
    backbone: str,
    memory_only: bool,
    pretrained: bool,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model through timm's own builder, which resolves the cfg and adapts weights.

    From a repository or folder (`hf-hub:`, `local-dir:`) the weights are a whole Memory Wrap model; else they are the
    backbone's, and the backbone's own entrypoint loads them.
    """
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = dataclasses.asdict(pretrained_cfg)
    whole = isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source") in _WHOLE_MODEL_SOURCES
    file = (
        _check_source(variant, backbone, memory_only, pretrained_cfg, cache_dir, kwargs)
        if whole and pretrained
        else None
    )
    memory_args = {name: kwargs.pop(name) for name in _MEMORY_ARGS if name in kwargs}
    backbone_args = {
        "pretrained_cfg": pretrained_cfg
        if isinstance(pretrained_cfg, str)
        else _backbone_cfg(pretrained_cfg, backbone),
        "pretrained_cfg_overlay": _backbone_cfg(pretrained_cfg_overlay, None),
        "cache_dir": cache_dir,
    }
    if features_only:
        return _create_features(backbone, pretrained, file, backbone_args, kwargs)

    resolved = resolve_memory_args(memory_only, **memory_args)
    if whole:
        assert isinstance(pretrained_cfg, dict)
        # timm then takes the file that was checked; left alone it falls back to a pickle, or takes what the cfg names.
        pretrained_cfg = {**pretrained_cfg, "hf_hub_filename": WEIGHTS_FILE, "custom_load": False}
        backbone_args = {"pretrained_cfg": backbone_args["pretrained_cfg"]}
    with loading.loading_errors(file.name if file else None):
        model = build_model_with_cfg(
            partial(_build, backbone, memory_only, resolved, pretrained and not whole, backbone_args),
            variant,
            pretrained=pretrained and whole,
            pretrained_cfg=pretrained_cfg,  # type: ignore[arg-type]
            pretrained_cfg_overlay={
                **(pretrained_cfg_overlay or {}),
                "classifier": _classifier_name(backbone, resolved),
            },
            pretrained_filter_fn=_prepare_state_dict,
            cache_dir=cache_dir,
            **kwargs,
        )
    model._model_args = {**model._model_args, **resolved}
    if file is not None:
        model.base_model = file.base_model
        if not file.verified and model.memory_is_stale():
            _logger.warning(
                "%s: its memory bank is stale, that is, it was encoded with other weights than these. Call "
                "build_memory_bank to build a new one.",
                file.name,
            )
    elif pretrained and not whole:
        model.base_model = model.pretrained_cfg.get("hf_hub_id")
    return model


def _check_source(
    variant: str,
    backbone: str,
    memory_only: bool,
    pretrained_cfg: Any,
    cache_dir: str | Path | None,
    kwargs: dict[str, Any],
) -> loading.Weights:
    """Finds a whole model's weights, and checks them before anything of their size is built.

    The model that `config.json` describes is built without memory of its own, and compared with what the file holds.
    """
    file = loading.find_weights(pretrained_cfg, cache_dir)
    file.verify()
    header = loading.read_header(file.path, file.name)
    args = dict(kwargs.get("pretrained_model_args") or {})
    loading.check_model_args(args, pretrained_cfg, header, file.name)
    try:
        memory_args = {name: args.pop(name) for name in _MEMORY_ARGS if name in args}
        resolved = resolve_memory_args(memory_only, **memory_args)
        backbone_args = {"pretrained_cfg": _backbone_cfg(pretrained_cfg, backbone)}
        with loading.shapes_only(), loading.parameter_budget(header, file.name):
            shell = build_model_with_cfg(
                partial(_build, backbone, memory_only, resolved, False, backbone_args),
                variant,
                pretrained=False,
                pretrained_cfg=pretrained_cfg,
                pretrained_cfg_overlay={"classifier": _classifier_name(backbone, resolved)},
                **args,
            )
    except loading.FileError:
        raise
    except Exception as error:
        # A constructor may fail in any way on arguments that it was never meant for.
        raise loading.FileError(
            f"The {constants.CONFIG_FILE} beside {file.name} describes a {variant} that cannot be built "
            f"({type(error).__name__}: {error}). It is damaged, or of another version of timm."
        ) from error
    loading.check_fits(shell, header, file.name)
    return file


def _build(
    backbone: str,
    memory_only: bool,
    memory_args: dict[str, Any],
    pretrained: bool,
    backbone_args: dict[str, Any],
    num_classes: int = 1000,
    **kwargs: Any,
) -> MemoryWrapModel:
    """Builds the backbone, its weights loaded strictly, and the model around it.

    timm loads loosely when the number of classes changes, and only logs what is missing. So the backbone is built with
    the classes that its weights have, and its classifier is changed afterwards.
    """
    check_global_pool(kwargs.get("global_pool"), num_classes)
    wanted = num_classes if memory_args["read_head"] in KEPT_CLASSIFIER else 0
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
    return MemoryWrapModel(module, num_classes, memory_only, **memory_args)


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
    file: loading.Weights | None,
    backbone_args: dict[str, Any],
    kwargs: dict[str, Any],
) -> nn.Module:
    """Creates timm's own feature extractor around the backbone: features need neither head nor memory."""
    kwargs = {name: value for name, value in kwargs.items() if name != "num_classes"}
    if file is None:
        return model_entrypoint(backbone)(pretrained=pretrained, features_only=True, **backbone_args, **kwargs)
    state_dict = {
        name.removeprefix(f"{BACKBONE}."): tensor
        for name, tensor in load_file(file.path).items()
        if name.startswith(f"{BACKBONE}.")
    }
    # timm takes weights in hand before it takes any other source, and looks for its source in `source` first.
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
            f"Load them with the architecture and arguments in their {constants.CONFIG_FILE}."
        )
    if bank and model.num_classes != model.pretrained_cfg["num_classes"]:
        _logger.warning(
            "num_classes=%d instead of %d: the memory bank is not loaded, since its labels are of other classes. "
            "Call build_memory_bank to build a new one.",
            model.num_classes,
            model.pretrained_cfg["num_classes"],
        )
        return weights
    return state_dict


def _memory_cfgs(backbone: str) -> DefaultCfg | None:
    """Derives the cfgs of all tags of a backbone, or returns `None` if it cannot classify."""
    module = sys.modules[model_entrypoint(backbone).__module__]
    cfgs = getattr(module, "default_cfgs", {}).get(backbone)
    if cfgs is None or not cfgs.default.classifier or backbone.endswith(_ENCODER_SUFFIX):
        return None
    return DefaultCfg(
        tags=cfgs.tags,
        cfgs={tag: _memory_cfg(cfg, f"{backbone}.{tag}" if tag else backbone) for tag, cfg in cfgs.cfgs.items()},
        is_pretrained=cfgs.is_pretrained,
    )


def _memory_cfg(cfg: PretrainedCfg, name: str) -> PretrainedCfg:
    # timm completes "timm/" by the architecture's name, which here is the backbone's: the weights are.
    hub_id = f"timm/{name}" if cfg.hf_hub_id == "timm/" else cfg.hf_hub_id
    # dataclasses.replace is ten times slower, and there are thousands.
    memory_cfg = copy(cfg)
    memory_cfg.hf_hub_id = hub_id
    memory_cfg.classifier = HEAD_CLASSIFIER_NAMES["mlp"]
    memory_cfg.first_conv = add_prefix(cfg.first_conv)
    return memory_cfg


def _memory_cfg_dict(cfg: dict[str, Any], architecture: str, memory_only: bool) -> dict[str, Any]:
    prefix = BASELINE_PREFIX if memory_only else PREFIX
    return {**cfg, "architecture": prefix + architecture, "first_conv": add_prefix(cfg.get("first_conv"))}


def _backbone_cfg(cfg: dict[str, Any] | None, backbone: str | None) -> dict[str, Any] | None:
    """Undoes `_memory_cfg` on a cfg or overlay in hand: the names in it are of the backbone again."""
    if cfg is None:
        return None
    cfg = dict(cfg)
    if "first_conv" in cfg:
        cfg["first_conv"] = _remove_prefix(cfg["first_conv"])
    if "classifier" in cfg and backbone is not None:
        # The name in a Memory Wrap cfg may be the head's. The backbone's own stands in the registry.
        cfg["classifier"] = timm.models.resolve_pretrained_cfg(backbone).classifier
    if backbone is not None:
        cfg["architecture"] = backbone
    return cfg


def _remove_prefix(names: Any) -> Any:
    if names is None:
        return None
    if isinstance(names, str):
        return names.removeprefix(f"{BACKBONE}.")
    return tuple(name.removeprefix(f"{BACKBONE}.") for name in names)


def _classifier_name(backbone: str, memory_args: dict[str, Any]) -> Any:
    if memory_args["read_head"] in KEPT_CLASSIFIER:
        return add_prefix(timm.models.resolve_pretrained_cfg(backbone).classifier)
    return HEAD_CLASSIFIER_NAMES[memory_args["classifier"]]
