"""The nearest samples of some classes, for all of these classes in one pass over the memory.

Shapes: B queries, M memory samples, D width of a query, E of a stored encoding, R classes asked for per query, C
classes, K samples kept per class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap.attention import float32_island, unit
from timm_memwrap.labels import multi_hot

__all__ = ["lengths_of", "nearest_by_class"]

# Samples in a block. All of the first block are sorted, and of the others only what is nearer than what was found.
_BLOCK = 2**13
# Similarities that are in memory at a time.
_MOST_SCORES = 2**21


@torch.no_grad()
def lengths_of(encodings: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Returns the lengths `[M]` of the first `width` columns of encodings `[M, E]`, and 1 where they are all zero."""
    parts = (part[:, :width].to(dtype) for part in encodings.split(_BLOCK))
    lengths = torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts])
    return torch.where(lengths == 0, torch.ones_like(lengths), lengths)


@torch.no_grad()
def nearest_by_class(
    queries: Tensor, encodings: Tensor, lengths: Tensor, labels: Tensor, classes: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Finds for each query the samples with the highest cosine similarity among those of each of some classes.

    It is exact, and of equal samples the first in the memory comes first.

    Args:
        queries: Vectors `[B, D]`.
        encodings: The memory `[M, E]` in any precision. Its first D columns are compared.
        lengths: Their lengths `[M]`, as `lengths_of` returns them.
        labels: Labels `[M]`, or multi-hot `[M, C]`: a sample is then found for each of its classes.
        classes: Different classes `[B, R]`, of at least 0.
        count: How many samples K to find of each.

    Returns:
        Similarities `[B, R, K]`, highest first, and positions `[B, R, K]` of the samples: -1 where a class has fewer.
    """
    if labels.ndim == 2:
        return _nearest_of_several(unit(queries), encodings, lengths, labels, classes, count)
    (rows, several), width, device = classes.shape, queries.shape[1], queries.device
    # The place of a class among those that a query asks for; one more for all others, which nothing is found of.
    places = classes.new_full((rows, 1 + int(max(labels.max(), classes.max()))), several)
    places.scatter_(1, classes, torch.arange(several, device=device).expand_as(classes))
    groups = torch.arange(rows * several, device=device)
    best = queries.new_full((rows * several, count), -torch.inf)
    positions = classes.new_full(best.shape, -1)
    queries = unit(queries)
    block_size = max(1, min(_BLOCK, _MOST_SCORES // max(1, rows)))
    for start in range(0, len(labels), block_size):
        block = slice(start, start + block_size)
        with float32_island(queries):
            similarities = queries @ encodings[block, :width].to(queries.dtype).T / lengths[block]
        place = places[:, labels[block]]
        worst = F.pad(best[:, -1].view(rows, several), (0, 1), value=torch.inf)
        row, column = (similarities > worst.gather(1, place)).nonzero(as_tuple=True)
        # What was found before comes first, so that it stays so where two are equal.
        found = torch.cat([best.flatten(), similarities[row, column]])
        where = torch.cat([positions.flatten(), column + start])
        group = torch.cat([groups.repeat_interleave(count), row * several + place[row, column]])
        order = found.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        size = group.bincount(minlength=len(groups))
        kept = order[(size.cumsum(0) - size).unsqueeze(1) + torch.arange(count, device=device)]
        best, positions = found[kept], where[kept]
    return best.view(rows, several, count), positions.view(rows, several, count)


def _nearest_of_several(
    queries: Tensor, encodings: Tensor, lengths: Tensor, labels: Tensor, classes: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Finds what `nearest_by_class` does for multi-hot labels, with queries of length 1."""
    (rows, several), width = classes.shape, queries.shape[1]
    best = queries.new_full((rows, several, count), -torch.inf)
    positions = classes.new_full(best.shape, -1)
    num_classes = max(labels.shape[1], 1 + int(classes.max()))
    block_size = max(1, min(_BLOCK, _MOST_SCORES // max(1, rows * several)))
    for start in range(0, len(labels), block_size):
        block = slice(start, start + block_size)
        with float32_island(queries):
            similarities = queries @ encodings[block, :width].to(queries.dtype).T / lengths[block]
        has = multi_hot(labels[block], num_classes).T[classes]
        found = torch.cat([best, similarities.unsqueeze(1).masked_fill(~has, -torch.inf)], dim=-1)
        at = torch.arange(start, start + has.shape[-1], device=classes.device).expand_as(has).where(has, -1)
        # What was found before comes first, so that it stays so where two are equal.
        best, order = (part[..., :count] for part in found.sort(dim=-1, descending=True, stable=True))
        positions = torch.cat([positions, at], dim=-1).gather(-1, order)
    return best, positions
