"""The heads that can be compared: what each is trained as, and how it then reads a memory.

Shapes: B inputs, M memory samples, C classes.
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
from timm_memwrap.memory_index import MemoryIndex
from timm_memwrap.model import KEPT_CLASSIFIER, MemoryWrapModel
from timm_memwrap.registration import wrap
from timm_memwrap.training.configuration import Recipe

__all__ = ["HEADS", "RUNS", "Head", "NearestNeighbours", "SoftmaxVote", "parse_head", "recipe_of"]

NEIGHBOURS = 10
# Of the softmax vote. As sharp as is usual for cosine similarities of unit vectors (a temperature of 0.05).
SOFTMAX_SCALE = 20.0


class NearestNeighbours(LabelVote):
    """The k nearest neighbours: each has the same vote.

    Args:
        encoder_output_dim: As in `LabelVote`.
        output_dim: As in `LabelVote`.
        neighbours: How many vote; all of a memory that has fewer.
    """

    def __init__(self, encoder_output_dim: int, output_dim: int, neighbours: int = NEIGHBOURS) -> None:
        super().__init__(encoder_output_dim, output_dim, head=nn.Identity())
        self.neighbours = neighbours

    def search(
        self, input_encoding: Tensor, keys: Keys, hidden: Tensor | None = None, index: MemoryIndex | None = None
    ) -> tuple[Tensor, Tensor]:
        """Finds the nearest samples. See `MemoryLayer.search`."""
        similarity = _visible(self.similarity(input_encoding, keys), hidden)
        best, positions = similarity.topk(min(self.neighbours, similarity.shape[-1]), dim=-1)
        seen = (best > MASKED / 2).float()
        return seen / seen.sum(dim=-1, keepdim=True).clamp(min=1), positions


class SoftmaxVote(LabelVote):
    """The Nadaraya-Watson estimator: all samples vote, by the softmax of their similarities.

    The kernel of the NW head (Wang and Sabuncu 2022, https://arxiv.org/abs/2212.03411), on the features of the plain
    classifier instead of its own.

    Args:
        encoder_output_dim: As in `LabelVote`.
        output_dim: As in `LabelVote`.
        scale: Factor on the similarities.
    """

    def __init__(self, encoder_output_dim: int, output_dim: int, scale: float = SOFTMAX_SCALE) -> None:
        super().__init__(encoder_output_dim, output_dim, head=nn.Identity(), scale=scale)

    def search(
        self, input_encoding: Tensor, keys: Keys, hidden: Tensor | None = None, index: MemoryIndex | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighs all samples. See `MemoryLayer.search`."""
        similarity = _visible(self.similarity(input_encoding, keys), hidden)
        return similarity.softmax(dim=-1).sort(dim=-1, descending=True)


def _visible(similarity: Tensor, hidden: Tensor | None) -> Tensor:
    if hidden is None:
        return similarity
    assert hidden.dtype != torch.bool, "A comparison hides positions."
    return similarity.scatter(1, hidden, MASKED)


@dataclass(frozen=True)
class Head:
    """One head of a comparison.

    Args:
        run: The training that it needs, one of `RUNS`. Heads of the same run share its weights.
        describe: What it is, in a few words.
        read: Makes the model that reads a memory, of what was trained; `None` for a head that reads none.
        redrawn: Whether its memory is drawn anew for each batch, as in the paper, instead of a bank.
    """

    run: str
    describe: str
    read: Callable[[nn.Module], MemoryWrapModel] | None = None
    redrawn: bool = False


# What a training differs in from the recipe, by the section.
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"memory": {"mode": "none"}},
    "mlp": {"memory": {"mode": "batch"}, "model": {"read_head": "identity"}},
    "batch": {"memory": {"mode": "batch"}},
    "queue": {"memory": {"mode": "queue"}},
    "sample": {"memory": {"mode": "sample"}, "model": {"read_head": "identity"}},
    "sample_baseline": {"memory": {"mode": "sample"}, "model": {"read_head": "identity", "memory_only": True}},
}
# Trained and evaluated with nothing to read.
CONTROL = "mlp"


def _as_it_is(model: nn.Module) -> MemoryWrapModel:
    assert isinstance(model, MemoryWrapModel)
    # A bank of its own: two heads may be of the same run.
    return copy.deepcopy(model)


def _votes(layer: Callable[[int, int], LabelVote]) -> Callable[[nn.Module], MemoryWrapModel]:
    def read(model: nn.Module) -> MemoryWrapModel:
        voting = wrap(model, read_head="identity", classifier="vote")
        voting.head = layer(voting.encoding_size, voting.num_classes)
        return voting

    return read


def _wrapped(**options: Any) -> Callable[[nn.Module], MemoryWrapModel]:
    return lambda model: wrap(model, **options)


HEADS: dict[str, Head] = {
    "linear": Head("plain", "the plain timm classifier"),
    "mlp": Head("mlp", "the published head's MLP with nothing to read"),
    "knn": Head("plain", f"{NEIGHBOURS} nearest neighbours by features", _votes(NearestNeighbours)),
    "nadaraya_watson": Head("plain", "softmax vote by features", _votes(SoftmaxVote)),
    "published": Head("sample", "Memory Wrap as published, memory redrawn", _as_it_is, redrawn=True),
    "published_bank": Head("sample", "the same weights, reading a bank", _as_it_is),
    "published_baseline": Head("sample_baseline", "the paper's memory-only baseline, redrawn", _as_it_is, redrawn=True),
    "batch": Head("batch", "trained to read the rest of the batch", _as_it_is),
    "queue": Head("queue", "trained to read recent encodings", _as_it_is),
    "vote": Head("plain", "vote of labels by features and probabilities", _wrapped(classifier="vote")),
    **{
        name: Head("plain", f"the plain classifier, its {what} compared", _wrapped(read_head=name))
        for name, what in (
            ("classifier", "centred logits"),
            ("pre_logits", "features"),
            ("probabilities", "probabilities"),
        )
    },
}
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "scale": float,
    "temperature": float,
    "memory_only": lambda value: {"true": True, "false": False}[value.lower()],
    "classifier": str,
    "distance": str,
}


def parse_head(text: str) -> Head:
    """Returns a head by its name, and for a wrapped classifier options of `wrap` behind it: `classifier:scale=5`.

    Raises:
        ValueError: If there is no such head or option.
    """
    name, *options = text.split(":")
    if name not in HEADS:
        near = get_close_matches(name, HEADS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(map(repr, HEADS))}."
        raise ValueError(f"Unknown head {name!r} in comparison.heads. {hint}")
    if not options:
        return HEADS[name]
    if name not in KEPT_CLASSIFIER:
        raise ValueError(f"{text!r} in comparison.heads: {name!r} takes no options, {', '.join(KEPT_CLASSIFIER)} do.")
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
    """Returns the recipe of a run: the comparison's, with what the run differs in, and the seed."""
    changes = RUNS[run]
    return Recipe(
        model=replace(recipe.model, **changes.get("model", {})),
        data=replace(recipe.data, subset_seed=seed),
        training=replace(recipe.training, seed=seed),
        memory=replace(recipe.memory, **changes["memory"]),
    )
