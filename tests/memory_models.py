"""Models with a memory, and what they read by the paper's formulas, one sample at a time."""

from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from entmax import sparsemax
from scipy.optimize import nnls
from torch import Tensor

from timm_memwrap import MemoryReadout, MemoryWrapModel, build_memory_bank

CLASSES = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "linear identity l2": {"classifier": "linear", "read_head": "identity", "distance": "l2"},
    "dot": {"distance": "dot", "scale": 0.1},
    "baseline": {"prefix": "memwrap_baseline_"},
    "logits": {"prefix": "memwrap_evidence_", "read_head": "logits"},
    "pre_logits": {"prefix": "memwrap_evidence_", "read_head": "pre_logits"},
    "probabilities": {"prefix": "memwrap_evidence_", "read_head": "probabilities"},
    "joint": {"prefix": "memwrap_evidence_"},
    "joint_equal": {"prefix": "memwrap_evidence_", "read_head": "joint_equal"},
    "vote": {"prefix": "memwrap_baseline_", "classifier": "vote", "read_head": "identity", "scale": 5.0},
    "logits vote": {"prefix": "memwrap_evidence_", "classifier": "vote", "read_head": "logits"},
}
# A vote has no labels to count in training.
TRAINED = [name for name in VARIANTS if "vote" not in name]
EVIDENCE = ("logits", "pre_logits", "probabilities", "joint", "joint_equal")


def new_model(variant: str = "mlp", backbone: str = "test_resnet", num_classes: int = CLASSES) -> MemoryWrapModel:
    """Returns a model in evaluation mode, of the same weights each time."""
    torch.manual_seed(0)
    args = dict(VARIANTS[variant])
    size = {"img_size": 32} if backbone == "test_vit" else {}
    model = timm.create_model(args.pop("prefix", "memwrap_") + backbone, num_classes=num_classes, **size, **args)
    assert isinstance(model, MemoryWrapModel)
    return model.eval()


def new_images(count: int = 6, seed: int = 1) -> Tensor:
    """Returns random images."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def fill(model: MemoryWrapModel, size: int = 20, seed: int = 2) -> MemoryWrapModel:
    """Builds a bank of random images, their labels one after the other."""
    data = torch.utils.data.TensorDataset(new_images(size, seed), torch.arange(size) % model.num_classes)
    build_memory_bank(model, data, size=None, progress=False)
    return model


def fill_with_encodings(model: MemoryWrapModel, size: int) -> MemoryWrapModel:
    """Fills the bank with random encodings, without images to encode."""
    encodings = torch.randn(size, model.encoding_size, generator=torch.Generator().manual_seed(3))
    model.memory_bank.replace(encodings, torch.arange(size) % model.num_classes, range(size))
    return model


def dense(readout: MemoryReadout, size: int) -> Tensor:
    """Returns the weights of all samples `[B, M]`."""
    weights = torch.zeros(len(readout.logits), size, dtype=readout.weights.dtype)
    return weights.scatter_add(1, readout.positions, readout.weights)


def closest(query: Tensor, keys: Tensor) -> Tensor:
    """Returns the weights of the mean of keys that comes closest, by least squares with a heavy row for their sum."""
    differences = (keys - query).detach().double().numpy()
    heavy = 1e4 * max(np.linalg.norm(differences, axis=1).mean(), 1e-12)
    matrix = np.vstack([differences.T, heavy * np.ones(len(keys))])
    weights, _ = nnls(matrix, np.append(np.zeros(keys.shape[1]), heavy))
    return torch.from_numpy(weights / weights.sum()).to(keys.dtype)


def naive_logits(model: MemoryWrapModel, encoding: Tensor, memory: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns the logits of one encoding `[D]`, one memory sample after the other."""
    head, args = model.head, model.memory_args
    query, keys = head.head(encoding[None])[0], [head.head(sample[None])[0] for sample in memory]
    similarity = {
        "cosine": lambda k: (query @ k) / (query.norm() * k.norm()),
        "l2": lambda k: -(query - k).square().sum(),
        "dot": lambda k: query @ k,
    }[args["distance"]]
    if args["read"] == "reconstruction":
        weights = closest(F.normalize(query, dim=0), F.normalize(torch.stack(keys)))
    else:
        weights = sparsemax(torch.stack([args["scale"] * similarity(k) for k in keys]), dim=0)
    if args["classifier"] == "vote":
        assert labels is not None
        votes = torch.zeros(model.num_classes)
        for weight, label in zip(weights, labels, strict=True):
            votes[label] += weight
        return votes.clamp_min(1e-6).log() / model.temperature
    vector = torch.stack([weight * sample for weight, sample in zip(weights, memory, strict=True)]).sum(dim=0)
    if args["classifier"] == "own":
        return model.backbone.get_classifier()(vector[None])[0] / model.temperature
    return head.classifier((vector if model.memory_only else torch.cat([encoding, vector]))[None])[0]
