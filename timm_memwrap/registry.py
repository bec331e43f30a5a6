"""The names of Memory Wrap models in timm's registry, and their pretrained cfgs, all derived from the backbone's."""

import sys
from collections.abc import Callable
from copy import copy
from typing import Any

import timm
from timm.models import PretrainedCfg, model_entrypoint, register_model
from timm.models._pretrained import DefaultCfg
from torch import nn

from timm_memwrap.constants import BACKBONE, BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX
from timm_memwrap.heads import CLASSIFIER_NAMES
from timm_memwrap.timm_interface import add_prefix

__all__ = ["PREFIXES", "add", "backbone_cfg", "can_classify", "memory_cfg", "split_name"]

# Longest first: each name begins with the shortest.
PREFIXES = (BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX)

# What `register_model` reads: the pretrained cfgs by architecture.
default_cfgs: dict[str, DefaultCfg] = {}


def split_name(name: str) -> tuple[str, str]:
    """Splits the name of a Memory Wrap architecture into its prefix and the backbone's, or raises a `ValueError`."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return prefix, name.removeprefix(prefix)
    raise ValueError(f"{name!r} is not a Memory Wrap architecture, whose names begin with {PREFIX!r}.")


def can_classify(backbone: str) -> bool:
    """Returns whether a timm architecture can be given a classifier, and so a Memory Wrap name."""
    cfgs = _default_cfg(backbone)
    # "_enc" is timm's mark of an encoder that returns tokens and cannot be given one.
    return cfgs is not None and bool(cfgs.default.classifier) and not backbone.endswith("_enc")


def add(prefix: str, backbone: str, create: Callable[..., nn.Module]) -> str:
    """Registers an entrypoint with timm under a prefix and the backbone's name, and returns the name."""
    cfgs, module = _default_cfg(backbone), sys.modules[__name__]
    assert cfgs is not None
    name = prefix + backbone
    # As those of a function of this name: it is what timm registers it by.
    create.__module__, create.__name__, create.__doc__ = __name__, name, f"Memory Wrap around timm's {backbone}."
    # The two kinds with a head to train have the same cfgs, of which there are thousands.
    default_cfgs[name] = (prefix == PREFIX and default_cfgs.get(BASELINE_PREFIX + backbone)) or DefaultCfg(
        tags=cfgs.tags,
        cfgs={tag: _memory_cfg(cfg, f"{backbone}.{tag}".rstrip("."), prefix) for tag, cfg in cfgs.cfgs.items()},
        is_pretrained=cfgs.is_pretrained,
    )
    setattr(module, name, create)
    exported = module.__all__
    # timm looks through the list for each name: with thousands of them that is half of the import's time.
    module.__all__ = []  # type: ignore[attr-defined]
    register_model(create)
    module.__all__ = exported  # type: ignore[attr-defined]
    return name


def memory_cfg(cfg: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Returns the cfg of a Memory Wrap architecture for the cfg of its backbone, but for the classifier's name."""
    return {**cfg, "architecture": architecture, "first_conv": add_prefix(cfg.get("first_conv"))}


def backbone_cfg(cfg: Any, backbone: str | None) -> Any:
    """Returns the backbone's cfg for that of a Memory Wrap architecture, or with `backbone=None` for an overlay."""
    if cfg is None or isinstance(cfg, str):
        return cfg
    cfg = dict(cfg)
    if "first_conv" in cfg:
        cfg["first_conv"] = _remove_prefix(cfg["first_conv"])
    if backbone is not None:
        cfg["architecture"] = backbone
        # The name in a Memory Wrap cfg may be the head's. The backbone's own stands in the registry.
        cfg["classifier"] = timm.models.resolve_pretrained_cfg(backbone).classifier
    return cfg


def _memory_cfg(cfg: PretrainedCfg, name: str, prefix: str) -> PretrainedCfg:
    # dataclasses.replace is ten times slower, and there are thousands.
    derived = copy(cfg)
    # timm completes "timm/" by the architecture's name, which here is the backbone's: the weights are.
    derived.hf_hub_id = f"timm/{name}" if cfg.hf_hub_id == "timm/" else cfg.hf_hub_id
    derived.classifier = add_prefix(cfg.classifier) if prefix == EVIDENCE_PREFIX else CLASSIFIER_NAMES["mlp"]
    derived.first_conv = add_prefix(cfg.first_conv)
    return derived


def _default_cfg(backbone: str) -> DefaultCfg | None:
    module = sys.modules[model_entrypoint(backbone).__module__]
    return getattr(module, "default_cfgs", {}).get(backbone)


def _remove_prefix(names: Any) -> Any:
    if isinstance(names, list | tuple):
        return tuple(map(_remove_prefix, names))
    return None if names is None else names.removeprefix(f"{BACKBONE}.")
