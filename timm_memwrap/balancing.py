"""Chooses samples of several classes so that each class is shown by about as many.

Shapes: N samples, C classes.
"""

import random

import torch
from torch import Tensor

__all__ = ["balance"]


def balance(labels: Tensor, size: int, rng: random.Random) -> list[int]:
    """Chooses `size` of N samples by multi-hot labels `[N, C]`, and returns their positions as they were chosen.

    One after the other, a sample is drawn of the class that the fewest chosen ones have, among classes with samples
    left; it counts for all of its classes. Samples of no class are taken for a class of their own.
    """
    known = labels.bool().cpu()
    has = torch.cat([known, ~known.any(dim=1, keepdim=True)], dim=1)
    # In an order at random the next sample of a class is one drawn at random.
    order = rng.sample(range(len(has)), len(has))
    shuffled = has[torch.tensor(order, dtype=torch.long)]
    queues = [column.nonzero().flatten().tolist()[::-1] for column in shuffled.T]
    classes_of = [row.nonzero().flatten().tolist() for row in shuffled]
    counts, chosen, taken = [0] * len(queues), list[int](), [False] * len(has)
    while len(chosen) < min(size, len(has)):
        for queue in queues:
            while queue and taken[queue[-1]]:
                queue.pop()
        label = min((i for i, queue in enumerate(queues) if queue), key=lambda i: counts[i])
        place = queues[label].pop()
        taken[place] = True
        chosen.append(order[place])
        for i in classes_of[place]:
            counts[i] += 1
    return chosen
