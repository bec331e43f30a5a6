"""The heads that can be compared: what each is trained as, and how it then reads a memory.

Shapes: B inputs, M memory samples.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap.attention import MASKED, Keys
from timm_memwrap.layers import LabelVote
from timm_memwrap.memory_args import OWN_READ_HEADS
from timm_memwrap.memory_layer import mask_of
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.readouts import PreparedMemory, Read
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.wrapping import wrap

__all__ = ["HEADS", "RUNS", "Head", "NearestNeighbours", "SoftmaxVote", "parse_head", "recipe_of"]


class _Vote(LabelVote):
    """A vote with other weights than the sparsemax, which no index finds."""

    def read(self, query: Tensor, memory: PreparedMemory, hidden: Tensor | None = None, ranked: bool = True) -> Read:
        """Reads a memory. See `MemoryLayer.read`."""
        return super().read(query, memory._replace(key_index=None), hidden, ranked)

    def _weigh(self, found: Tensor, query: Tensor, keys: Keys | None, hidden: Tensor | None) -> Tensor:
        return self._weights(found if hidden is None else found.masked_fill(mask_of(hidden, found), MASKED))

    def _weights(self, similarities: Tensor) -> Tensor:
        raise NotImplementedError


class NearestNeighbours(_Vote):
    """The k nearest neighbours, which have the same vote each; all samples of a memory that has fewer."""

    def __init__(self, encoder_output_dim: int, output_dim: int, neighbours: int = 10) -> None:
        super().__init__(encoder_output_dim, output_dim, head=nn.Identity())
        self.neighbours = neighbours

    def _weights(self, similarities: Tensor) -> Tensor:
        best, positions = similarities.topk(min(self.neighbours, similarities.shape[-1]), dim=-1)
        votes = (best > MASKED / 2).float()
        weights = votes / votes.sum(dim=-1, keepdim=True).clamp(min=1)
        return torch.zeros_like(similarities).scatter(1, positions, weights)


class SoftmaxVote(_Vote):
    """The Nadaraya-Watson estimator: all samples vote, by the softmax of their similarities.

    This is the kernel of the NW head (Wang and Sabuncu 2022, https://arxiv.org/abs/2212.03411), on the features of the
    plain classifier instead of its own. The scale, a temperature of 0.05, is usual for cosine similarities.
    """

    def __init__(self, encoder_output_dim: int, output_dim: int, scale: float = 20.0) -> None:
        super().__init__(encoder_output_dim, output_dim, head=nn.Identity(), scale=scale)

    def _weights(self, similarities: Tensor) -> Tensor:
        return (similarities * self.scale).softmax(dim=-1)


@dataclass(frozen=True)
class Head:
    """A head of a comparison."""

    run: str  # the training that it needs, one of RUNS, whose weights it shares with others
    read: Callable[[nn.Module], MemoryWrapModel] | None = None  # makes the model that reads a memory, if it reads one
    redrawn: bool = False  # whether a memory is drawn for each batch, as in the paper, instead of a bank


# How a training differs from the recipe, by section.
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"memory": {"mode": "none"}},
    "mlp": {"memory": {"mode": "batch"}, "model": {"read_head": "identity"}},
    "batch": {"memory": {"mode": "batch"}},
    "queue": {"memory": {"mode": "queue"}},
    "sample": {"memory": {"mode": "sample"}, "model": {"read_head": "identity"}},
    "sample_baseline": {"memory": {"mode": "sample"}, "model": {"read_head": "identity", "memory_only": True}},
}
# The run that is trained and evaluated with nothing to read.
CONTROL = "mlp"


def _as_trained(model: nn.Module) -> MemoryWrapModel:
    assert isinstance(model, MemoryWrapModel)
    # Two heads of the same run have a bank each.
    return copy.deepcopy(model)


def _wrapped(
    layer: Callable[[int, int], LabelVote] | None = None,
    temperature: float = 1.0,
    logit_weight: float | None = None,
    **options: Any,
) -> Callable[[nn.Module], MemoryWrapModel]:
    def read(model: nn.Module) -> MemoryWrapModel:
        wrapped = wrap(model, **options)
        wrapped.temperature = temperature
        if logit_weight is not None:
            wrapped.head.head.logit_weight = logit_weight
        if layer is not None:
            wrapped.head = layer(wrapped.encoding_size, wrapped.num_classes)
        return wrapped

    return read


_VOTE: dict[str, Any] = {"read_head": "identity", "classifier": "vote"}
HEADS: dict[str, Head] = {
    "linear": Head("plain"),  # the plain timm classifier
    "mlp": Head("mlp"),  # the published head's MLP with nothing to read
    "knn": Head("plain", _wrapped(NearestNeighbours, **_VOTE)),
    "nadaraya_watson": Head("plain", _wrapped(SoftmaxVote, **_VOTE)),
    "published": Head("sample", _as_trained, redrawn=True),
    "published_bank": Head("sample", _as_trained),  # the same weights, reading a bank
    "published_baseline": Head("sample_baseline", _as_trained, redrawn=True),  # the paper's memory-only head
    "batch": Head("batch", _as_trained),
    "queue": Head("queue", _as_trained),
    "vote": Head("plain", _wrapped(classifier="vote")),
    **{name: Head("plain", _wrapped(read_head=name)) for name in OWN_READ_HEADS},
}
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "scale": float,
    "temperature": float,
    "logit_weight": float,
    "classifier": str,
    "distance": str,
    "read": str,
}


def parse_head(text: str) -> Head:
    """Returns a head by its name; options of `wrap` may follow that of a wrapped classifier, as in `logits:scale=5`."""
    name, *options = text.split(":")
    if name not in HEADS:
        near = get_close_matches(name, HEADS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(map(repr, HEADS))}."
        raise ValueError(f"Unknown head {name!r} in comparison.heads. {hint}")
    if not options:
        return HEADS[name]
    if name not in OWN_READ_HEADS:
        raise ValueError(f"{text!r} in comparison.heads: {name!r} takes no options, {', '.join(OWN_READ_HEADS)} do.")
    if not name.startswith("joint") and any(option.startswith("logit_weight=") for option in options):
        raise ValueError(f"{text!r} in comparison.heads: only the heads 'joint' and 'joint_equal' have a logit_weight.")
    given: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        try:
            given[key] = _OPTIONS[key](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{option!r} in comparison.heads is not an option. Expected key=value with one of "
                f"{', '.join(_OPTIONS)}, e.g. {name}:scale=5."
            ) from None
    return replace(HEADS[name], read=_wrapped(read_head=name, **given))


def recipe_of(recipe: Recipe, run: str, seed: int) -> Recipe:
    """Returns the recipe of a run: the comparison's with the run's differences and the seed."""
    changes = RUNS[run]
    return Recipe(
        model=replace(recipe.model, **changes.get("model", {})),
        data=replace(recipe.data, subset_seed=seed),
        training=replace(recipe.training, seed=seed),
        memory=replace(recipe.memory, **changes["memory"]),
    )
