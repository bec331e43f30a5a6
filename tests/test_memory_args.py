"""Which arguments of a memory fit each other, and what they are by default."""

from typing import Any

import pytest

from timm_memwrap.memory_args import (
    CLASSIFIERS,
    MEMORY_ARGS,
    OWN_READ_HEADS,
    READ_HEADS,
    TRAINED_READ_HEADS,
    check_global_pool,
    resolve_memory_args,
)


def _fits(memory_only: bool, read_head: str, classifier: str) -> bool:
    if read_head in OWN_READ_HEADS:
        # With the backbone's own classifier, and from the memory alone. By pre-logits alone, "identity" votes too.
        return memory_only and (classifier == "own" or (classifier == "vote" and read_head != "pre_logits"))
    return classifier in ("mlp", "linear") or (classifier == "vote" and memory_only)


@pytest.mark.parametrize("memory_only", [False, True])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("read_head", READ_HEADS)
def test_every_pair_is_either_kept_as_it_is_or_refused(memory_only: bool, classifier: str, read_head: str) -> None:
    if _fits(memory_only, read_head, classifier):
        resolved = resolve_memory_args(memory_only, read_head=read_head, classifier=classifier)
        assert (resolved["read_head"], resolved["classifier"]) == (read_head, classifier)
        return
    with pytest.raises(ValueError, match=f"{read_head!r}|{classifier!r}"):
        resolve_memory_args(memory_only, read_head=read_head, classifier=classifier)


@pytest.mark.parametrize("read_head", READ_HEADS)
def test_defaults_are_those_of_the_read_head(read_head: str) -> None:
    assert resolve_memory_args(True, read_head=read_head) == {
        "distance": "cosine",
        "scale": {"logits": 10.0, "pre_logits": 10.0, "probabilities": 20.0}.get(read_head, 1.0),
        "read_head": read_head,
        "classifier": "own" if read_head in OWN_READ_HEADS else "mlp",
        "read": "reconstruction" if read_head.startswith("joint") else "sparsemax",
    }


@pytest.mark.parametrize(("read", "scale"), [("sparsemax", 20.0), ("reconstruction", 1.0)])
def test_the_scale_is_that_of_the_read(read: str, scale: float) -> None:
    for read_head in ("probabilities", "joint", "joint_equal"):
        assert resolve_memory_args(True, read_head=read_head, read=read)["scale"] == scale


@pytest.mark.parametrize("arguments", [{"distance": "l2"}, {"distance": "dot"}, {"scale": 5.0}, {"scale": "learned"}])
def test_a_reconstruction_has_neither_another_distance_nor_a_scale(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"read='reconstruction'.*{next(iter(arguments))}=.*read='sparsemax'"):
        resolve_memory_args(True, read_head="joint", **arguments)


def test_what_was_resolved_stays() -> None:
    resolved = resolve_memory_args(True, "l2", "learned", "logits", "vote")
    assert resolve_memory_args(True, **resolved) == resolved
    assert tuple(resolved) == MEMORY_ARGS


def test_read_heads_are_trained_or_the_backbones() -> None:
    assert (*TRAINED_READ_HEADS, *OWN_READ_HEADS) == READ_HEADS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": "l1"}, "Unknown distance='l1'.*'cosine'"),
        ({"read_head": "mlp"}, "Unknown read_head='mlp'.*'linear'"),
        ({"classifier": "knn"}, "Unknown classifier='knn'.*'vote'"),
        ({"read": "softmax"}, "Unknown read='softmax'.*'reconstruction'"),
    ],
)
def test_unknown_values_are_refused_with_those_that_are_known(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_memory_args(True, **arguments)


def test_no_head_reads_features_that_are_not_pooled() -> None:
    check_global_pool("", 0)
    check_global_pool("avg", 3)
    check_global_pool(None, 3)
    with pytest.raises(ValueError, match="global_pool='' with num_classes=3"):
        check_global_pool("", 3)
