"""What is remembered: encodings of training samples and what they mean, all of it in buffers.

Shapes: M memory samples, D width of an encoding.
"""

import dataclasses
import json
import logging
import operator
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from timm_memwrap.constants import BANK_FORMAT_VERSION, SAFETENSORS_METADATA

__all__ = ["MemoryBank", "Provenance"]

_logger = logging.getLogger(__name__)

# name: (dtype, number of dimensions). `images` and `meaning` are not indexed by sample in the same way as the rest.
_BUFFERS = {
    "encodings": (torch.float32, 2),
    "labels": (torch.int64, 1),
    "predictions": (torch.int64, 1),
    "images": (torch.uint8, 4),
    "meaning": (torch.uint8, 1),
}
# What encodings may be stored in. All but the first lose digits; a read is in float32 whatever they are stored in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_REQUIRED = ("encodings", "labels", "predictions", "meaning")

SampleId = int | str


@dataclass(frozen=True)
class Provenance:
    """Where the samples of a bank come from, and which encoder encoded them.

    Args:
        dataset: Name of the data set.
        selection: How the samples were chosen, e.g. `"balanced"`.
        seed: Seed of the choice.
        population: Number of samples that they were chosen from.
        encoder: Fingerprint of the encoder's weights; empty if unknown.
    """

    dataset: str = ""
    selection: str = ""
    seed: int | None = None
    population: int | None = None
    encoder: str = ""


@dataclass
class _Meaning:
    """What is not a number about a bank. Travels as JSON in a uint8 buffer, so that stock timm restores it."""

    ids: list[SampleId] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    provenance: Provenance = field(default_factory=Provenance)

    def to_tensor(self) -> Tensor:
        text = json.dumps({"format_version": BANK_FORMAT_VERSION, **asdict(self)}, ensure_ascii=False)
        # A file name need not be Unicode: Python then gives it surrogates.
        return torch.frombuffer(bytearray(text.encode(errors="surrogatepass")), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "_Meaning":
        try:
            data = json.loads(bytes(tensor.cpu().numpy()).decode(errors="surrogatepass"))
        except ValueError as error:
            raise ValueError(f"The memory bank's meaning is not JSON ({error}). The file is damaged.") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != BANK_FORMAT_VERSION:
            raise ValueError(
                f"The memory bank has format_version={version!r}; this version of timm-memwrap reads "
                f"{BANK_FORMAT_VERSION}. Upgrade timm-memwrap, or build the bank anew with build_memory_bank."
            )
        ids, class_names, provenance = data.get("ids"), data.get("class_names"), data.get("provenance")
        known = {f.name for f in fields(Provenance)}
        if (
            not isinstance(ids, list)
            or not all(isinstance(i, int | str) for i in ids)
            or not isinstance(class_names, list)
            or not all(isinstance(name, str) for name in class_names)
            or not isinstance(provenance, dict)
        ):
            raise ValueError("The memory bank's meaning lacks ids, class_names or provenance. The file is damaged.")
        return cls(ids, class_names, Provenance(**{k: v for k, v in provenance.items() if k in known}))


class _Copy(Tensor):
    """A bank's tensor in a state dict, which nothing averages or overwrites.

    timm's EMA pairs the tensors of two state dicts in order and averages each pair in place, or copies it if it is not
    floating. Two banks may have other lengths, where either would be an error, and other samples, where an average
    would be nonsense. Whatever is computed from it is a plain tensor, and so is what is pickled or copied.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def is_floating_point(self) -> bool:
        return False

    def copy_(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)


class MemoryBank(nn.Module):
    """Encodings of training samples with their labels, predictions, ids and, if wanted, small images.

    All of its state is in buffers, so a model's state dict carries it. An empty bank has no buffers at all, and so no
    entry in the state dict; loading adapts their length to the file. Encodings stay in float32 whatever the dtype of
    the model.

    Example:
        ```python
        >>> bank = MemoryBank()
        >>> bank.append(torch.randn(2, 8), torch.tensor([0, 1]), torch.tensor([0, 0]), ids=["a.png", "b.png"])
        >>> bank
        MemoryBank(2 samples of 2 classes, encodings [2, 8], no images)
        >>> len(bank.remove(["a.png"]))
        1

        ```
    """

    encodings: Tensor | None
    labels: Tensor | None
    predictions: Tensor | None
    images: Tensor | None
    meaning: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in _BUFFERS:
            self.register_buffer(name, None)
        self._keep_if_absent = False

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    # An empty bank is still a bank: `bank or other` must not ask for its length.
    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        if not len(self):
            return "MemoryBank(empty)"
        assert self.encodings is not None
        images = "no images" if self.images is None else f"images {list(self.images.shape[1:])}"
        source = f", {self.provenance.selection} from {self.provenance.dataset}" if self.provenance.dataset else ""
        return (
            f"MemoryBank({len(self)} samples of {len(self.class_counts)} classes, "
            f"encodings {list(self.encodings.shape)}, {images}{source})"
        )

    @property
    def ids(self) -> list[SampleId]:
        """Ids of the samples, in memory order."""
        return self._read_meaning().ids

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label; empty if unknown."""
        return self._read_meaning().class_names

    @property
    def provenance(self) -> Provenance:
        """Where the samples come from."""
        return self._read_meaning().provenance

    @property
    def class_counts(self) -> dict[int, int]:
        """Number of samples by label."""
        return dict(sorted(Counter([] if self.labels is None else self.labels.tolist()).items()))

    def replace(
        self,
        encodings: Tensor,
        labels: Tensor,
        predictions: Tensor,
        ids: Sequence[SampleId],
        images: Tensor | None = None,
        class_names: Sequence[str] = (),
        provenance: Provenance | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Forgets everything and remembers these samples.

        Args:
            encodings: Encodings `[M, D]`, finite.
            labels: Labels `[M]`, at least 0.
            predictions: The model's own predictions for the samples `[M]`.
            ids: One id per sample, each once: what names the sample in its data set.
            images: Small images for people to look at, uint8 `[M, 3 or 1, H, W]`.
            class_names: Names of the classes by label.
            provenance: Where the samples come from.
            dtype: What the encodings are stored in, one of `DTYPES`.

        Raises:
            ValueError: If lengths, shapes, types or values do not fit. The bank is then unchanged.
        """
        meaning = _Meaning(_plain_ids(ids), _plain_names(class_names), provenance or Provenance())
        state: dict[str, Tensor | None] = {
            "encodings": encodings.detach().to(dtype),
            # Copies: the same tensor may be given as both, which a file cannot hold.
            "labels": labels.detach().to(torch.long, copy=True),
            "predictions": predictions.detach().to(torch.long, copy=True),
            "images": images,
        }
        _check(state, meaning)
        state["meaning"] = meaning.to_tensor().to(encodings.device)
        self._set(state)

    def append(
        self,
        encodings: Tensor,
        labels: Tensor,
        predictions: Tensor,
        ids: Sequence[SampleId],
        images: Tensor | None = None,
    ) -> None:
        """Remembers more samples, behind those already there. Arguments as in `replace`.

        Raises:
            ValueError: If they do not fit each other or what is there. The bank is then unchanged.
        """
        if not len(self):
            return self.replace(encodings, labels, predictions, ids, images)
        assert self.encodings is not None and self.labels is not None and self.predictions is not None
        if encodings.ndim != 2 or encodings.shape[1] != self.encodings.shape[1]:
            raise ValueError(
                f"encodings has shape {list(encodings.shape)}; expected [N, {self.encodings.shape[1]}], the width of "
                f"what the bank holds. Encode the samples with the same model."
            )
        if (images is None) != (self.images is None) or (
            images is not None and self.images is not None and images.shape[1:] != self.images.shape[1:]
        ):
            raise ValueError(
                f"images of shape {None if images is None else list(images.shape)} do not fit the bank's "
                f"{None if self.images is None else list(self.images.shape)}. Give images for all samples or for none."
            )
        device = self.encodings.device
        return self.replace(
            torch.cat([self.encodings, encodings.detach().to(device, self.encodings.dtype)]),
            torch.cat([self.labels, labels.detach().long().to(device)]),
            torch.cat([self.predictions, predictions.detach().long().to(device)]),
            [*self.ids, *ids],
            None if images is None or self.images is None else torch.cat([self.images, images.to(device)]),
            self.class_names,
            self.provenance,
            self.encodings.dtype,
        )

    def remove(self, ids: Iterable[SampleId]) -> "MemoryBank":
        """Forgets the samples with these ids, and returns itself.

        Raises:
            ValueError: If an id is not in the bank, or none would be left. The bank is then unchanged.
        """
        position = {sample_id: i for i, sample_id in enumerate(self.ids)}
        wanted = [ids] if isinstance(ids, str | int) else list(ids)
        unknown = [sample_id for sample_id in wanted if sample_id not in position]
        if unknown:
            raise ValueError(
                f"No sample with id {', '.join(map(repr, unknown[:5]))}{' ...' if len(unknown) > 5 else ''} in "
                f"{self!r}. Its ids are in bank.ids, e.g. {self.ids[:3]}."
            )
        gone = {position[sample_id] for sample_id in wanted}
        if len(gone) == len(self):
            raise ValueError(f"Removing {len(gone)} ids would leave {self!r} empty. Call clear() to forget everything.")
        return self.select(i for i in range(len(self)) if i not in gone)

    def select(self, positions: Iterable[int]) -> "MemoryBank":
        """Keeps only the samples at these positions, in this order, and returns itself."""
        if self.encodings is None or self.labels is None or self.predictions is None:
            raise ValueError("The memory bank is empty, so there is nothing to select. Call build_memory_bank.")
        kept = list(positions)
        index = torch.tensor(kept, dtype=torch.long, device=self.encodings.device)
        ids = self.ids
        self.replace(
            self.encodings[index],
            self.labels[index],
            self.predictions[index],
            [ids[i] for i in kept],
            None if self.images is None else self.images[index],
            self.class_names,
            self.provenance,
            self.encodings.dtype,
        )
        return self

    def store_as(self, dtype: torch.dtype) -> "MemoryBank":
        """Stores the encodings in another precision, and returns itself.

        float16 and bfloat16 take half the space on disk and in memory, and lose digits that do not come back. A read
        computes in float32 from what is stored.

        Args:
            dtype: One of `DTYPES`: `torch.float32`, `torch.float16` or `torch.bfloat16`.

        Raises:
            ValueError: If it is another, or an encoding is beyond what it can hold. The bank is then unchanged.
        """
        if dtype not in DTYPES:
            raise ValueError(f"Unknown dtype={dtype!r}. Pass one of {', '.join(map(str, DTYPES))}.")
        if self.encodings is None:
            raise ValueError("The memory bank is empty, so there is nothing to store. Call build_memory_bank.")
        state = {**self._state(), "encodings": self.encodings.to(dtype)}
        _check(state, self._read_meaning())
        self._set(state)
        return self

    def clear(self) -> None:
        """Forgets everything."""
        self._set(dict.fromkeys(_BUFFERS))

    def without_images(self) -> "MemoryBank":
        """Returns a bank of the same samples that holds no images."""
        bank = MemoryBank()
        bank._set({name: None if name == "images" else tensor for name, tensor in self._state().items()})
        return bank

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Names the classes by label."""
        self._write_meaning(_Meaning(self.ids, _plain_names(class_names), self.provenance))

    def set_predictions(self, predictions: Tensor) -> None:
        """Records the model's own predictions for the samples, `[M]`."""
        if self.encodings is None:
            raise ValueError("The memory bank is empty, so there is nothing to predict. Call build_memory_bank.")
        state = {**self._state(), "predictions": predictions.detach().long()}
        _check(state, self._read_meaning())
        self._set(state)

    def set_encoder(self, encoder: str) -> None:
        """Says which encoder encoded the samples, by its fingerprint."""
        provenance = dataclasses.replace(self.provenance, encoder=encoder)
        self._write_meaning(_Meaning(self.ids, self.class_names, provenance))

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the bank alone to a safetensors file, whole or not at all, and returns its path.

        Raises:
            ValueError: If the bank is empty.
        """
        if not len(self):
            raise ValueError(f"Nothing to save to {str(path)!r}: the memory bank is empty. Call build_memory_bank.")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._state().items() if tensor is not None}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            save_file(tensors, temporary, metadata=SAFETENSORS_METADATA)
            os.replace(temporary, path)
        return path

    def load(self, path: str | os.PathLike) -> "MemoryBank":
        """Forgets everything and remembers what `save` wrote to a file. Returns itself.

        Raises:
            ValueError: If the file is not a whole bank. The bank is then unchanged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}.") from error
        unknown = sorted(set(state) - set(_BUFFERS))
        if unknown:
            raise ValueError(f"{str(path)!r} is not a memory bank: it holds {unknown[:5]}. Pass what bank.save wrote.")
        self._set(_checked_state(state, f"{str(path)!r}"))
        return self

    def _state(self) -> dict[str, Tensor | None]:
        return {name: self._buffers[name] for name in _BUFFERS}

    def _set(self, state: dict[str, Tensor | None]) -> None:
        for name in _BUFFERS:
            self._buffers[name] = state[name]
        self.__dict__.pop("_parsed", None)

    def _read_meaning(self) -> _Meaning:
        """Parses the buffer once per buffer: a million ids take a while."""
        if self.meaning is None:
            return _Meaning()
        parsed = self.__dict__.get("_parsed")
        if parsed is None or parsed[0] is not self.meaning:
            parsed = self.__dict__["_parsed"] = (self.meaning, _Meaning.from_tensor(self.meaning))
        return parsed[1]

    def _write_meaning(self, meaning: _Meaning) -> None:
        if self.encodings is None:
            raise ValueError("The memory bank is empty, so there is nothing to describe. Call build_memory_bank.")
        _check(self._state(), meaning)
        self._set({**self._state(), "meaning": meaning.to_tensor().to(self.encodings.device)})

    def _apply(self, fn: Any, recurse: bool = True) -> "MemoryBank":
        """Moves the buffers, and leaves their dtype: half of an encoding's digits cannot be brought back."""
        moved = {name: None if tensor is None else fn(tensor) for name, tensor in self._state().items()}
        self._set(
            {
                name: tensor
                if tensor is None or tensor.dtype == self._buffers[name].dtype  # type: ignore[union-attr]
                else _moved(self._buffers[name], tensor)
                for name, tensor in moved.items()
            }
        )
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Gives copies: an average of weights, as in an EMA, works on a state dict in place, and would otherwise mix
        the encodings of different samples."""
        for name, tensor in self._state().items():
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach().clone().as_subclass(_Copy)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a bank of any length. Without one in it, a strict load empties this bank, and a loose one leaves it."""
        with self.kept_if_absent(not strict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @contextmanager
    def kept_if_absent(self, keep: bool = True) -> Iterator[None]:
        """Returns a context in which a state dict without a bank leaves this one as it is.

        PyTorch does not tell a submodule whether a load is strict, so whoever loads the whole model says it here.
        """
        before, self._keep_if_absent = self._keep_if_absent, keep
        try:
            yield
        finally:
            self._keep_if_absent = before

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
        """Takes buffers of any length. A whole state without a bank empties this one."""
        found = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        unexpected_keys.extend(prefix + name for name in found if name not in _BUFFERS)
        found = {name: tensor for name, tensor in found.items() if name in _BUFFERS}
        if not found:
            if not self._keep_if_absent:
                self.clear()
            return
        missing = [name for name in _REQUIRED if name not in found]
        if missing:
            missing_keys.extend(prefix + name for name in missing)
            return
        device = self.encodings.device if self.encodings is not None else None
        try:
            state = _checked_state(found, "the state dict")
        except ValueError as error:
            error_msgs.append(str(error))
            return
        # Copies: the bank must not change when the caller's dictionary does, nor keep a file's memory map open.
        self._set(
            {name: None if tensor is None else tensor.detach().clone().to(device) for name, tensor in state.items()}
        )


def _plain_ids(ids: Iterable[Any]) -> list[SampleId]:
    """Returns ids that JSON brings back as they are: text, and whole numbers of any library."""
    plain: list[SampleId] = []
    for sample_id in ids:
        try:
            plain.append(sample_id if isinstance(sample_id, str) else operator.index(sample_id))
        except TypeError:
            raise ValueError(
                f"Id {sample_id!r} is neither text nor a whole number. Pass file names or positions."
            ) from None
    return plain


def _plain_names(class_names: Iterable[str]) -> list[str]:
    names = list(class_names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"Class name {wrong[0]!r} is not text. Pass a list of names, by label.")
    return names


def _moved(original: Tensor | None, like: Tensor) -> Tensor | None:
    return None if original is None else original.to(like.device)


def _checked_state(found: dict[str, Tensor], source: str) -> dict[str, Tensor | None]:
    """Returns the buffers of a bank, or says what about those found in `source` is wrong."""
    state = {name: found.get(name) for name in _BUFFERS}
    for name in _REQUIRED:
        if state[name] is None:
            raise ValueError(f"The memory bank in {source} lacks {name!r}. The file is damaged, or not a memory bank.")
    meaning = state["meaning"]
    assert meaning is not None
    if meaning.dtype != torch.uint8 or meaning.ndim != 1:
        raise ValueError(
            f"The memory bank in {source} has a meaning of {meaning.dtype} {list(meaning.shape)}, not text."
        )
    _check(state, _Meaning.from_tensor(meaning))
    return state


def _check(state: dict[str, Tensor | None], meaning: _Meaning) -> None:
    encodings, labels = state["encodings"], state["labels"]
    assert encodings is not None and labels is not None
    size = len(labels) if labels.ndim else 0
    for name, (dtype, ndim) in _BUFFERS.items():
        tensor = state.get(name)
        if tensor is None or name == "meaning":
            continue
        allowed = DTYPES if name == "encodings" else (dtype,)
        if tensor.dtype not in allowed or tensor.ndim != ndim or len(tensor) != size:
            raise ValueError(
                f"The memory bank's {name} are {tensor.dtype} of shape {list(tensor.shape)}; expected {dtype} with "
                f"{ndim} dimensions, the first of length {size} as the labels have."
            )
    if size == 0:
        raise ValueError("No samples to remember: labels have length 0. Call clear() to empty a memory bank.")
    if len(meaning.ids) != size:
        raise ValueError(f"{len(meaning.ids)} ids for {size} samples. Give one id per sample.")
    if len(set(meaning.ids)) != size:
        twice = [sample_id for sample_id, count in Counter(meaning.ids).items() if count > 1]
        raise ValueError(f"Ids must name one sample each; {twice[:5]} come more than once. Remember a sample once.")
    if encodings.is_meta:
        return
    if not bool(torch.isfinite(encodings).all()):
        bad = (~torch.isfinite(encodings)).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(bad)} of {size} encodings have NaN or infinite entries, the first for id {meaning.ids[bad[0]]!r}. "
            f"Check the images and the model's weights."
        )
    if int(labels.min()) < 0:
        raise ValueError(f"Label {int(labels.min())} is below 0. Labels are class indices, 0 to num_classes - 1.")
