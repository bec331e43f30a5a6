"""The paper's two heads, and a vote over the memory's labels.

Shapes: B inputs, M memory samples, D width of an encoding, C outputs, K samples kept per input.
"""

import torch
from torch import Tensor, nn

from timm_memwrap.memory_layer import MemoryLayer, check_width

__all__ = ["MLP", "BaselineMemory", "LabelVote", "MemoryWrapLayer"]


class MLP(nn.Sequential):
    """The paper's classifier: two linear layers with a ReLU between, its parts named as in `memorywrap`."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden_features, out_features)


class MemoryWrapLayer(MemoryLayer):
    """Memory Wrap: classifies from the input encoding joined with the memory vector (paper, Section 3).

    The call is that of `memorywrap.MemoryWrapLayer`, and with `head=nn.Identity()` so are the results and the state
    dict. Its documentation promises a read head that its code does not have; here it is there by default.

    Args:
        encoder_output_dim: Width D of an encoding.
        output_dim: Number of outputs C.
        head: Read head, which projects query and keys alike. `None` is a `Linear(D, D)`, `nn.Identity()` the published
            behaviour.
        classifier: Maps `[B, 2 * D]`, input encoding first, to `[B, C]`. `None` is the paper's MLP, `2D -> 4D -> C`.
        distance: `"cosine"`, `"l2"` (squared, as published) or `"dot"`.
        scale: Factor on the similarities: larger reads fewer samples. 1.0 is as published; `"learned"` makes it a
            parameter, from 10.0.
        read: `"sparsemax"`, as published: the weights are the sparsemax of the similarities. `"reconstruction"`: those
            of the sparse mean of the samples that comes closest to the input, with keys of length 1 and no scale.

    Raises:
        ValueError: If an argument does not fit.

    Example:
        ```python
        >>> layer = MemoryWrapLayer(512, 10)
        >>> logits, weights = layer(torch.randn(4, 512), torch.randn(100, 512), return_weights=True)
        >>> logits.shape, weights.shape
        (torch.Size([4, 10]), torch.Size([4, 100]))

        ```
    """

    def __init__(
        self,
        encoder_output_dim: int,
        output_dim: int,
        head: nn.Module | None = None,
        classifier: nn.Module | None = None,
        distance: str = "cosine",
        scale: float | str = 1.0,
        read: str = "sparsemax",
    ) -> None:
        super().__init__(encoder_output_dim, output_dim, head, distance, scale, read)
        self.classifier = _checked_classifier(classifier, 2 * encoder_output_dim, output_dim)

    def classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
        """Classifies input encoding and memory vector, joined in this order."""
        dtype = _parameter_dtype(self.classifier, memory_vector)
        return self.classifier(torch.cat([input_encoding.to(dtype), memory_vector.to(dtype)], dim=-1))


class BaselineMemory(MemoryLayer):
    """The paper's memory-only baseline: classifies from the memory vector alone.

    Args:
        encoder_output_dim: Width D of an encoding.
        output_dim: Number of outputs C.
        head: As in `MemoryWrapLayer`.
        classifier: Maps `[B, D]` to `[B, C]`. `None` is the paper's MLP, `D -> 2D -> C`. An affine one C makes
            predictions that are shares of its own for the samples: `C(sum w_i m_i) = sum w_i C(m_i)`.
        distance: As in `MemoryWrapLayer`.
        scale: As in `MemoryWrapLayer`.
        read: As in `MemoryWrapLayer`.

    Raises:
        ValueError: If an argument does not fit.
    """

    def __init__(
        self,
        encoder_output_dim: int,
        output_dim: int,
        head: nn.Module | None = None,
        classifier: nn.Module | None = None,
        distance: str = "cosine",
        scale: float | str = 1.0,
        read: str = "sparsemax",
    ) -> None:
        super().__init__(encoder_output_dim, output_dim, head, distance, scale, read)
        self.classifier = _checked_classifier(classifier, encoder_output_dim, output_dim)

    def classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
        """Classifies the memory vector; the input encoding has chosen it and plays no other part."""
        return self.classifier(memory_vector.to(_parameter_dtype(self.classifier, memory_vector)))


class LabelVote(MemoryLayer):
    """Classifies by the memory's labels: the probability of a class is the weight of the samples that bear it.

    It has no classifier to train. Not in the paper.

    Args:
        encoder_output_dim: Width D of an encoding.
        output_dim: Number of classes C.
        head: As in `MemoryWrapLayer`.
        distance: As in `MemoryWrapLayer`.
        scale: As in `MemoryWrapLayer`.
        read: As in `MemoryWrapLayer`.

    Raises:
        ValueError: If an argument does not fit.
    """

    # Log-probability of a class without a vote: low, and finite, so that a loss on it is.
    LEAST_PROBABILITY = 1e-6

    def __init__(
        self,
        encoder_output_dim: int,
        output_dim: int,
        head: nn.Module | None = None,
        distance: str = "cosine",
        scale: float | str = 1.0,
        read: str = "sparsemax",
    ) -> None:
        super().__init__(encoder_output_dim, output_dim, head, distance, scale, read)

    def value(self, memory_encoding: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns the labels `[M]`.

        Raises:
            ValueError: If there are none.
        """
        if labels is None:
            raise ValueError(
                "labels=None, but a vote is over the labels of the memory set. In training it has none: train with "
                "classifier='linear' or 'mlp', then build the memory bank with build_memory_bank."
            )
        if labels.ndim != 1:
            raise ValueError(
                f"labels have shape {list(labels.shape)}, but a vote counts one label [M] for each sample. Pass "
                f"classifier='own' or 'linear' for samples of several classes."
            )
        return labels

    def _sum_all(self, weights: Tensor, values: Tensor) -> Tensor:
        return self._sum_by_label(weights, values.expand(weights.shape))

    def _sum_few(self, weights: Tensor, positions: Tensor, values: Tensor) -> Tensor:
        return self._sum_by_label(weights, values[positions])

    def _sum_by_label(self, weights: Tensor, labels: Tensor) -> Tensor:
        """Sums weights `[B, K]` by the labels `[B, K]` of their samples, `[B, C]`."""
        return weights.new_zeros(weights.shape[0], self.output_dim).scatter_add(1, labels, weights)

    def classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
        """Returns the log-probability of each class."""
        return memory_vector.clamp_min(self.LEAST_PROBABILITY).log().to(input_encoding.dtype)


def _parameter_dtype(module: nn.Module, default: Tensor) -> torch.dtype:
    parameter = next(module.parameters(), default)
    return parameter.dtype


def _checked_classifier(classifier: nn.Module | None, in_features: int, out_features: int) -> nn.Module:
    if classifier is None:
        return MLP(in_features, 2 * in_features, out_features)
    check_width("classifier", classifier, in_features, out_features)
    return classifier
