"""The model: a timm backbone, a Memory Wrap layer and a memory bank behind timm's model interface.

Shapes: B inputs, M memory samples, E width of an encoding, C classes, K samples kept per input, H hidden from an input.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap import constants
from timm_memwrap.attention import wide
from timm_memwrap.backbone import OwnClassifier, classifiers_of, classifies_affinely, encode_features
from timm_memwrap.bank_format import largest_label
from timm_memwrap.bank_memory import BankMemory, bank_memory, empty_memory, warn_of_empty_memory
from timm_memwrap.checks import misfits, split_bank
from timm_memwrap.encoding_queue import QUEUE_SIZE, EncodingQueue
from timm_memwrap.engines import open_memory
from timm_memwrap.fingerprint import WatchedFingerprint
from timm_memwrap.heads import Calibration, new_head
from timm_memwrap.memory_args import resolve_memory_args
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.memory_layer import is_factor
from timm_memwrap.readouts import MemoryReadout, PreparedMemory, Read
from timm_memwrap.search import check_index
from timm_memwrap.timm_interface import TimmInterface, add_prefix
from timm_memwrap.tracing import forward_features, is_traced, trace_read

__all__ = ["MemoryWrapModel"]

_logger = logging.getLogger(__name__)


class MemoryWrapModel(TimmInterface):
    """A timm backbone whose predictions read a memory of training samples.

    Where the memory set comes from:
    - `model(x, memory=images)`: these images, encoded with gradient, in training and evaluation (the paper's protocol).
    - Training: for each sample the rest of its batch, with gradient. Costs no second encoder pass.
    - Evaluation: the memory bank (`build_memory_bank`). While it is empty, the last encodings seen in training.

    In evaluation the bank is a constant: gradients reach the input, not the memory.

    Made by `timm.create_model("memwrap_<name>")` or `wrap`; seldom by hand.

    Args:
        backbone: A timm model. Its own classifier must be gone (`num_classes=0`), except with the read heads that
            read with it.
        num_classes: Number of classes C; 0 for none, as in timm: the model then returns the backbone's features.
        memory_only: Whether the prediction is made from the memory alone (`BaselineMemory`) or from the input and the
            memory (`MemoryWrapLayer`).
        distance: As in `resolve_memory_args`, and so are all that follow.
        scale: See `distance`.
        read_head: See `distance`.
        classifier: See `distance`.
        read: See `distance`.

    Raises:
        ValueError: If an argument is unknown, or two do not fit each other.
    """

    head: Any
    memory_bank: MemoryBank

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        memory_only: bool = False,
        distance: str = "cosine",
        scale: float | str | None = None,
        read_head: str | None = None,
        classifier: str | None = None,
        read: str | None = None,
    ) -> None:
        super().__init__()
        # Order is format: the bank comes last, so that two state dicts of which one has no bank agree up to there.
        self.backbone = backbone
        self.num_classes = num_classes
        self.memory_only = memory_only
        self.memory_args = resolve_memory_args(memory_only, distance, scale, read_head, classifier, read)
        self.encodes_logits = False
        self.head = self._new_head()
        self.calibration = Calibration()
        self.memory_bank = MemoryBank()
        # No buffer: an EMA pairs those of two models in order, of which one may not have trained yet.
        self.queue: EncodingQueue | None = None
        self._warned = False
        self._index_args: dict[str, Any] | None = None
        self.engine = None  # what holds the memory outside of the bank
        self._fingerprint = WatchedFingerprint()
        # Of the backbone's classifier as it was made with random weights; None where it may have been trained.
        self.new_classifier: str | None = None

        traits = dict(getattr(backbone, "_traits", {}))
        self._traits = {**traits, "first_conv": add_prefix(traits.get("first_conv"))}
        self._model_args: dict[str, Any] = dict(self.memory_args)
        # Each rank keeps its own memory: broadcasting it at every forward would cost more than the forward.
        self._ddp_params_and_buffers_to_ignore = [
            f"{constants.MEMORY_BANK}.{name}" for name in self.memory_bank._buffers
        ]

    @property
    def own_classifier(self) -> OwnClassifier:
        """The backbone's own classifier as a function of encodings."""
        return OwnClassifier(self.backbone, self.encodes_logits)

    @property
    def encoding_size(self) -> int:
        """Width E of an encoding: that of the pre-logits, and C if the backbone's logits stand behind them."""
        return self.head_hidden_size + (self.num_classes if self.encodes_logits else 0)

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 1.0 is as published. `calibrate` fits it; setting it undoes the fitted confidence."""
        return float(self.calibration.temperature)

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if not is_factor(temperature):
            raise ValueError(f"temperature={temperature!r} is not a divisor. Pass a finite number above 0, e.g. 1.0.")
        self.calibration.set_temperature(temperature)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        hidden: Tensor | None = None,
        return_readout: bool = False,
    ) -> Tensor | MemoryReadout:
        """Classifies images `[B, in_chans, H, W]`.

        Args:
            x: Images; encodings are for `read`.
            memory: The memory set, instead of the batch or the bank: images `[M, in_chans, H, W]`, or encodings
                `[M, E]`.
            hidden: As in `read`.
            return_readout: Whether to return what was read too.

        Returns:
            Logits `[B, C]`, or a `MemoryReadout`. With `num_classes=0`, the backbone's features.

        Raises:
            ValueError: If there is no head to read with, or a vote has no labels to count.
        """
        if self.num_classes == 0:
            # torch.fx hands proxies over in place of the defaults.
            if isinstance(memory, Tensor) or return_readout is True:
                self.check_head()
            return self.backbone(x)
        encoding = self.encode(x)
        if isinstance(memory, Tensor) and memory.ndim == 4:
            memory = self.encode(memory)
        if is_traced(encoding):
            if self.engine is not None:
                self.engine.check_whole(self.memory_bank)
            return self.calibration(trace_read(self.head, self.memory_bank, encoding, self.training))
        readout = self._read(encoding, memory, hidden, ranked=return_readout)
        return readout if return_readout else readout.logits

    def read(
        self, encoding: Tensor, memory: Tensor | PreparedMemory | None = None, hidden: Tensor | None = None
    ) -> MemoryReadout:
        """Classifies encodings `[B, E]` that `encode` made, as `forward` classifies images.

        Args:
            encoding: Encodings of the inputs.
            memory: The memory set: encodings `[M, E]`, or what `model.head.prepare` made of them and of their labels.
                `None` for the rest of the batch in training, and in evaluation for the bank.
            hidden: Samples that each input must not see: positions `[B, H]` in the memory set, or a mask `[B, M]`.

        Raises:
            ValueError: If `hidden` does not fit, or a vote has no labels to count.
        """
        self.check_head()
        return self._read(encoding, memory, hidden, ranked=True)

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Computes logits, or with `pre_logits` pooled features, from the backbone's unpooled features."""
        if pre_logits or self.num_classes == 0:
            return self.backbone.forward_head(x, pre_logits=pre_logits)
        return self._read(self.encode_features(x), None, None, ranked=False).logits

    def encode(self, x: Tensor) -> Tensor:
        """Encodes images `[N, in_chans, H, W]` to `[N, E]`."""
        return self.encode_features(forward_features(self.backbone, x))

    def encode_features(self, features: Any) -> Tensor:
        """Encodes images from the backbone's unpooled features, as `forward_features` returns them."""
        return encode_features(self.backbone, features, self.encodes_logits)

    def own_logits(self, positions: Tensor) -> Tensor:
        """Computes what the model itself says of samples of its memory, `[P, C]`.

        With the backbone's own classifier C that is `C(f_i)`, as of the plain model. A vote and the trained heads read
        the bank with the sample itself hidden, and all that are identical to it.

        Args:
            positions: Positions `[P]` in the bank.
        """
        known, (encodings, _) = self.prepared_bank(), self.memory_bank.filled()
        memory, parts = known.memory, []
        with torch.no_grad():
            if self.memory_args["classifier"] == "own":
                for part in known.blocks(positions):
                    encoding = encodings[part].to(memory.keys.vectors.dtype)
                    parts.append(self.calibration(self.head.classify(encoding, encoding)))
            else:
                for encoding, hidden in known.left_out(positions, encodings):
                    parts.append(self._read(encoding, memory, hidden, ranked=False).logits)
        return torch.cat(parts)

    def own_predictions(self, positions: Tensor | None = None) -> Tensor:
        """Returns the class that the model itself predicts for samples of its memory, the most probable of several.

        Args:
            positions: Positions in the bank, of any shape; `None` for all, in order. See `own_logits`. What is known
                stays known until the weights or the bank change.
        """
        if positions is None:
            vectors = self.prepared_bank().memory.keys.vectors
            positions = torch.arange(len(vectors), device=vectors.device)
        return self.prepared_bank().predict(positions, self.own_logits)

    def use_index(
        self, kind: str | None, effort: int | None = None, path: str | os.PathLike | None = None, **engine: Any
    ) -> "MemoryWrapModel":
        """Searches the memory through an index from now on, and returns itself.

        An index of faiss is built at the next read, and again whenever the weights or the bank change. Milvus holds the
        samples: a bank is written to it, and while the bank is empty, what is there is read. Neither is part of the
        saved model: call this again after loading.

        Args:
            kind: `"flat"`, exact; `"ivf"` or `"hnsw"`, approximate: faiss. `"milvus"`. `None` for the exact search.
            effort: How much an approximate index looks at, as in `FaissIndex`; `None` for its default.
            path: A file to keep the index of faiss in, e.g. beside the model. One of other keys is replaced.
            engine: For `"milvus"`, the arguments of `MilvusMemory`, e.g. `uri="memory.db"`.

        Raises:
            ValueError: If an argument does not fit, or Milvus has no memory of these weights and the bank is empty.
            ConnectionError: If Milvus cannot be reached.
        """
        if unfit := [*engine] if kind != "milvus" else ["path"] if path is not None else []:
            raise ValueError(f"use_index({kind!r}) takes no {', '.join(unfit)}. Leave it out.")
        memory = open_memory(self, effort=effort, **engine) if kind == "milvus" else None
        if memory is None and kind is not None:
            check_index(kind, effort)
        self.engine, faiss = memory, {"kind": kind, "effort": effort, "path": path}
        self._index_args = faiss if memory is None and kind is not None else None
        self.memory_bank.derived = None
        return self

    def train(self, mode: bool = True) -> "MemoryWrapModel":
        """Sets training mode, where the memory is the batch, or evaluation mode, where it is the bank."""
        super().train(mode)
        if mode and self.num_classes:
            self._forget_derived()
            self._training_queue()
        return self

    def check_bank(self, encodings: Tensor, largest_label: int) -> None:
        """Raises if this model cannot read a bank of these encodings `[M, E]`, whose labels go up to `largest_label`.

        Raises:
            ValueError: If the width is another model's, or a label is outside `num_classes`.
        """
        if encodings.ndim != 2 or encodings.shape[1] != self.encoding_size:
            raise ValueError(
                f"The memory bank's encodings have shape {list(encodings.shape)}; this model reads "
                f"[M, {self.encoding_size}]. They are of another backbone. Call build_memory_bank to build a new one."
            )
        if largest_label >= self.num_classes:
            raise ValueError(
                f"The memory bank has a label {largest_label}, outside num_classes={self.num_classes}. They are of "
                f"other classes. Call build_memory_bank to build a new one."
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights, and the memory bank if it is among them; else the bank stays.

        Raises:
            RuntimeError: If something does not fit; the model is then as it was.
        """
        weights, bank = split_bank(state_dict)
        bank = {name.removeprefix(f"{constants.MEMORY_BANK}."): value for name, value in bank.items()}
        wrong = misfits(split_bank(self.state_dict(keep_vars=True))[0], weights, names=strict)
        if {"encodings", "labels"} <= bank.keys():
            try:
                self.check_bank(bank["encodings"], largest_label(bank["labels"]))
            except ValueError as error:
                wrong.append(str(error))
        if wrong:
            raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(self).__name__}:", *wrong]))
        if bank:
            self.memory_bank.load_state_dict(bank, assign=assign)
        return super().load_state_dict(weights, strict=strict, assign=assign)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Other weights made the queue's encodings, and the keys.
        self.queue = None
        self._forget_derived()

    def _reset_head(self, num_classes: int) -> None:
        """Replaces the head, and drops the memory bank unless a vote on the backbone's features gets more classes."""
        parameter = next(self.backbone.parameters())
        vote = self.memory_args["classifier"] == "vote" and not self.keeps_classifier
        keeps = vote and num_classes >= self.num_classes
        self.num_classes = num_classes
        self.head = self._new_head().to(parameter.device, parameter.dtype)
        if self.keeps_classifier and num_classes:
            # timm makes it in the default precision.
            classifiers_of(self.backbone).to(parameter.device, parameter.dtype)
            self.new_classifier = self.classifier_fingerprint()
        self.calibration.confidence.zero_()
        self.queue = None
        self._forget_derived()
        self.train(self.training)
        if len(self.memory_bank) and not keeps:
            _logger.warning(
                "reset_classifier(%d) drops the memory bank of %d samples: its labels are of other classes. "
                "Call build_memory_bank to build a new one.",
                num_classes,
                len(self.memory_bank),
            )
            self.memory_bank.clear()

    def _new_head(self) -> nn.Module:
        self.encodes_logits = self.keeps_classifier and self.num_classes > 0 and not classifies_affinely(self.backbone)
        if self.num_classes == 0:
            return nn.Identity()
        sizes = (self.encoding_size, self.num_classes, self.head_hidden_size)
        return new_head(self.memory_args, self.memory_only, *sizes, self.own_classifier)

    def _read(self, encoding: Tensor, memory: Any, hidden: Any, ranked: bool) -> MemoryReadout:
        memory, hidden = self._memory_set(encoding, memory, hidden)
        read: Read = self.head.read(self.head.query(encoding), memory, hidden, ranked)
        return MemoryReadout(self.calibration(self.head.classify(encoding, read.vector)), *read[1:], encoding)

    def _memory_set(self, encoding: Tensor, memory: Any, hidden: Tensor | None) -> tuple[PreparedMemory, Tensor | None]:
        """Chooses the memory set, and what of it each input must not see."""
        if self.training:
            self._forget_derived()
        if isinstance(memory, Tensor):
            memory = self.head.prepare(memory)
        if isinstance(memory, PreparedMemory):
            return memory, hidden
        if self.engine is not None and not self.training:
            return self.engine.memory(self, encoding, hidden), None
        if hidden is not None and (self.training or not len(self.memory_bank)):
            raise ValueError(
                "hidden names samples of the memory bank or of a memory set that is given, and here is neither. Call "
                "model.eval() and build_memory_bank, or pass memory."
            )
        if self.training:
            self._training_queue().append(encoding)
            return self.head.prepare(encoding), torch.arange(encoding.shape[0], device=encoding.device).unsqueeze(1)
        if len(self.memory_bank):
            return self.prepared_bank(encoding).memory, hidden
        if self.queue is not None and self.memory_args["classifier"] != "vote":
            queued = self.queue.encodings.to(wide(encoding).dtype)
            return self.head.prepare(queued), self.queue.empty_entries(encoding.shape[0])
        if not self._warned:
            self._warned = warn_of_empty_memory()
        return empty_memory(self.head, encoding), None

    def prepared_bank(self, like: Tensor | None = None) -> BankMemory:
        """Returns what reads of the bank use, made once for these weights and samples."""
        if self.engine is not None:
            self.engine.check_whole(self.memory_bank)
        others = classifiers_of(self.backbone) if self.keeps_classifier else ()
        dtype = wide(next(self.backbone.parameters()) if like is None else like).dtype
        return bank_memory(self.memory_bank, self.head, others, dtype, self._index_args, self.check_bank)

    def _forget_derived(self) -> None:
        self._fingerprint.forget()
        if self.memory_bank.derived is not None:
            self.memory_bank.derived = None

    def _training_queue(self) -> EncodingQueue:
        device = next(self.backbone.parameters()).device
        if self.queue is None or self.queue.encodings.device != device:
            self.queue = EncodingQueue(QUEUE_SIZE, self.encoding_size, device)
        return self.queue

    def _apply(self, fn: Any, recurse: bool = True) -> "MemoryWrapModel":
        """Moves or casts the model. A bank that fitted the encoder still does after a cast of both."""
        casts = len(self.memory_bank) > 0 and fn(torch.zeros(0)).dtype != torch.zeros(0).dtype
        fitted = casts and not self.memory_is_stale()
        super()._apply(fn, recurse)
        if self.queue is not None:
            self.queue.to(fn(self.queue.encodings).device)
        if fitted and self.memory_bank.provenance.encoder:
            self.memory_bank.set_provenance(encoder=self.encoder_fingerprint())
        return self
