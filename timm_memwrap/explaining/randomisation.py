"""The model parameter randomisation test: whether explanations depend on what the model has learned."""

import copy
from typing import Any

import torch
from torch import nn

from timm_memwrap._utils import check_count, evaluating
from timm_memwrap.data import BATCH_SIZE, SampleImages, to_batch
from timm_memwrap.memory_checks import check_memory
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["randomisation_check"]


def randomisation_check(model: MemoryWrapModel, images: Any, memory: Any, top_k: int = 5, seed: int = 0) -> float:
    """Returns the share of an explanation's strongest samples that a randomised encoder would show as well.

    The encoder's parameters are shuffled, each tensor in itself, and the memory is encoded again. An explanation that
    depends on what the model has learned must change, so the share should be near `top_k / M` (Adebayo et al. 2018,
    https://arxiv.org/abs/1810.03292).

    Args:
        model: A model with a memory bank; it is not changed.
        images: Model inputs `[B, C, H, W]`, PIL images or paths.
        memory: The dataset that the bank was built from, or a mapping from id to image.
        top_k: How many of the strongest samples to compare.
        seed: Seed of the shuffle.

    Raises:
        ValueError: If the bank is empty, or one of its samples is not in `memory`.
    """
    check_memory(model)
    check_count("top_k", top_k)
    batch, samples = to_batch(model, images), SampleImages(model, memory)
    shuffled = copy.deepcopy(model)
    _shuffle(shuffled.backbone, seed)
    with evaluating(model), evaluating(shuffled):
        bank = shuffled.memory_bank
        assert bank.labels is not None
        ids, encodings = bank.ids, []
        for start in range(0, len(ids), BATCH_SIZE):
            part = [samples.input(sample_id) for sample_id in ids[start : start + BATCH_SIZE]]
            encodings.append(shuffled.encode(torch.stack(part)))
        bank.replace(torch.cat(encodings), bank.labels, ids)
        before, after = (_strongest(part.read(part.encode(batch)), top_k) for part in (model, shuffled))
    shares = [len(a & b) / max(1, len(a)) for a, b in zip(before, after, strict=True)]
    return sum(shares) / len(shares)


def _strongest(readout: MemoryReadout, top_k: int) -> list[set[int]]:
    pairs = zip(readout.positions[:, :top_k].tolist(), readout.weights[:, :top_k].tolist(), strict=True)
    return [{position for position, weight in zip(*pair, strict=True) if weight > 0} for pair in pairs]


def _shuffle(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
