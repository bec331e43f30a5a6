"""How well a model tells images of its classes from others, by its familiarity and by what the field compares with.

Shapes: N inputs, E width of an encoding, M memory samples.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timm_memwrap._utils import evaluating
from timm_memwrap.attention import make_keys, unit, wide
from timm_memwrap.data import to_batch
from timm_memwrap.explaining.ranking import auroc, fpr_at_95
from timm_memwrap.explaining.reading import encodings_of, snapshot
from timm_memwrap.explaining.results import Result
from timm_memwrap.familiarity import UNFAMILIAR, familiarity, reference_quantiles
from timm_memwrap.memory_checks import check_single_label
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.search import exact_index

__all__ = ["Detection", "UnknownMetrics", "evaluate_unknown"]

# Of the k-th neighbour, the k that Sun et al. use for CIFAR-10; fewer in a smaller memory.
_NEIGHBOURS = 50
_SCORES = ("familiarity", "max_softmax", "energy", "neighbours")


@dataclass(frozen=True)
class Detection(Result):
    """How well a score ranks known images before unknown ones.

    Args:
        auroc: How often a known image has a higher score than an unknown one; 0.5 is chance.
        fpr_at_95: Share of the unknown images that pass a threshold which 95 % of the known ones pass. Lower is better.
    """

    auroc: float
    fpr_at_95: float


@dataclass(frozen=True)
class UnknownMetrics(Result):
    """What `evaluate_unknown` found. Unknown classes that look like known ones stay hard for every score.

    Args:
        known: Number of known images.
        unknown: Number of unknown images.
        stopped_known: Share of the known images whose familiarity is below 0.05: about that, if `calibrate` was given
            images like them.
        stopped_unknown: The same of the unknown images.
        familiarity: By how near the samples come that are read.
        max_softmax: By the largest probability (MSP, Hendrycks and Gimpel 2017, https://arxiv.org/abs/1610.02136), of
            the plain classifier if the model kept it.
        energy: By the logarithm of the sum of exponentiated logits (Liu et al. 2020, https://arxiv.org/abs/2010.03759),
            of the same logits.
        neighbours: By the similarity of the 50th nearest memory sample by pre-logits (Sun et al. 2022,
            https://arxiv.org/abs/2204.06507).
    """

    known: int
    unknown: int
    stopped_known: float
    stopped_unknown: float
    familiarity: Detection
    max_softmax: Detection
    energy: Detection
    neighbours: Detection

    def __str__(self) -> str:
        """Returns a table of the scores."""
        rows = [
            f"{name:12}  {found.auroc:6.3f}  {found.fpr_at_95:6.3f}"
            for name in _SCORES
            for found in [getattr(self, name)]
        ]
        below = f"familiarity below {UNFAMILIAR:g}"
        return "\n".join(
            [
                f"{self.known:,} known and {self.unknown:,} unknown images",
                f"{below}: {self.stopped_known:.1%} of the known, {self.stopped_unknown:.1%} of the unknown",
                f"{'':12}  {'AUROC':>6}  {'FPR95':>6}",
                *rows,
            ]
        )


def evaluate_unknown(model: MemoryWrapModel, known: Any, unknown: Any, progress: bool = True) -> UnknownMetrics:
    """Measures how well a model tells images of its classes from images of none of them.

    Args:
        model: A model with a memory bank, better one that was calibrated. Its mode is restored.
        known: Images of its classes that it was not trained on, as in `evaluate_explanations`.
        unknown: Images of none of its classes, without labels: batches `[B, C, H, W]`, or one by one as `explain` takes
            them.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the bank or the data is empty, or samples may have several classes.
    """
    model = snapshot(model)
    check_single_label(model, "evaluate_unknown")
    with encodings_of(model, known, "Known", progress) as batches:
        scores = [_scores(model, (encoding for encoding, _ in batches))]
    with evaluating(model):
        shown = tqdm(unknown, desc="Unknown", disable=not progress)
        scores.append(_scores(model, (model.encode(to_batch(model, images)) for images in shown)))
    is_known = torch.cat([torch.full((len(found["energy"]),), i == 0) for i, found in enumerate(scores)])
    quantiles = reference_quantiles(model).cpu()
    stopped = [float((familiarity(-found["familiarity"], quantiles) < UNFAMILIAR).double().mean()) for found in scores]
    return UnknownMetrics(
        known=int(is_known.sum()),
        unknown=int((~is_known).sum()),
        stopped_known=stopped[0],
        stopped_unknown=stopped[1],
        **{name: _detection(torch.cat([found[name] for found in scores]), is_known) for name in _SCORES},
    )


def _detection(scores: Tensor, is_known: Tensor) -> Detection:
    ranks = auroc(scores, is_known)
    assert ranks is not None
    return Detection(ranks, fpr_at_95(scores, is_known))


def _scores(model: MemoryWrapModel, encodings: Iterable[Tensor]) -> dict[str, Tensor]:
    """Returns scores `[N]` of all encodings `[B, E]`, by name; higher is more known."""
    width, parts = model.head_hidden_size, []
    index = exact_index(make_keys(wide(model.memory_bank.filled()[0])[:, :width], "cosine"))
    for encoding in encodings:
        readout = model.read(encoding)
        logits = (model.own_classifier(encoding) if model.keeps_classifier else readout.logits).float()
        similarities, _ = index.nearest(unit(wide(encoding)[:, :width]), _NEIGHBOURS)
        scores = {
            # Not by the share: beyond the quantiles all images have the same.
            "familiarity": -readout.remainder,
            "max_softmax": logits.softmax(dim=-1).amax(dim=-1),
            "energy": logits.logsumexp(dim=-1),
            "neighbours": similarities[:, -1],
        }
        parts.append({name: values.cpu() for name, values in scores.items()})
    if not parts:
        raise ValueError("There are no unknown images. Pass at least one.")
    return {name: torch.cat([part[name] for part in parts]) for name in _SCORES}
