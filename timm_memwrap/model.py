"""The model: a timm backbone, a Memory Wrap head and a memory bank behind timm's model interface.

Shapes: B inputs, M memory samples, D width of an encoding, C classes, K samples kept per input.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_memwrap import constants
from timm_memwrap.attention import DISTANCES, MASKED, Keys, content_weights, float32_island, read, top_weights
from timm_memwrap.fingerprint import Watch, fingerprint
from timm_memwrap.layers import (
    BaselineMemory,
    CentreClasses,
    Columns,
    LabelVote,
    MeanOfHalves,
    MemoryLayer,
    MemoryWrapLayer,
    Probabilities,
)
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.memory_index import MemoryIndex, check_index
from timm_memwrap.timm_interface import TimmInterface, add_prefix

__all__ = ["CLASSIFIERS", "READ_HEADS", "MemoryReadout", "MemoryWrapModel"]

_logger = logging.getLogger(__name__)

READ_HEADS = ("linear", "identity", "classifier", "pre_logits", "probabilities")
# Those that read with the backbone's own classifier, and of these, those that compare what goes into it too.
KEPT_CLASSIFIER = ("classifier", "pre_logits", "probabilities")
WITH_PRE_LOGITS = ("pre_logits", "probabilities")
# The read head for a classifier that is trained already.
DEFAULT_KEPT = "probabilities"

# By read head, chosen on held-out training images (README, "Evidence, measured").
_SCALES = {"classifier": 10.0, "pre_logits": 10.0, "probabilities": 20.0}
CLASSIFIERS = ("mlp", "linear", "vote")

QUEUE_SIZE = 1024


class MemoryReadout(NamedTuple):
    """What a forward read from the memory.

    Attributes:
        logits: Logits `[B, C]`.
        weights: Content weights `[B, K]`, strongest first; rows with less support end in zeros.
        indices: Positions `[B, K]` of those samples in the memory set; they mean nothing where the weight is zero.
        encoding: Encodings of the inputs `[B, D]`.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor
    encoding: Tensor


class _Prepared(NamedTuple):
    keys: Keys
    values: Tensor
    key_index: MemoryIndex | None = None


class MemoryWrapModel(TimmInterface):
    """A timm backbone whose predictions read a memory of training samples.

    Where the memory set comes from:
    - `model(x, memory=images)`: these images, encoded with gradient, in training and evaluation (the paper's protocol).
    - Training: for each sample the rest of its batch, with gradient. Costs no second encoder pass.
    - Evaluation: the memory bank (`build_memory_bank`). While it is empty, the last encodings seen in training.

    Made by `timm.create_model("memwrap_<name>")` or `wrap`; seldom by hand.

    Args:
        backbone: A timm model. Its own classifier must be gone (`num_classes=0`), except with the read heads that
            keep it.
        num_classes: Number of classes C; 0 for none, as in timm: the model then returns the backbone's features.
        memory_only: Whether the prediction is made from the memory alone (`BaselineMemory`) or from the input and the
            memory (`MemoryWrapLayer`).
        distance: `"cosine"`, `"l2"` or `"dot"`.
        scale: Factor on the similarities; `"learned"` makes it a parameter. `None` is 20.0 with
            `read_head="probabilities"`, 10.0 with the others that keep the classifier, else 1.0 as published.
        read_head: What projects query and key: `"linear"`, a layer of its own; `"identity"`, nothing, as in the
            published code. Three keep the backbone's classifier: `"pre_logits"` compares what goes into it, which
            suits a backbone that was trained for these classes; `"probabilities"` the pre-logits and, to a fifth, the
            probabilities that it predicts; `"classifier"` its centred logits.
        classifier: What makes logits of what was read: `"mlp"`, as published; `"linear"`, one layer, which is the
            backbone's own where it keeps its classifier; `"vote"`, the weights summed over the samples' labels, with
            `memory_only`. `None` is `"linear"` where the backbone keeps its classifier, else `"mlp"`.
        temperature: What the logits are divided by; `calibrate` finds the one that fits. 1.0 is as published.

    Raises:
        ValueError: If an argument is unknown, or two do not fit each other.
    """

    queue: Tensor | None
    queue_position: Tensor
    head: Any
    memory_bank: MemoryBank

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        memory_only: bool = False,
        distance: str = "cosine",
        scale: float | str | None = None,
        read_head: str = "linear",
        classifier: str | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        memory_args = resolve_memory_args(memory_only, distance, scale, read_head, classifier, temperature)
        # Order is format: the bank comes last, so that two state dicts of which one has no bank agree up to there.
        self.backbone = backbone
        self.num_classes = num_classes
        self.memory_only = memory_only
        self.memory_args = memory_args
        self.head = self._new_head()
        self.memory_bank = MemoryBank()
        # No buffers: an EMA pairs those of two models in order, of which one may not have trained yet.
        self.queue = None
        self.queue_position = torch.zeros((), dtype=torch.long)
        self._queue_used = False
        self._warned = False
        self._prepared: tuple[Watch, _Prepared] | None = None
        self._index_args: dict[str, Any] | None = None
        self._fingerprint: tuple[Watch, str] | None = None

        traits = dict(getattr(backbone, "_traits", {}))
        self._traits = {**traits, "first_conv": add_prefix(traits.get("first_conv"))}
        self._model_args: dict[str, Any] = dict(memory_args)
        # Each rank keeps its own memory: broadcasting it at every forward would cost more than the forward.
        self._ddp_params_and_buffers_to_ignore = [
            f"{constants.MEMORY_BANK}.{name}" for name in self.memory_bank._buffers
        ]

    @property
    def keeps_classifier(self) -> bool:
        """Whether the backbone keeps its own classifier, and the memory is read with it."""
        return self.memory_args["read_head"] in KEPT_CLASSIFIER

    @property
    def encoding_size(self) -> int:
        """Width D of an encoding: the backbone's `head_hidden_size`, C, or both, by what is compared and read."""
        logits = self.num_classes if self.keeps_classifier else 0
        return logits + (0 if self.memory_args["read_head"] == "classifier" else self.head_hidden_size)

    @property
    def encodes_pre_logits(self) -> bool:
        """Whether an encoding is pre-logits and logits side by side."""
        return self.num_classes > 0 and self.memory_args["read_head"] in WITH_PRE_LOGITS

    @property
    def temperature(self) -> float:
        """What the logits are divided by. What is set is saved with the model."""
        return self.memory_args["temperature"]

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if self.num_classes == 0:
            raise ValueError("num_classes=0: the model has no head to set a temperature of. Call reset_classifier(n).")
        self.head.temperature = temperature
        self.memory_args["temperature"] = self._model_args["temperature"] = float(temperature)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        return_readout: bool = False,
        memory_encoding: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor | MemoryReadout:
        """Classifies images `[B, C, H, W]`.

        Args:
            x: Images.
            memory: Images `[M, C, H, W]` to use as the memory set, instead of the batch or the bank.
            return_readout: Whether to return what was read too, with gradient: for a loss on the weights.
            memory_encoding: Encodings `[M, D]` to use as the memory set, instead of images.
            hidden: Which of the given memory samples each input must not see, a mask `[B, M]`.

        Returns:
            Logits `[B, C]`, or a `MemoryReadout`. With `num_classes=0`, the backbone's features.

        Raises:
            ValueError: If there is no head to read with, a memory set has no place in a vote, or two are given.
        """
        if memory is not None and memory_encoding is not None:
            raise ValueError("Both memory and memory_encoding are given. Pass images or encodings, not both.")
        encoding = self.encode(x)
        if self.num_classes == 0:
            if memory is not None or memory_encoding is not None or return_readout:
                raise ValueError(
                    "num_classes=0: the model has no head to read a memory with. Call reset_classifier(n)."
                )
            return encoding
        if memory is not None:
            memory_encoding = self.encode(memory)
        return self.forward_encoding(encoding, memory_encoding, return_readout, hidden)

    def forward_encoding(
        self,
        encoding: Tensor,
        memory_encoding: Tensor | None = None,
        return_readout: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor | MemoryReadout:
        """Classifies encodings `[B, D]` that `encode` made, as `forward` classifies images.

        Args:
            encoding: Encodings of the inputs.
            memory_encoding: As in `forward`.
            return_readout: As in `forward`.
            hidden: As in `forward`.

        Raises:
            ValueError: If `hidden` is not a mask of the given memory set.
        """
        if hidden is not None and (
            memory_encoding is None
            or hidden.dtype != torch.bool
            or hidden.shape != (len(encoding), len(memory_encoding))
        ):
            size = None if memory_encoding is None else len(memory_encoding)
            raise ValueError(
                f"hidden is {hidden.dtype} of shape {list(hidden.shape)}; expected a mask, torch.bool of shape "
                f"[{len(encoding)}, {size}], with a memory set that is given."
            )
        if memory_encoding is not None:
            readout = self._read_set(encoding, memory_encoding, ranked=return_readout, hidden=hidden)
        elif self.training:
            readout = self._read_batch(encoding, ranked=return_readout)
        else:
            readout = self._read_remembered(encoding)
        return readout if return_readout else readout.logits

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Computes logits, or with `pre_logits` pooled features, from the backbone's unpooled features."""
        if pre_logits:
            return self.backbone.forward_head(x, pre_logits=True)
        encoding = encode_features(self.backbone, x, self.encodes_pre_logits)
        if self.num_classes == 0:
            return encoding
        readout = self._read_batch(encoding, ranked=False) if self.training else self._read_remembered(encoding)
        return readout.logits

    def encode(self, x: Tensor) -> Tensor:
        """Encodes images `[N, C, H, W]` to `[N, D]`."""
        return encode(self.backbone, x, self.encodes_pre_logits)

    def read_memory(self, x: Tensor) -> MemoryReadout:
        """Classifies images in evaluation and returns what was read: the bank's samples and their weights.

        Raises:
            ValueError: If the model is in training mode.
        """
        if self.training:
            raise ValueError("The model is in training mode, where the memory is the batch. Call model.eval() first.")
        readout = self.forward(x, return_readout=True)
        assert isinstance(readout, MemoryReadout)
        return readout

    def read_encoding(self, encoding: Tensor, hidden: Tensor | None = None) -> MemoryReadout:
        """Reads the memory bank for encodings `[B, D]` that `encode` made: no second pass through the backbone.

        Args:
            encoding: Encodings `[B, D]`.
            hidden: Positions `[B, H]` in the bank that each row must not see, each once.

        Raises:
            ValueError: If the bank is empty.
        """
        if not len(self.memory_bank):
            raise ValueError("The memory bank is empty. Call timm_memwrap.build_memory_bank(model, data) first.")
        return self._read(encoding, self._prepared_bank(encoding.dtype), hidden)

    def read_encoded_anew(self, encoding: Tensor, positions: Tensor, memory_encoding: Tensor) -> MemoryReadout:
        """Reads the memory bank for encodings `[B, D]` with some of its samples encoded anew, for each row by itself.

        Gradients reach both encodings, and so the images that they were made of. The other samples are read as the
        bank holds them.

        Args:
            encoding: Encodings of the inputs `[B, D]`.
            positions: Positions `[K]` in the bank of the samples to replace, each once.
            memory_encoding: What each row reads in their place, `[B, K, D]`.

        Returns:
            What was read. Indices from M on are the replaced samples: `M + row * K + k`.

        Raises:
            ValueError: If the bank is empty, or a shape does not fit.
        """
        bank, (rows, width) = self.memory_bank, encoding.shape
        if not len(bank):
            raise ValueError("The memory bank is empty. Call timm_memwrap.build_memory_bank(model, data) first.")
        if memory_encoding.shape != (rows, len(positions), width):
            raise ValueError(
                f"memory_encoding has shape {list(memory_encoding.shape)}; expected {[rows, len(positions), width]}: "
                f"for each input one encoding per position."
            )
        assert bank.encodings is not None and bank.labels is not None
        positions = positions.to(bank.labels.device)
        memory = torch.cat([bank.encodings.to(_wide(encoding.dtype)), memory_encoding.flatten(0, 1)])
        prepared = self._prepare(memory, torch.cat([bank.labels, bank.labels[positions].repeat(rows)]))
        # One set of keys serves all rows: each is blind to what it replaced, and to what other rows replaced it by.
        new = len(bank) + torch.arange(rows * len(positions), device=positions.device).view(rows, -1)
        others = torch.stack([new[torch.arange(rows, device=new.device) != row].flatten() for row in range(rows)])
        return self._read(encoding, prepared, torch.cat([positions.expand(rows, -1), others], dim=1))

    # -- the memory's state -----------------------------------------------------------------------------------------

    def encoder_fingerprint(self) -> str:
        """Returns the fingerprint of the weights that encode images."""
        tensors = list(self.backbone.state_dict(keep_vars=True).values())
        if self._fingerprint is None or not self._fingerprint[0].unchanged(tensors):
            self._fingerprint = (Watch(tensors), fingerprint(self.backbone))
        return self._fingerprint[1]

    def memory_is_stale(self) -> bool:
        """Returns whether the encoder has changed since it encoded the memory bank."""
        encoder = self.memory_bank.provenance.encoder
        return bool(encoder) and encoder != self.encoder_fingerprint()

    def use_index(
        self, kind: str | None, effort: int | None = None, path: str | os.PathLike | None = None
    ) -> "MemoryWrapModel":
        """Searches the memory bank through a faiss index from now on, and returns itself.

        It is built at the next read without gradient, and anew whenever the weights or the bank change. It is no part
        of the saved model: whoever loads it says so again, with `path` to find it built.

        Args:
            kind: `"flat"`, exact; `"ivf"` or `"hnsw"`, approximate; `None` for the exact search without faiss.
            effort: How much an approximate index looks at, as in `MemoryIndex`; `None` for its default.
            path: A file to keep the index in, e.g. beside the model. One of other keys is replaced.

        Raises:
            ValueError: If the kind or the effort is unknown.
        """
        if kind is not None:
            check_index(kind, effort)
        self._index_args = None if kind is None else {"kind": kind, "effort": effort, "path": path}
        self._prepared = None
        return self

    # -- timm's interface, as far as it concerns the head -------------------------------------------------------------

    def classifier_name(self) -> str | tuple[str, ...] | None:
        """Returns the name of the last layer, or names of several, as in timm's `pretrained_cfg["classifier"]`."""
        if self.keeps_classifier:
            return add_prefix(self.backbone.pretrained_cfg["classifier"])
        return HEAD_CLASSIFIER_NAMES[self.memory_args["classifier"]]

    def get_classifier(self) -> nn.Module:
        """Returns the last layer; `nn.Identity` if there is none."""
        if self.num_classes and self.keeps_classifier:
            return self.backbone.get_classifier()
        name = self.classifier_name()
        return self.get_submodule(name) if self.num_classes and isinstance(name, str) else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one, as timm's `reset_classifier` does.

        The memory bank is dropped, with a warning: its labels mean nothing to other classes. Only a vote that reads
        the backbone's features keeps it when classes are added, since it has no class layer.

        Args:
            num_classes: New number of classes; 0 for none.
            global_pool: New pooling, if not `None`; `""` for none, with `num_classes=0` only.

        Raises:
            ValueError: If a head is to read features that are not pooled.
        """
        check_global_pool(global_pool, num_classes)
        grows = (
            self.memory_args["classifier"] == "vote" and not self.keeps_classifier and num_classes >= self.num_classes
        )
        if self.keeps_classifier:
            self.backbone.reset_classifier(num_classes, global_pool)
        elif global_pool is not None:
            self.backbone.reset_classifier(0, global_pool)
        if global_pool is not None:
            self._model_args["global_pool"] = global_pool
        device = next(self.backbone.parameters()).device
        self.num_classes = num_classes
        self.head = self._new_head().to(device).train(self.training)
        self._forget_queue()
        self._prepared = None
        if len(self.memory_bank) and not grows:
            _logger.warning(
                "reset_classifier(%d) drops the memory bank of %d samples: its labels are of other classes. "
                "Call build_memory_bank to build a new one.",
                num_classes,
                len(self.memory_bank),
            )
            self.memory_bank.clear()

    def train(self, mode: bool = True) -> "MemoryWrapModel":
        """Sets training mode, where the memory is the batch, or evaluation mode, where it is the bank."""
        super().train(mode)
        if mode and self.num_classes:
            self._make_queue()
        return self

    # -- internals --------------------------------------------------------------------------------------------------

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        args = self.memory_args
        width = self.encoding_size
        features = width - self.num_classes
        read_heads: dict[str, Callable[[], nn.Module | None]] = {
            "linear": lambda: None,
            "identity": nn.Identity,
            "classifier": CentreClasses,
            "pre_logits": lambda: Columns(0, features),
            "probabilities": lambda: Probabilities(features),
        }
        common = {
            "head": read_heads[args["read_head"]](),
            "distance": args["distance"],
            "scale": args["scale"],
            "temperature": args["temperature"],
        }
        if args["classifier"] == "vote":
            return LabelVote(width, self.num_classes, **common)
        layer: type[MemoryWrapLayer] | type[BaselineMemory] = BaselineMemory if self.memory_only else MemoryWrapLayer
        classifier: nn.Module | None = None
        if self.keeps_classifier:
            # Encodings hold the logits already. C(sum w m) = sum w C(m), since the weights sum to 1.
            classifier = nn.Identity() if self.memory_only else MeanOfHalves()
            if features:
                classifier = nn.Sequential(classifier, Columns(features, width))
        elif args["classifier"] == "linear":
            classifier = nn.Linear(width if self.memory_only else 2 * width, self.num_classes)
        return layer(width, self.num_classes, classifier=classifier, **common)

    def _read(
        self, encoding: Tensor, prepared: _Prepared, hidden: Tensor | None = None, ranked: bool = True
    ) -> MemoryReadout:
        """Reads `prepared`; `ranked=False` spares training the order of the weights, and leaves them out."""
        head: MemoryLayer = self.head
        size = len(prepared.values)
        mask = hidden if hidden is not None and hidden.dtype == torch.bool else None
        hides_all = hidden is not None and mask is None and hidden.shape[-1] >= size
        # No shape that depends on data, and a gradient that is one matrix product.
        dense = self.training or torch.compiler.is_compiling()
        if not (dense or hides_all or _needs_gradient(encoding, prepared)):
            # A mask over all of the memory is work for all of the memory, so the index is no help with it.
            weights, indices = head.search(
                encoding, prepared.keys, hidden, prepared.key_index if mask is None else None
            )
        else:
            similarity = head.similarity(encoding, prepared.keys)
            with float32_island(similarity):
                if mask is not None:
                    similarity = similarity.masked_fill(mask, MASKED)
                elif hides_all:
                    similarity = similarity[:, :0]
                elif hidden is not None:
                    similarity = similarity.scatter(1, hidden.to(similarity.device), MASKED)
                if not dense:
                    weights, indices = top_weights(similarity)
                else:
                    weights = content_weights(similarity)
                    indices = torch.arange(weights.shape[-1], device=weights.device).expand_as(weights)
        with float32_island(weights):
            if mask is not None:
                # Where all is hidden, all are alike, and none must be read.
                weights = weights.masked_fill(mask.gather(1, indices), 0.0)
            if not dense:
                vector = read(weights, indices, prepared.values)
            else:
                # With nothing to read this is zero, and still has a gradient: the last batch of an epoch may be of one.
                vector = weights @ prepared.values[: weights.shape[-1]]
                if ranked:
                    weights, indices = weights.sort(dim=-1, descending=True)
                else:
                    weights, indices = weights[:, :0], indices[:, :0]
        return MemoryReadout(head.classify(encoding, vector), weights, indices, encoding)

    def _prepare(self, memory_encoding: Tensor, labels: Tensor | None = None) -> _Prepared:
        return _Prepared(self.head.keys(memory_encoding), self.head.values(memory_encoding, labels))

    def _read_set(
        self, encoding: Tensor, memory_encoding: Tensor, ranked: bool = True, hidden: Tensor | None = None
    ) -> MemoryReadout:
        return self._read(encoding, self._prepare(memory_encoding), hidden, ranked)

    def _read_batch(self, encoding: Tensor, ranked: bool) -> MemoryReadout:
        itself = torch.arange(len(encoding), device=encoding.device).unsqueeze(1)
        readout = self._read(encoding, self._prepare(encoding), hidden=itself, ranked=ranked)
        self._remember(encoding)
        return readout

    def _read_remembered(self, encoding: Tensor) -> MemoryReadout:
        if len(self.memory_bank):
            return self._read(encoding, self._prepared_bank(encoding.dtype))
        if self._queue_used and not torch.compiler.is_compiling() and self.memory_args["classifier"] != "vote":
            assert self.queue is not None
            filled = min(int(self.queue_position), len(self.queue))
            return self._read_set(encoding, self.queue[:filled].to(_wide(encoding.dtype)))
        if not self._warned:
            self._warned = _warn_of_empty_memory()
        nothing = encoding.new_zeros(0, self.encoding_size)
        return self._read(encoding, self._prepare(nothing, torch.zeros(0, dtype=torch.long, device=encoding.device)))

    def _prepared_bank(self, dtype: torch.dtype) -> _Prepared:
        """Projects and normalises the bank's keys once, until a weight, the bank or the dtype of inputs changes."""
        bank, dtype = self.memory_bank, _wide(dtype)
        assert bank.encodings is not None and bank.labels is not None
        parameters = list(self.head.parameters())
        wants_gradient = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        if self.training or wants_gradient or torch.compiler.is_compiling():
            return self._prepare(bank.encodings.to(dtype), bank.labels)
        watched = [*parameters, *self.head.buffers(), bank.encodings, bank.labels]
        known = self._prepared
        if known is None or known[1].values.dtype != dtype or not known[0].unchanged(watched):
            # Not in inference mode, whose tensors a later backward could not use.
            with torch.inference_mode(False), torch.no_grad():
                prepared = self._prepare(bank.encodings.to(dtype), bank.labels)
                if self._index_args is not None:
                    prepared = prepared._replace(
                        key_index=MemoryIndex(prepared.keys, self.memory_args["distance"], **self._index_args)
                    )
                known = self._prepared = (Watch(watched), prepared)
        return known[1]

    def _make_queue(self) -> None:
        parameter = next(self.backbone.parameters())
        if self.queue is None or self.queue.device != parameter.device:
            self.queue = torch.zeros(QUEUE_SIZE, self.encoding_size, device=parameter.device)
            self.queue_position = torch.zeros((), dtype=torch.long, device=parameter.device)
            self._queue_used = False

    def _remember(self, encoding: Tensor) -> None:
        """Keeps the last encodings seen in training, in a ring."""
        self._make_queue()
        assert self.queue is not None
        encoding = encoding.detach()[-len(self.queue) :]
        positions = (self.queue_position + torch.arange(len(encoding), device=encoding.device)) % len(self.queue)
        with torch.no_grad():
            self.queue.index_copy_(0, positions, encoding.to(self.queue.dtype))
            self.queue_position += len(encoding)
        self._queue_used = True

    def _forget_queue(self) -> None:
        self.queue = None
        self._queue_used = False

    def _apply(self, fn: Any, recurse: bool = True) -> "MemoryWrapModel":
        """Moves or casts the model. A bank that fitted the encoder still does after a cast of both."""
        casts = len(self.memory_bank) > 0 and fn(torch.zeros(0)).dtype != torch.zeros(0).dtype
        fitted = casts and not self.memory_is_stale()
        super()._apply(fn, recurse)
        if self.queue is not None:
            moved = fn(self.queue)
            self.queue = moved if moved.dtype == self.queue.dtype else self.queue.to(moved.device)
            self.queue_position = fn(self.queue_position)
        if fitted and self.memory_bank.provenance.encoder:
            self.memory_bank.set_encoder(self.encoder_fingerprint())
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights. Without a memory bank among them a strict load empties the bank, and a loose one leaves it."""
        with self.memory_bank.kept_if_absent(not strict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses a bank that the head cannot read, before anything of it is loaded."""
        bank = f"{prefix}{constants.MEMORY_BANK}."
        encodings, labels = state_dict.get(f"{bank}encodings"), state_dict.get(f"{bank}labels")
        if encodings is not None and (encodings.ndim != 2 or encodings.shape[1] != self.encoding_size):
            error_msgs.append(
                f"The memory bank's encodings have shape {list(encodings.shape)}; this model reads "
                f"[M, {self.encoding_size}]. They are of another backbone or read_head."
            )
        if labels is not None and labels.numel() and not labels.is_meta and int(labels.max()) >= self.num_classes:
            error_msgs.append(
                f"The memory bank has a label {int(labels.max())}, outside num_classes={self.num_classes}. Its labels "
                f"are of other classes."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # Other weights made what is in the queue.
        self._forget_queue()

    def __getstate__(self) -> dict[str, Any]:
        # What is derived is derived anew: a copy must not watch the original's tensors.
        return {**self.__dict__, "_prepared": None, "_fingerprint": None}


def encode(backbone: Any, x: Tensor, with_pre_logits: bool) -> Tensor:
    """Encodes images `[N, C, H, W]` by what the backbone returns, `[N, C]` or `[N, D]`.

    Args:
        backbone: A timm model.
        x: The images.
        with_pre_logits: Whether its pre-logits come before that: `[N, D + C]`.
    """
    return encode_features(backbone, backbone.forward_features(x), True) if with_pre_logits else backbone(x)


def encode_features(backbone: Any, features: Any, with_pre_logits: bool) -> Tensor:
    """Encodes as `encode` does, from the backbone's unpooled features."""
    logits = backbone.forward_head(features)
    if not with_pre_logits:
        return logits
    return torch.cat([backbone.forward_head(features, pre_logits=True), logits], dim=-1)


# Names of the last layer in the state dict by `classifier`, where it is not the backbone's.
HEAD_CLASSIFIER_NAMES = {
    "mlp": f"{constants.HEAD}.classifier.fc2",
    "linear": f"{constants.HEAD}.classifier",
    "vote": None,
}


def resolve_memory_args(
    memory_only: bool,
    distance: str = "cosine",
    scale: float | str | None = None,
    read_head: str = "linear",
    classifier: str | None = None,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Checks the arguments that shape the memory, and fills in what is `None`.

    Raises:
        ValueError: If one is unknown, or two do not fit each other.
    """
    if classifier is None:
        classifier = "linear" if read_head in KEPT_CLASSIFIER else "mlp"
    if scale is None:
        scale = _SCALES.get(read_head, 1.0)
    choices = (
        ("distance", distance, DISTANCES),
        ("read_head", read_head, READ_HEADS),
        ("classifier", classifier, CLASSIFIERS),
    )
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"Unknown {name}={value!r}. Pass one of {', '.join(map(repr, known))}.")
    if read_head in KEPT_CLASSIFIER and classifier == "mlp":
        raise ValueError(
            f"read_head={read_head!r} reads in the space of the backbone's logits, which classifier='mlp' would have "
            f"to learn anew. Pass classifier='linear' (the backbone's own) or 'vote'."
        )
    if classifier == "vote" and read_head == "pre_logits":
        raise ValueError(
            "read_head='pre_logits' keeps the backbone's classifier for the logits, of which classifier='vote' has no "
            "use. Pass read_head='identity' to vote by the same similarity."
        )
    if classifier == "vote" and not memory_only:
        raise ValueError(
            "classifier='vote' classifies from the memory alone. Create 'memwrap_baseline_<name>', or pass "
            "memory_only=True to wrap."
        )
    return {
        "distance": distance,
        "scale": scale,
        "read_head": read_head,
        "classifier": classifier,
        "temperature": temperature,
    }


def check_global_pool(global_pool: str | None, num_classes: int) -> None:
    """Refuses a head on features that are not pooled.

    Raises:
        ValueError: If `global_pool` is `""` and there are classes.
    """
    if global_pool == "" and num_classes > 0:
        raise ValueError(
            f"global_pool='' with num_classes={num_classes}: the memory compares pooled encodings. Leave global_pool "
            f"at its default, or pass num_classes=0 for features."
        )


def _needs_gradient(encoding: Tensor, prepared: _Prepared) -> bool:
    """Whether a read must be differentiable, for which it keeps all scores."""
    return torch.is_grad_enabled() and (
        encoding.requires_grad or prepared.keys.vectors.requires_grad or prepared.values.requires_grad
    )


@torch.compiler.assume_constant_result
def _warn_of_empty_memory() -> bool:
    """Warns, and returns that it has. The compiler calls it while it traces, where a call of the logger would break."""
    _logger.warning(
        "The memory is empty, so the model reads nothing from it. Call timm_memwrap.build_memory_bank(model, data) "
        "before evaluation."
    )
    return True


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a read: float32, and float64 where the model is."""
    return torch.float64 if dtype == torch.float64 else torch.float32
