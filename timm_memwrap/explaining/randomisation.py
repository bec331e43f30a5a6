"""The model parameter randomisation test: whether explanations depend on what the model has learned."""

import copy
from typing import Any

import torch

from timm_memwrap._utils import evaluating
from timm_memwrap.data import BATCH_SIZE, SampleImages
from timm_memwrap.explaining.explanation import explain
from timm_memwrap.model import MemoryWrapModel

__all__ = ["randomisation_check"]


def randomisation_check(model: MemoryWrapModel, images: Any, memory: Any, top_k: int = 5, seed: int = 0) -> float:
    """Returns the share of an explanation's strongest samples that a randomised encoder would show as well.

    The encoder's parameters are shuffled, each tensor in itself, and the memory is encoded again. An explanation that
    depends on what the model has learned must change, so the share should be near `top_k / M` (Adebayo et al. 2018,
    https://arxiv.org/abs/1810.03292).

    Args:
        model: A model with a memory bank; it is not changed.
        images: As in `explain`.
        memory: As in `attribute`.
        top_k: How many of the strongest samples to compare.
        seed: Seed of the shuffle.

    Raises:
        ValueError: If the bank is empty, or one of its samples is not in `memory`.
    """
    before, samples = explain(model, images, top_k), SampleImages(model, memory)
    shuffled, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with evaluating(shuffled):
        for parameter in shuffled.backbone.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
        bank = shuffled.memory_bank
        ids, (_, labels) = bank.ids, bank.filled()
        inputs = ([samples.input(i) for i in ids[at : at + BATCH_SIZE]] for at in range(0, len(ids), BATCH_SIZE))
        bank.replace(torch.cat([shuffled.encode(torch.stack(part)) for part in inputs]), labels, ids)
    after = explain(shuffled, images, top_k)
    shown = [[{sample.position for sample in one.samples} for one in explanations] for explanations in (before, after)]
    shares = [len(a & b) / len(a) for a, b in zip(*shown, strict=True)]
    return sum(shares) / len(shares)
