"""The paper's two heads, and a vote over the memory's labels. They know no timm and no bank.

Shapes: B inputs, M memory samples, D width of an encoding, C outputs.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from timm_memwrap.attention import DISTANCES, Keys, content_weights, float32_island, prepare_keys, scores, search, unit
from timm_memwrap.memory_index import MemoryIndex

__all__ = [
    "MLP",
    "BaselineMemory",
    "CentreClasses",
    "Columns",
    "LabelVote",
    "MeanOfHalves",
    "MemoryLayer",
    "MemoryWrapLayer",
]

# The scale as a parameter, and where it starts: at 1 the support grows with the memory, and explains nothing.
LEARNED = "learned"
LEARNED_START = 10.0


class MLP(nn.Sequential):
    """The paper's classifier: two linear layers with a ReLU between, its parts named as in `memorywrap`."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden_features, out_features)


class CentreClasses(nn.Module):
    """Subtracts from each row of logits its mean: softmax cannot see it, a similarity can."""

    def forward(self, logits: Tensor) -> Tensor:
        """Centres logits `[N, C]`."""
        return logits - logits.mean(dim=-1, keepdim=True)


class Columns(nn.Module):
    """Takes columns `start` to `stop` of its input."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def extra_repr(self) -> str:
        """Returns what `print(module)` shows of it."""
        return f"{self.start}, {self.stop}"

    def forward(self, encoding: Tensor) -> Tensor:
        """Takes of encodings `[N, W]` a part `[N, stop - start]`."""
        # As a part of the wider tensor, logits would keep that alive, and safetensors refuses to write them.
        return encoding[..., self.start : self.stop].contiguous()


class Probabilities(nn.Module):
    """Makes of pre-logits and logits, side by side, a key for comparing what is seen and what is predicted.

    The cosine similarity of two keys is, to four fifths, that of the pre-logits, and to one fifth that of the predicted
    probabilities. Pre-logits tell samples of a class apart, which keeps the support small; probabilities tell classes
    apart, where a backbone that was not fine-tuned to them does not.

    Args:
        features: Width D of the pre-logits.
    """

    # Weight of the pre-logits beside the 1 of the probabilities. Chosen on held-out training images, as is the default
    # scale; from 3 to 5 and from 15 to 30 nothing changes that seeds do not change too.
    FEATURE_WEIGHT = 4.0

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, encoding: Tensor) -> Tensor:
        """Projects encodings `[N, D + C]` to keys `[N, D + C]`."""
        pre_logits, logits = encoding[..., : self.features], encoding[..., self.features :]
        return torch.cat([math.sqrt(self.FEATURE_WEIGHT) * unit(pre_logits), unit(logits.softmax(dim=-1))], dim=-1)


class MeanOfHalves(nn.Module):
    """Averages the two halves of its input: a classifier for input and memory that both are logits already."""

    def forward(self, pair: Tensor) -> Tensor:
        """Averages `[N, 2 * C]` to `[N, C]`."""
        first, second = pair.chunk(2, dim=-1)
        return (first + second) / 2


class MemoryLayer(nn.Module, ABC):
    """What the heads share: a read head that projects query and keys, similarities, and sparse weights.

    Not for direct use. `forward` is the published call; `keys`, `values`, `similarity` and `classify` are its steps,
    for callers who keep the memory between calls.
    """

    def __init__(
        self,
        encoder_output_dim: int,
        output_dim: int,
        head: nn.Module | None,
        distance: str,
        scale: float | str,
        temperature: float,
    ) -> None:
        super().__init__()
        for name, value in (("encoder_output_dim", encoder_output_dim), ("output_dim", output_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a width. Pass an integer of at least 1.")
        if distance not in DISTANCES:
            raise ValueError(f"Unknown distance={distance!r}. Pass one of {', '.join(map(repr, DISTANCES))}.")
        learned = isinstance(scale, str) and scale == LEARNED
        if not (learned or _is_factor(scale)):
            raise ValueError(
                f"scale={scale!r} is not a factor. Pass a finite number above 0, or {LEARNED!r}; 1.0 is as published."
            )
        self.encoder_output_dim = encoder_output_dim
        self.output_dim = output_dim
        self.distance = distance
        self.temperature = temperature
        # By its logarithm it stays above 0, whatever the step.
        self.log_scale = nn.Parameter(torch.tensor(math.log(LEARNED_START))) if learned else None
        self._scale = None if learned else float(scale)
        if head is None:
            head = nn.Linear(encoder_output_dim, encoder_output_dim)
        else:
            _output_width("head", head, encoder_output_dim)
        self.head = head

    @property
    def scale(self) -> float | Tensor:
        """Factor on the similarities: a number, or what has been learned."""
        if self._scale is not None:
            return self._scale
        assert self.log_scale is not None
        return self.log_scale.exp()

    @scale.setter
    def scale(self, scale: float) -> None:
        if self.log_scale is None:
            self._scale = float(scale)
        else:
            self.log_scale.data.fill_(math.log(scale))

    @property
    def temperature(self) -> float:
        """What outputs are divided by: above 1 predictions are less sure, and the same classes win."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if not _is_factor(temperature):
            raise ValueError(
                f"temperature={temperature!r} is not a divisor. Pass a finite number above 0; 1.0 leaves outputs as "
                f"they are."
            )
        self._temperature = float(temperature)

    def extra_repr(self) -> str:
        """Returns what `print(layer)` shows of it."""
        scale = LEARNED if self._scale is None else self._scale
        sizes = f"{self.encoder_output_dim}, {self.output_dim}"
        return f"{sizes}, distance={self.distance!r}, scale={scale}, temperature={self.temperature}"

    def project(self, encoding: Tensor) -> Tensor:
        """Applies the read head to encodings `[N, D]`, in float32 at least."""
        parameter = next(self.head.parameters(), None)
        with float32_island(encoding):
            if parameter is not None:
                encoding = encoding.to(parameter.dtype)
            return _at_least_float32(self.head(encoding))

    def keys(self, memory_encoding: Tensor) -> Keys:
        """Makes memory encodings `[M, D]` ready for scoring."""
        projected = self.project(memory_encoding)
        with float32_island(projected):
            return prepare_keys(projected, self.distance)

    def similarity(self, input_encoding: Tensor, keys: Keys) -> Tensor:
        """Scores inputs `[B, D]` against `keys`: `[B, M]`, in float32 at least, under autocast too."""
        queries = self.project(input_encoding)
        with float32_island(queries):
            return scores(queries, keys, self.distance, self.scale)

    def search(
        self, input_encoding: Tensor, keys: Keys, hidden: Tensor | None = None, index: MemoryIndex | None = None
    ) -> tuple[Tensor, Tensor]:
        """Finds the weights `[B, K]` and positions `[B, K]` of the samples that inputs `[B, D]` read, without gradient.

        Args:
            input_encoding: Encodings of the inputs.
            keys: What `keys` made of the memory encodings.
            hidden: Samples that a row must not see: a mask `[B, M]`, or positions `[B, H]`.
            index: An index of the keys to search with; positions only may then be hidden.
        """
        queries = self.project(input_encoding)
        with float32_island(queries):
            if index is not None:
                return index.search(queries.detach(), self.scale, hidden)
            return search(queries, keys, self.distance, self.scale, hidden)

    def values(self, memory_encoding: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns what is summed for each memory sample, `[M, V]`: its encoding, before the read head.

        Args:
            memory_encoding: Memory encodings `[M, D]`.
            labels: Labels of the memory samples `[M]`. Only `LabelVote` reads them.
        """
        return _at_least_float32(memory_encoding)

    def classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
        """Computes outputs `[B, C]` from input encodings `[B, D]` and memory vectors `[B, V]`."""
        output = self._classify(input_encoding, memory_vector)
        return output if self.temperature == 1.0 else output / self.temperature

    @abstractmethod
    def _classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
        """Computes outputs at temperature 1."""

    def forward(
        self, input_encoding: Tensor, memory_encoding: Tensor, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classifies inputs with the help of a memory set, as `memorywrap`'s layers do.

        Args:
            input_encoding: Encodings of the inputs, `[B, D]`.
            memory_encoding: Encodings of the memory set, `[M, D]`. An empty one reads as the zero vector.
            return_weights: Whether to return the content weights too.

        Returns:
            Outputs `[B, C]`; with `return_weights`, outputs and content weights `[B, M]`.

        Raises:
            ValueError: If a rank or a width does not fit.
        """
        for name, encoding in (("input_encoding", input_encoding), ("memory_encoding", memory_encoding)):
            if encoding.ndim != 2 or encoding.shape[-1] != self.encoder_output_dim:
                raise ValueError(
                    f"{name} has shape {list(encoding.shape)}; expected [N, {self.encoder_output_dim}]. Encode the "
                    f"images first, and construct the layer with encoder_output_dim=<width of an encoding>."
                )
        weights = content_weights(self.similarity(input_encoding, self.keys(memory_encoding)))
        with float32_island(weights):
            memory_vector = weights @ self.values(memory_encoding)
        output = self.classify(input_encoding, memory_vector)
        return (output, weights) if return_weights else output


class MemoryWrapLayer(MemoryLayer):
    """Memory Wrap: classifies from the input encoding joined with what it reads from the memory (paper, Section 3).

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
        temperature: What the outputs are divided by (Guo et al. 2017, https://arxiv.org/abs/1706.04599). 1.0 is as
            published.

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
        temperature: float = 1.0,
    ) -> None:
        super().__init__(encoder_output_dim, output_dim, head, distance, scale, temperature)
        self.classifier = _classifier(classifier, 2 * encoder_output_dim, output_dim)

    def _classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
        """Classifies input encoding and memory vector, joined in this order."""
        dtype = _parameter_dtype(self.classifier, memory_vector)
        return self.classifier(torch.cat([input_encoding.to(dtype), memory_vector.to(dtype)], dim=-1))


class BaselineMemory(MemoryLayer):
    """The paper's memory-only baseline: classifies from what it reads from the memory alone.

    Args:
        encoder_output_dim: Width D of an encoding.
        output_dim: Number of outputs C.
        head: As in `MemoryWrapLayer`.
        classifier: Maps `[B, D]` to `[B, C]`. `None` is the paper's MLP, `D -> 2D -> C`.
        distance: As in `MemoryWrapLayer`.
        scale: As in `MemoryWrapLayer`.
        temperature: As in `MemoryWrapLayer`.

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
        temperature: float = 1.0,
    ) -> None:
        super().__init__(encoder_output_dim, output_dim, head, distance, scale, temperature)
        self.classifier = _classifier(classifier, encoder_output_dim, output_dim)

    def _classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
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
        temperature: As in `MemoryWrapLayer`.

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
        temperature: float = 1.0,
    ) -> None:
        super().__init__(encoder_output_dim, output_dim, head, distance, scale, temperature)

    def values(self, memory_encoding: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns one-hot labels `[M, C]`."""
        if labels is None:
            raise ValueError(
                "labels=None, but a vote is over the labels of the memory set. In training it has none: train with "
                "classifier='linear' or 'mlp', then build the memory bank with build_memory_bank."
            )
        one_hot = _at_least_float32(memory_encoding).new_zeros(len(labels), self.output_dim)
        return one_hot.scatter_(1, labels.unsqueeze(1), 1.0)

    def _classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
        """Returns the log-probability of each class."""
        return memory_vector.clamp_min(self.LEAST_PROBABILITY).log().to(input_encoding.dtype)


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _parameter_dtype(module: nn.Module, default: Tensor) -> torch.dtype:
    parameter = next(module.parameters(), default)
    return parameter.dtype


def _classifier(classifier: nn.Module | None, in_features: int, out_features: int) -> nn.Module:
    if classifier is None:
        return MLP(in_features, 2 * in_features, out_features)
    width = _output_width("classifier", classifier, in_features)
    if width != out_features:
        raise ValueError(
            f"classifier={classifier!r} has {width} outputs, but output_dim={out_features}. Pass a classifier that "
            f"maps [B, {in_features}] to [B, {out_features}], or output_dim={width}."
        )
    return classifier


def _output_width(name: str, module: nn.Module, in_features: int) -> int:
    """Runs `module` on two rows of `in_features` zeros, and returns the width of what comes out."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name}={module!r} is not a module. Pass a torch.nn.Module, or None for the default.")
    parameter = next(module.parameters(), torch.empty(0))
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            output = module(torch.zeros(2, in_features, dtype=parameter.dtype, device=parameter.device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}={module!r} cannot take encodings of shape [B, {in_features}]: {error}") from error
    finally:
        for part, was_training in training.items():
            part.training = was_training
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        raise ValueError(
            f"{name}={module!r} must map [B, {in_features}] to one tensor [B, width]; it returned "
            f"{list(output.shape) if isinstance(output, Tensor) else type(output).__name__}."
        )
    return output.shape[-1]
