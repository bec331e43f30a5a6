"""Gives a timm model in hand a memory."""

from copy import deepcopy
from typing import Any

from timm.utils import unwrap_model
from torch import nn

from timm_memwrap import registry
from timm_memwrap.backbone import classes_of
from timm_memwrap.constants import BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX
from timm_memwrap.factory import register_backbones
from timm_memwrap.memory_args import DEFAULT_OWN_READ_HEAD, OWN_READ_HEADS, resolve_memory_args
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.whole_model import split_revision

__all__ = ["wrap"]


def wrap(
    model: nn.Module,
    *,
    num_classes: int | None = None,
    memory_only: bool | None = None,
    distance: str = "cosine",
    scale: float | str | None = None,
    read_head: str | None = None,
    classifier: str | None = None,
    read: str | None = None,
) -> MemoryWrapModel:
    """Makes a Memory Wrap model of a timm model in hand, its weights kept bit for bit.

    A model with a trained classifier keeps it, and reads the memory with it: the logits are those of the weighted mean
    of a few memory samples that comes closest to the input. There is nothing to train; build the memory bank and
    predict. A model without a classifier (`num_classes=0`), or with `read_head="linear"` or `"identity"`,
    gets a new head to train.

    Args:
        model: A timm model, or what `torch.compile` or a parallel module made of one. It becomes the backbone and is
            shared, not copied, except where its classifier has to go.
        num_classes: Number of classes; `None` for those of the model's own classifier, also if it was replaced.
        memory_only: Whether to predict from the memory alone. `None` means yes with the model's own classifier and
            with a vote, else no.
        distance: As in `MemoryWrapModel`.
        scale: As in `MemoryWrapModel`.
        read_head: As in `MemoryWrapModel`. `None` is `"joint"` for a model with a classifier; else `"linear"`,
            or `"identity"` in a vote, which has nothing to train.
        classifier: As in `MemoryWrapModel`.
        read: As in `MemoryWrapModel`.

    Raises:
        ValueError: If `model` is not a timm model in timm's registry, its classifier is not where timm has it, or the
            arguments do not fit.

    Example:
        ```python
        >>> import timm, timm_memwrap
        >>> model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=10))
        >>> model.pretrained_cfg["architecture"]
        'memwrap_evidence_test_resnet'

        ```
    """
    model = unwrap_model(model)
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
    own_classes = _own_classes(model, cfg)
    num_classes = own_classes if num_classes is None else num_classes
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: the model has no classes of its own. Pass num_classes to wrap.")
    if read_head is None and own_classes == num_classes:
        read_head = DEFAULT_OWN_READ_HEAD
    own = read_head in OWN_READ_HEADS
    if memory_only is None:
        memory_only = own or classifier == "vote"
    # Before anything is copied or registered.
    resolve_memory_args(memory_only, distance, scale, read_head, classifier, read)
    if own and own_classes != num_classes:
        raise ValueError(
            f"read_head={read_head!r} keeps the model's classifier of {own_classes} classes, but "
            f"num_classes={num_classes}. Leave num_classes out, or pass read_head='linear' for a new head to train."
        )
    backbone = model
    if not own:
        backbone = deepcopy(model)
        if own_classes:
            backbone.reset_classifier(0)  # type: ignore[operator]

    architecture = cfg.get("architecture", "")
    register_backbones([architecture])
    wrapped = MemoryWrapModel(backbone, num_classes, memory_only, distance, scale, read_head, classifier, read)
    prefix = EVIDENCE_PREFIX if own else BASELINE_PREFIX if memory_only else PREFIX
    wrapped.pretrained_cfg = wrapped.default_cfg = {
        **registry.memory_cfg(cfg, prefix + architecture),
        "classifier": wrapped.classifier_name(),
        "num_classes": num_classes,
    }
    wrapped.pretrained_model_args = {}
    if cfg.get("source") == "hf-hub" and cfg.get("hf_hub_id"):
        wrapped.base_model = split_revision(cfg["hf_hub_id"])[0]
    wrapped._model_args = {**getattr(model, "_model_args", {}), **wrapped.memory_args, "num_classes": num_classes}
    return wrapped.train(model.training)


def _own_classes(model: Any, cfg: dict[str, Any]) -> int:
    """Returns the number of classes of a model's own classifier, which `model.num_classes` then says too."""
    names = cfg.get("classifier")
    for name in (names,) if isinstance(names, str) else names or ():
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"The classifier of {cfg.get('architecture')!r} is {name!r} in timm, which this model does not have: "
                f"{error}. To change the number of classes, call model.reset_classifier(n), or replace that layer: "
                f"model.{name} = torch.nn.Linear(model.head_hidden_size, n)."
            ) from error
    model.num_classes = classes_of(model)
    return model.num_classes
