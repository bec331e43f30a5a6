"""What the heads share: query, key, value and the read of a memory.

Shapes: B inputs, M memory samples, D or E width of an encoding, V of a value, K samples kept per input, C outputs.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from timm_memwrap._utils import check_choice, check_count, evaluating
from timm_memwrap.attention import (
    DISTANCES,
    MASKED,
    Keys,
    content_weights,
    distances,
    float32_island,
    make_keys,
    scores,
    scores_at,
    scores_once,
    similarities,
    sum_values,
    threshold,
    trim,
    unit,
    wide,
)
from timm_memwrap.readouts import Index, PreparedMemory, Read
from timm_memwrap.reconstruction import CANDIDATES, check_read, reconstruction_weights

__all__ = ["MemoryLayer", "check_width", "is_factor", "mask_of"]

# Up to so many samples, scoring and weighing all of them is as quick as a search, and never waits for the device.
LARGE = 4096
# In a graph, a read of more samples than these is a read of all.
_MOST_READ = 256

# Keys that are made at a time of a large memory.
_ROWS = 2**11

# The scale as a parameter, and where it starts: at 1 the support grows with the memory, and explains nothing.
LEARNED = "learned"
LEARNED_START = 10.0


class MemoryLayer(nn.Module, ABC):
    """The steps that the heads share: query, key, value, read, classify.

    Not for direct use. `forward` is the published call; the steps are for callers who keep the memory between calls.
    """

    def __init__(
        self,
        encoder_output_dim: int,
        output_dim: int,
        head: nn.Module | None,
        distance: str,
        scale: float | str,
        read: str,
    ) -> None:
        super().__init__()
        check_count("encoder_output_dim", encoder_output_dim)
        check_count("output_dim", output_dim)
        check_choice("distance", distance, DISTANCES)
        learned = isinstance(scale, str) and scale == LEARNED
        if not (learned or is_factor(scale)):
            raise ValueError(
                f"scale={scale!r} is not a factor. Pass a finite number above 0, or {LEARNED!r}; 1.0 is as published."
            )
        check_read(read, distance, scale)
        self.encoder_output_dim = encoder_output_dim
        self.output_dim = output_dim
        self.distance = distance
        self.reconstructs = read == "reconstruction"
        # By its logarithm it stays above 0, whatever the step.
        self.log_scale = nn.Parameter(torch.tensor(math.log(LEARNED_START))) if learned else None
        self._scale = None if learned else float(scale)
        if head is None:
            head = nn.Linear(encoder_output_dim, encoder_output_dim)
        else:
            check_width("head", head, encoder_output_dim)
        self.head = head

    @property
    def scale(self) -> float | Tensor:
        """Factor on the similarities: a number, or the learned parameter."""
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

    def extra_repr(self) -> str:
        """Returns the arguments that `print(layer)` shows."""
        scale = LEARNED if self._scale is None else self._scale
        how = "read='reconstruction'" if self.reconstructs else f"distance={self.distance!r}, scale={scale}"
        return f"{self.encoder_output_dim}, {self.output_dim}, {how}"

    def query(self, encoding: Tensor) -> Tensor:
        """Makes queries `[B, D]` of input encodings, in float32 at least, under autocast too."""
        projected = self._project(encoding)
        with float32_island(projected):
            return unit(projected) if self.distance == "cosine" else projected

    def key(self, memory_encoding: Tensor) -> Keys:
        """Makes keys of memory encodings `[M, D]`."""
        projected = self._project(memory_encoding)
        with float32_island(projected):
            return make_keys(projected, self.distance)

    def keys_of_bank(self, memory_encoding: Tensor, dtype: torch.dtype) -> Keys:
        """Makes keys of encodings `[M, D]` of any precision, without gradient, some at a time: there may be many."""
        parts = memory_encoding.split(_ROWS)
        if len(parts) == 1 or self.distance == "l2":
            return self.key(memory_encoding.to(dtype))
        start, vectors = 0, None
        for part in parts:
            made = self.key(part.to(dtype)).vectors
            vectors = made.new_empty(len(memory_encoding), made.shape[1]) if vectors is None else vectors
            vectors[start : start + len(made)] = made
            start += len(made)
        assert vectors is not None
        return Keys(vectors)

    def value(self, memory_encoding: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns what is summed for each memory sample, `[M, V]`: its encoding, before the read head."""
        return memory_encoding

    def prepare(self, memory_encoding: Tensor, labels: Tensor | None = None) -> PreparedMemory:
        """Makes memory encodings `[M, D]` ready to be read; only `LabelVote` needs their labels `[M]`."""
        return PreparedMemory(self.key(memory_encoding), self.value(memory_encoding, labels))

    def read(self, query: Tensor, memory: PreparedMemory, hidden: Tensor | None = None, ranked: bool = True) -> Read:
        """Reads a memory: the weighted sum of its values, and which samples it is made of.

        Gradients reach the query, and the memory unless it has an index.

        Args:
            query: Queries `[B, D]` of `query`.
            memory: What is read.
            hidden: Samples that a row must not see: positions `[B, H]`, or a mask `[B, M]`.
            ranked: Whether the samples are wanted, and not the vector alone: `False` leaves the rest empty, which
                spares their order and waiting for the device.

        Raises:
            ValueError: If `hidden` does not fit.
        """
        if hidden is not None:
            _check_hidden(hidden, query.shape[0], memory.keys.vectors.shape[0])
        with float32_island(query):
            masks = hidden is not None and hidden.dtype == torch.bool
            if torch.compiler.is_compiling():
                large = not self.training and len(memory.keys.vectors) > LARGE
                return (self._read_top if large else self._read_all)(query, memory, hidden, ranked)
            if memory.key_index is None or masks:
                return self._read_all(query, memory, hidden, ranked)
            return self._search(query, memory, memory.key_index, hidden)

    @abstractmethod
    def classify(self, input_encoding: Tensor, memory_vector: Tensor) -> Tensor:
        """Computes outputs `[B, C]` from input encodings `[B, D]` and memory vectors `[B, V]`."""

    def forward(
        self,
        input_encoding: Tensor,
        memory_encoding: Tensor,
        return_weights: bool = False,
        labels: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classifies inputs with the help of a memory set, as `memorywrap`'s layers do.

        Args:
            input_encoding: Encodings of the inputs, `[B, D]`.
            memory_encoding: Encodings of the memory set, `[M, D]`. An empty one reads as the zero vector.
            return_weights: Whether to return the content weights too.
            labels: Labels `[M]` of the memory set; only `LabelVote` needs them.
            hidden: As in `read`.

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
        query, values = self.query(input_encoding), self.value(memory_encoding, labels)
        projected = self._project(memory_encoding)
        if hidden is not None:
            _check_hidden(hidden, len(input_encoding), len(memory_encoding))
        with float32_island(query):
            # A reconstruction takes the keys themselves.
            keys = make_keys(projected, self.distance) if self.reconstructs else None
            found = scores_once(query, projected, self.distance) if keys is None else scores(query, keys)
            weights = self._weigh(found, query, keys, hidden)
            vector = self._sum_weighed(weights, values)
        output = self.classify(input_encoding, vector)
        return (output, weights) if return_weights else output

    def _project(self, encoding: Tensor) -> Tensor:
        """Applies the read head to encodings `[N, D]`."""
        parameter = next(self.head.parameters(), None)
        with float32_island(encoding):
            return wide(self.head(wide(encoding) if parameter is None else encoding.to(parameter.dtype)))

    def _weigh(self, found: Tensor, query: Tensor, keys: Keys | None, hidden: Tensor | None) -> Tensor:
        """Returns the weights `[B, M]` of all samples for their scores before the scale; to reconstruct takes keys."""
        if self.reconstructs:
            assert keys is not None
            seen = found if hidden is None else found.masked_fill(mask_of(hidden, found), MASKED)
            nearest, positions = seen.detach().topk(min(CANDIDATES, seen.shape[1]), dim=-1)
            weights = _reconstruct(query, keys, nearest, positions)
            return torch.zeros_like(found).scatter(1, positions, weights)
        scaled = self._scaled(found)
        if hidden is None:
            return content_weights(scaled)
        hidden = mask_of(hidden, scaled)
        # Where all is hidden all scores are alike, and yet nothing must be read.
        return content_weights(scaled.masked_fill(hidden, MASKED)).masked_fill(hidden, 0.0)

    def _read_all(self, query: Tensor, memory: PreparedMemory, hidden: Tensor | None, ranked: bool) -> Read:
        found = scores(query, memory.keys)
        weights = self._weigh(found, query, memory.keys, hidden)
        # With nothing to read this is zero, and still has a gradient: the last batch of an epoch may be of one.
        vector = self._sum_all(weights, memory.values)
        if not ranked:
            nothing = weights[:, :0]
            return Read(vector, nothing, nothing.long(), nothing, nothing)
        remainder = distances(query.detach(), memory.keys, weights.detach() @ memory.keys.vectors.detach())
        weights, positions = weights.sort(dim=-1, descending=True, stable=True)
        found = found.gather(1, positions)
        if not (self.training or torch.compiler.is_compiling()):
            weights, positions, found = trim(weights, positions, found)
        return Read(vector, weights, positions, similarities(found, query, memory.keys), remainder)

    def _read_top(self, query: Tensor, memory: PreparedMemory, hidden: Tensor | None, ranked: bool) -> Read:
        """Reads a large memory in a graph, where what is searched for cannot depend on what is found."""
        found = scores(query, memory.keys)
        if hidden is not None:
            found = found.masked_fill(mask_of(hidden, found), MASKED)
        if self.reconstructs:
            best, positions = found.topk(CANDIDATES, dim=-1)
            weights, order = _reconstruct(query, memory.keys, best, positions).sort(dim=-1, descending=True)
            return self._read_few(query, memory, weights, positions.gather(1, order), best.gather(1, order))
        if torch.is_grad_enabled() and query.requires_grad:
            return self._read_all(query, memory, hidden, ranked)
        scaled = self._scaled(found)
        best, positions = scaled.topk(_MOST_READ, dim=-1)
        # The threshold of some scores is a lower bound of that of all.
        enough = (threshold(best) >= best[:, -1:]).all()
        of_all = (scaled, memory.values, memory.keys.vectors)
        vector, mean, weights, positions = torch.cond(
            enough, self._weigh_top, self._weigh_whole, (best, positions, *of_all)
        )
        found = similarities(found.gather(1, positions), query, memory.keys)
        return Read(vector, weights, positions, found, distances(query, memory.keys, mean))

    def _weigh_top(
        self, best: Tensor, positions: Tensor, scaled: Tensor, values: Tensor, vectors: Tensor
    ) -> tuple[Tensor, ...]:
        weights = content_weights(best)
        sums = (self._sum_few(weights, positions, values), sum_values(weights, positions, vectors))
        return *sums, weights, positions.clone()

    def _weigh_whole(
        self, best: Tensor, positions: Tensor, scaled: Tensor, values: Tensor, vectors: Tensor
    ) -> tuple[Tensor, ...]:
        weights = content_weights(scaled)
        return self._sum_all(weights, values), weights @ vectors, *weights.topk(best.shape[1], dim=-1)

    def _search(self, query: Tensor, memory: PreparedMemory, index: Index, hidden: Tensor | None) -> Read:
        if self.reconstructs:
            found, positions = index.nearest(query.detach(), CANDIDATES, hidden)
            weights, order = _reconstruct(query, memory.keys, found, positions).sort(
                dim=-1, descending=True, stable=True
            )
            weights, positions, found = trim(weights, positions.gather(1, order), found.gather(1, order))
            return self._read_few(query, memory, weights, positions, found)
        scale = self.scale
        factor = scale.detach() if isinstance(scale, Tensor) else scale
        weights, positions, scaled = index.search(query.detach(), factor, hidden)
        if hidden is not None:
            weights = weights.masked_fill(scaled <= MASKED / 2, 0.0)
        found = scaled if isinstance(factor, float) and factor == 1.0 else scaled / factor
        if torch.is_grad_enabled() and (query.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad)):
            # A sample without weight has no gradient either, so those with weight are all that it takes.
            unread = weights == 0
            found = scores_at(query, memory.keys, positions)
            weights = content_weights(self._scaled(found).masked_fill(unread, MASKED)).masked_fill(unread, 0.0)
        return self._read_few(query, memory, weights, positions, similarities(found, query, memory.keys))

    def _read_few(
        self, query: Tensor, memory: PreparedMemory, weights: Tensor, positions: Tensor, found: Tensor
    ) -> Read:
        vector = self._sum_few(weights, positions, memory.values)
        mean = sum_values(weights.detach(), positions, memory.keys.vectors.detach())
        return Read(vector, weights, positions, found, distances(query.detach(), memory.keys, mean))

    def _scaled(self, found: Tensor) -> Tensor:
        return found if self._scale == 1.0 else found * self.scale

    def _sum_weighed(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sums the values of the samples with weight, which are few, where that can be known without waiting."""
        few = weights.device.type == "cpu" and weights.shape[1] > _MOST_READ and not torch.compiler.is_compiling()
        if not few or weights.requires_grad or values.requires_grad:
            return self._sum_all(weights, values)
        most = int((weights != 0).sum(dim=1).amax()) if len(weights) else 0
        return (
            self._sum_few(*weights.topk(most, dim=1), values) if most <= _MOST_READ else self._sum_all(weights, values)
        )

    def _sum_all(self, weights: Tensor, values: Tensor) -> Tensor:
        return weights @ values.to(weights.dtype)

    def _sum_few(self, weights: Tensor, positions: Tensor, values: Tensor) -> Tensor:
        return sum_values(weights, positions, values)


def _reconstruct(query: Tensor, keys: Keys, nearest: Tensor, positions: Tensor) -> Tensor:
    """Returns the weights `[B, K]` of the nearest samples, of which those with a masked score are not to be seen."""
    return reconstruction_weights(query, keys.vectors[positions], nearest <= MASKED / 2)


def is_factor(value: object) -> bool:
    """Returns whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def check_width(name: str, module: nn.Module, in_features: int, out_features: int | None = None) -> None:
    """Raises a `ValueError` if a module does not map `[B, in_features]` to `[B, out_features]`."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name}={module!r} is not a module. Pass a torch.nn.Module, or None for the default.")
    parameter = next(module.parameters(), torch.empty(0))
    rows = torch.zeros(2, in_features, dtype=parameter.dtype, device=parameter.device)
    # Nothing can be computed with weights that are yet to come, the module's own or a classifier's that it looks up.
    if rows.is_meta or any(getattr(part, "is_meta", False) for part in module.modules()):
        return
    try:
        with evaluating(module):
            output = module(rows)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}={module!r} cannot take encodings of shape [B, {in_features}]: {error}") from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        raise ValueError(
            f"{name}={module!r} must map [B, {in_features}] to one tensor [B, width]; it returned "
            f"{list(output.shape) if isinstance(output, Tensor) else type(output).__name__}."
        )
    width = output.shape[1]
    if width != (out_features or width):
        raise ValueError(
            f"{name}={module!r} has {width} outputs, but output_dim={out_features}. Pass one that maps "
            f"[B, {in_features}] to [B, {out_features}], or output_dim={width}."
        )


def _check_hidden(hidden: Tensor, rows: int, size: int) -> None:
    mask = hidden.dtype == torch.bool
    fits = hidden.ndim == 2 and hidden.shape[0] == rows and (hidden.shape[1] == size or not mask)
    if not fits or not (mask or hidden.dtype == torch.long):
        raise ValueError(
            f"hidden is {hidden.dtype} of shape {list(hidden.shape)}; expected positions, torch.long of shape "
            f"[{rows}, H], or a mask of the memory set, torch.bool of shape [{rows}, {size}]."
        )


def mask_of(hidden: Tensor, like: Tensor) -> Tensor:
    """Returns which of the scores `like` `[B, M]` are hidden, for such a mask or for positions `[B, H]`."""
    if hidden.dtype == torch.bool:
        return hidden
    return torch.zeros_like(like, dtype=torch.bool).scatter(1, hidden.to(like.device), True)
