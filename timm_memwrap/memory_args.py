"""The arguments that shape how a memory is read, and what they are by default."""

from typing import Any

from timm_memwrap._utils import check_choice
from timm_memwrap.attention import DISTANCES
from timm_memwrap.reconstruction import check_read

__all__ = [
    "CLASSIFIERS",
    "LAYOUT_ARG",
    "MEMORY_ARGS",
    "OWN_READ_HEADS",
    "READ_HEADS",
    "check_global_pool",
    "resolve_memory_args",
]

# Read heads that are trained with the memory, and those that read with the backbone's own, trained classifier.
TRAINED_READ_HEADS = ("linear", "identity")
OWN_READ_HEADS = ("joint", "joint_equal", "probabilities", "pre_logits", "logits")
READ_HEADS = (*TRAINED_READ_HEADS, *OWN_READ_HEADS)
DEFAULT_OWN_READ_HEAD = "joint"
# With which a classifier of several classes keeps its ranking (hub_configs/README.md).
MULTI_LABEL_READ_HEAD = "joint_equal"
CLASSIFIERS = ("mlp", "linear", "own", "vote")
MEMORY_ARGS = ("distance", "scale", "read_head", "classifier", "read")
# Beside them in `config.json`: what the memory looks like, for loaders that fill tensors in place.
LAYOUT_ARG = "memory_layout"

# By read head, chosen on held-out training images (hub_configs/README.md). Others have 1.0, as published.
_SCALES = {"logits": 10.0, "pre_logits": 10.0, "probabilities": 20.0, "joint": 20.0, "joint_equal": 20.0}


def resolve_memory_args(
    memory_only: bool,
    distance: str = "cosine",
    scale: float | str | None = None,
    read_head: str | None = None,
    classifier: str | None = None,
    read: str | None = None,
) -> dict[str, Any]:
    """Fills in what is `None` of the arguments that shape how a memory is read.

    Args:
        memory_only: Whether the prediction is made from the memory alone.
        distance: `"cosine"`, `"l2"` or `"dot"`.
        scale: Factor on the similarities; `"learned"` makes it a parameter. `None` is 20.0 with
            `read_head="probabilities"`, `"joint"` and `"joint_equal"`, 10.0 with `"pre_logits"` and `"logits"`, else
            1.0 as published, and with `read="reconstruction"`, which has none.
        read_head: What projects query and key: `"linear"`, a layer of its own; `"identity"`, nothing, as in the
            published code. Five read with the backbone's own classifier: `"joint"` compares the pre-logits that go
            into it and, to a seventh, its centred logits; `"joint_equal"` either to a half, for images of several
            classes; `"probabilities"` the pre-logits and, to a fifth, the
            probabilities that it predicts; `"pre_logits"` and `"logits"` one alone. `None` is `"identity"` for a vote,
            which trains no layer, else `"linear"`.
        classifier: What makes logits of the memory vector: `"mlp"`, as published; `"linear"`, one layer; `"own"`, the
            backbone's; `"vote"`, the weights summed over the samples' labels, with `memory_only`. `None` is `"own"`
            for the read heads that read with it, else `"mlp"`.
        read: How the samples are weighed: `"sparsemax"`, as published, by how similar each is to the input;
            `"reconstruction"`, so that their weighted mean comes closest to it. `None` is `"reconstruction"` for the
            read heads `"joint"` and `"joint_equal"`, else `"sparsemax"`.

    Raises:
        ValueError: If an argument is unknown, or two do not fit each other.
    """
    if read_head is None:
        read_head = "identity" if classifier == "vote" else "linear"
    check_choice("distance", distance, DISTANCES)
    check_choice("read_head", read_head, READ_HEADS)
    own = read_head in OWN_READ_HEADS
    if classifier is None:
        classifier = "own" if own else "mlp"
    check_choice("classifier", classifier, CLASSIFIERS)
    if own and not memory_only:
        raise ValueError(
            f"read_head={read_head!r} reads with the backbone's own classifier, from the memory alone. Create "
            f"'memwrap_evidence_<name>', or pass read_head='linear' for a head to train."
        )
    if own and classifier in ("mlp", "linear"):
        raise ValueError(
            f"read_head={read_head!r} reads with the backbone's own classifier, which classifier={classifier!r} would "
            f"have to learn again. Pass classifier='own' or 'vote'."
        )
    if classifier == "own" and not own:
        raise ValueError(
            f"classifier='own' keeps the backbone's classifier, but read_head={read_head!r} is trained without one. "
            f"Pass read_head={', '.join(map(repr, OWN_READ_HEADS))}."
        )
    if classifier == "vote" and read_head == "pre_logits":
        raise ValueError(
            "classifier='vote' has no use for the backbone's classifier, which read_head='pre_logits' keeps for the "
            "logits. Pass read_head='identity' to vote by the same similarity."
        )
    if classifier == "vote" and not memory_only:
        raise ValueError(
            "classifier='vote' classifies from the memory alone. Create 'memwrap_baseline_<name>', or pass "
            "memory_only=True to wrap."
        )
    if read is None:
        read = "reconstruction" if read_head in ("joint", "joint_equal") else "sparsemax"
    if scale is None:
        scale = 1.0 if read == "reconstruction" else _SCALES.get(read_head, 1.0)
    check_read(read, distance, scale)
    return {"distance": distance, "scale": scale, "read_head": read_head, "classifier": classifier, "read": read}


def check_global_pool(global_pool: str | None, num_classes: int) -> None:
    """Raises a `ValueError` if a head would have to read features that are not pooled."""
    if global_pool == "" and num_classes > 0:
        raise ValueError(
            f"global_pool='' with num_classes={num_classes}: the memory compares pooled encodings. Leave global_pool "
            f"at its default, or pass num_classes=0 for features."
        )
