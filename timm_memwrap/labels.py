"""What labels are: one class for each sample, or several; and what logits say in either case.

Several labels are multi-hot: a row for each sample, with a 1 for each class that it has. Classes then do not exclude
each other, each has a probability of its own, and a sample may have none.

Shapes: M samples, C classes, B inputs.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LABEL_DTYPES", "class_counts", "multi_hot", "plain_labels", "present", "probabilities"]

# By the number of dimensions: class indices [M], or multi-hot [M, C].
LABEL_DTYPES = {1: torch.int64, 2: torch.uint8}


def plain_labels(labels: Tensor) -> Tensor:
    """Returns a copy of labels as they are remembered: class indices `[M]` in int64, or multi-hot `[M, C]` in uint8.

    Raises:
        ValueError: If they are neither integers nor multi-hot.
    """
    if labels.ndim == 2:
        if not labels.is_meta and bool(((labels != 0) & (labels != 1)).any()):
            raise ValueError(
                f"labels of shape {list(labels.shape)} have values other than 0 and 1; expected 1 for each class that "
                f"a sample has. Soft labels cannot be remembered: pass what they were made of."
            )
    elif labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels are {labels.dtype}; expected integers, one class index per sample; or [M, C] of 0 and 1, for "
            f"samples of several classes."
        )
    return labels.detach().to(LABEL_DTYPES.get(labels.ndim, torch.int64), copy=True)


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Returns which of a model's classes samples have, bool `[M, C]`, by their labels of either kind."""
    if labels.ndim == 1:
        return F.one_hot(labels, num_classes).bool()
    # Of classes that came later, no sample says anything.
    return F.pad(labels, (0, num_classes - labels.shape[1])).bool()


def class_counts(labels: Tensor | None) -> dict[int, int]:
    """Returns the number of samples of each class that has any; a sample of several classes counts for each."""
    if labels is None:
        return {}
    if labels.ndim == 2:
        return {label: count for label, count in enumerate(labels.sum(dim=0, dtype=torch.long).tolist()) if count}
    return dict(sorted(Counter(labels.tolist()).items()))


def probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """Computes the probabilities `[B, C]` of classes that exclude each other, or of each class for itself."""
    return logits.sigmoid() if multi_label else logits.softmax(dim=-1)


def present(logits: Tensor) -> Tensor:
    """Returns which classes logits `[B, C]` say are present, each more probable than not."""
    return logits > 0
