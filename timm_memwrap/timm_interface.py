"""timm's model interface for a model that stands around a timm backbone.

What the backbone can do, the model can do; names of parameters and modules get the backbone's prefix.
"""

import re
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

from timm.models import FeatureInfo
from torch import Tensor, nn

from timm_memwrap.backbone import classifiers_of
from timm_memwrap.constants import BACKBONE
from timm_memwrap.fingerprint import WatchedFingerprint, fingerprint
from timm_memwrap.heads import CLASSIFIER_NAMES
from timm_memwrap.memory_args import LAYOUT_ARG, OWN_READ_HEADS, check_global_pool

if TYPE_CHECKING:
    from timm_memwrap.engines.memory import MilvusMemory

__all__ = ["TimmInterface", "add_prefix"]

# Capabilities that only some backbones have: `hasattr` must answer as it does for the backbone.
_DELEGATED = frozenset({"forward_intermediates", "output_fmt", "set_grad_checkpointing"})
_ADAPTED = {
    "group_matcher": "_group_matcher",
    "no_weight_decay": "_no_weight_decay",
    "prune_intermediate_layers": "_prune_intermediate_layers",
    "set_input_size": "_set_input_size",
    "feature_info": "_feature_info",
}


def add_prefix(names: Any) -> Any:
    """Puts the backbone's prefix before a parameter's or module's name, or each of several; `None` stays."""
    if names is None:
        return None
    if isinstance(names, str):
        return f"{BACKBONE}.{names}"
    return tuple(f"{BACKBONE}.{name}" for name in names)


class TimmInterface(nn.Module):
    """The part of timm's model interface that only concerns the backbone."""

    backbone: Any
    num_classes: int
    memory_bank: Any
    memory_args: dict[str, Any]
    _traits: dict[str, Any]
    _fingerprint: WatchedFingerprint
    engine: "MilvusMemory | None"
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]
    pretrained_model_args: dict[str, Any]
    # Id on the Hub of the model that the backbone's weights were of before training, if that is known.
    base_model: str | None = None

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm writes to `config.json` as the arguments that the model is made with."""
        layout = {LAYOUT_ARG: self.memory_layout()} if len(self.memory_bank) else {}
        return {**self._made_with, **layout}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._made_with = {name: value for name, value in args.items() if name != LAYOUT_ARG}

    def memory_layout(self, bank: Any = None) -> dict[str, Any]:
        """Returns dtypes and shapes of a bank, the model's if `None`, for the model that a loader fills in place."""
        return {"num_classes": self.num_classes, **(self.memory_bank if bank is None else bank).layout()}

    def __getattr__(self, name: str) -> Any:
        if name in _DELEGATED:
            return getattr(self.backbone, name)
        if name in _ADAPTED and hasattr(self.backbone, name):
            adapted = object.__getattribute__(self, _ADAPTED[name])
            return adapted() if name == "feature_info" else adapted
        return super().__getattr__(name)

    @property
    def keeps_classifier(self) -> bool:
        """Whether the memory is read with the backbone's own classifier."""
        return self.memory_args["read_head"] in OWN_READ_HEADS

    @property
    def multi_label(self) -> bool:
        """Whether classes do not exclude each other, as in the memory: each then has a probability of its own."""
        return self.memory_bank.multi_label

    @property
    def num_features(self) -> int:
        """Width of the backbone's unpooled features."""
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of `forward_head(x, pre_logits=True)`."""
        return self.backbone.head_hidden_size

    @property
    def in_chans(self) -> int:
        """Number of channels of an input image."""
        return self.backbone.in_chans

    def forward_features(self, x: Tensor, **kwargs: Any) -> Any:
        """Computes the backbone's unpooled features."""
        return self.backbone.forward_features(x, **kwargs)

    def classifier_name(self) -> str | tuple[str, ...] | None:
        """Returns the name of the last layer, or names of several, as in timm's `pretrained_cfg["classifier"]`."""
        if self.keeps_classifier:
            return add_prefix(self.backbone.pretrained_cfg["classifier"])
        return CLASSIFIER_NAMES[self.memory_args["classifier"]]

    def get_classifier(self) -> nn.Module:
        """Returns the last layer; `nn.Identity` if there is none."""
        if self.num_classes and self.keeps_classifier:
            return self.backbone.get_classifier()
        name = self.classifier_name()
        return self.get_submodule(name) if self.num_classes and isinstance(name, str) else nn.Identity()

    def check_head(self) -> None:
        """Raises a `ValueError` if the model has no classes to tell apart, or its backbone's classifier has others."""
        if self.num_classes == 0:
            raise ValueError(
                "num_classes=0: the model has no head to read a memory with. Call reset_classifier(n) first."
            )
        if self.num_classes == 1:
            raise ValueError(
                "num_classes=1: with one class, each prediction is that class. Create the model with num_classes=2 and "
                "label samples 0 and 1."
            )
        if self.keeps_classifier and self.backbone.num_classes != self.num_classes:
            raise ValueError(
                f"The backbone's classifier has {self.backbone.num_classes} classes, the model {self.num_classes}. "
                f"Call model.reset_classifier(n), which changes both, instead of model.backbone.reset_classifier(n)."
            )

    def encoder_fingerprint(self, rehash: bool = False) -> str:
        """Returns the fingerprint of the weights that encode images.

        It is computed again when they may have changed, or always with `rehash`: a write through `tensor.data`, as of
        a hand-written EMA, is not seen.
        """
        if rehash:
            self._fingerprint.forget()
        return self._fingerprint.of(self.backbone)

    def memory_is_stale(self, rehash: bool = False) -> bool:
        """Returns whether the encoder is another than encoded the memory bank; `rehash` as in `encoder_fingerprint`."""
        encoder = self.memory_bank.provenance.encoder
        return bool(encoder) and encoder != self.encoder_fingerprint(rehash)

    def classifier_fingerprint(self) -> str:
        """Returns the fingerprint of the backbone's own classifier."""
        return fingerprint(classifiers_of(self.backbone))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one, as timm's `reset_classifier` does.

        The memory bank is dropped, with a warning: its labels mean nothing to other classes. Only a vote that reads
        the backbone's features keeps it when classes are added, since it has no class layer.

        Args:
            num_classes: New number of classes; 0 for none.
            global_pool: New pooling, if not `None`; `""` for none, with `num_classes=0` only.

        Raises:
            ValueError: If a head is to read features that are not pooled.
        """
        check_global_pool(global_pool, num_classes)
        if self.keeps_classifier:
            self.backbone.reset_classifier(num_classes, global_pool)
        elif global_pool is not None:
            self.backbone.reset_classifier(0, global_pool)
        if global_pool is not None:
            self._made_with["global_pool"] = global_pool
        self._reset_head(num_classes)

    def _reset_head(self, num_classes: int) -> None:
        raise NotImplementedError

    def _feature_info(self) -> Any:
        info = self.backbone.feature_info
        entries = info.info if isinstance(info, FeatureInfo) else info
        # An entry without a module stays so. All are copies, since timm's `FeatureInfo` writes into what it is given.
        prefixed = [
            {**entry, **({"module": add_prefix(entry["module"])} if entry.get("module") else {})} for entry in entries
        ]
        if not isinstance(info, FeatureInfo):
            return prefixed
        adapted = copy(info)
        adapted.info = prefixed
        return adapted

    def _group_matcher(self, coarse: bool = False) -> Any:
        """Adapts the backbone's layer groups. The head matches none of them and is last, as timm's heads are."""
        matcher = self.backbone.group_matcher(coarse=coarse)
        if isinstance(matcher, dict):
            return {name: _prefix_spec(spec) for name, spec in matcher.items()}
        return _prefix_callable(matcher)

    def _no_weight_decay(self) -> set[str]:
        return {add_prefix(name) for name in self.backbone.no_weight_decay()}

    def _prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> Any:
        indices = self.backbone.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if prune_head:
            self.reset_classifier(0, "")
        return indices

    def _set_input_size(self, *args: Any, **kwargs: Any) -> None:
        self.backbone.set_input_size(*args, **kwargs)
        # timm records the new size on the model that it resized; stock saving reads it from this one.
        self._traits = {**self._traits, "img_size": self.backbone._traits.get("img_size")}
        args_of_backbone = getattr(self.backbone, "_model_args", {})
        self._model_args = {k: v for k, v in self._model_args.items() if k != "img_size"} | args_of_backbone


def _prefix_spec(spec: Any) -> Any:
    if spec is None:
        return None
    if isinstance(spec, str):
        return _prefix_regex(spec)
    return [(None if part[0] is None else _prefix_regex(part[0]), *part[1:]) for part in spec]


def _prefix_regex(regex: str) -> str:
    """Anchors `regex`, which timm applies with `re.match`, behind the prefix.

    `re.match` anchors every alternative at the start, with or without its own `^`; behind a prefix a `^` could not
    match, so those that are anchors (neither escaped nor the negation of a set) go.
    """
    without_anchors = re.sub(r"(?<![\[\\])\^", "", regex)
    return rf"^{BACKBONE}\.(?:{without_anchors})"


def _prefix_callable(matcher: Callable[[str], Any]) -> Callable[[str], Any]:
    def matches(name: str) -> Any:
        prefix = f"{BACKBONE}."
        return matcher(name[len(prefix) :]) if name.startswith(prefix) else (float("inf"),)

    return matches
