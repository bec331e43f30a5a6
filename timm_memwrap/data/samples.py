"""One view of any data set or loader: samples at known positions, with their ids, labels and class names.

Shapes: N samples, B samples of a batch, E width of an encoding.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cached_property, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler
from torch.utils.data.dataloader import default_collate

from timm_memwrap.data.classes import (
    dataset_classes,
    file_name,
    innermost,
    known_class_names,
    known_labels,
    model_labels,
)
from timm_memwrap.data.transforms import BATCH_SIZE, as_batch, data_config, to_batch
from timm_memwrap.labels import LABEL_DTYPES, plain_labels
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel

__all__ = ["Samples", "encoded_batches", "size_of"]

_logger = logging.getLogger(__name__)


class Samples:
    """The samples of a data set or loader of `(image, label)`, with the labels that the model has for their classes.

    The numbers that a data set gives to classes may be others than the model's, which are found by name where both have
    class names.

    A data set is read in order. So is that of a `DataLoader`, or of a loader that wraps one as its `loader` (timm's
    `PrefetchLoader`), with whatever the loader does to a batch: shuffling and dropping the last batch are undone, and a
    sampler is passed over with a warning. Only a `SubsetRandomSampler` or a sequence of positions limits the samples,
    as a `Subset` does. Other iterables of batches are read once, and their samples are numbered as they come.

    Args:
        data: The data set or loader. Images are tensors, which are taken for model inputs, or PIL images, which get
            the model's own transform unless the loader has a collate function for them.
        model: The model whose inputs and labels they are.
        class_names: Names of the classes by the data's label; `None` for those of the data set. If they are not the
            model's names in some order, they take their place.

    Raises:
        ValueError: If `data` is something else, a loader that does not let its samples be told apart, or its classes
            are not the model's.
    """

    def __init__(self, data: Any, model: MemoryWrapModel, class_names: Sequence[str] | None = None) -> None:
        self._model, self._config = model, data_config(model)
        if _is_indexed(data) or isinstance(data, IterableDataset):
            data = DataLoader(data, BATCH_SIZE)
        elif not isinstance(data, Iterable):
            raise ValueError(f"{type(data).__name__} is neither a dataset nor a loader of (image, label).")
        self._loader, self._inner = data, _data_loader(data)
        self._dataset = getattr(data if self._inner is None else self._inner, "dataset", None)
        ours, theirs = known_class_names(model), list(class_names or dataset_classes(self._dataset))
        renames = bool(class_names) and sorted(theirs) != sorted(ours)
        if renames and len(theirs) != model.num_classes:
            raise ValueError(
                f"{len(theirs)} class_names for the {model.num_classes} classes of the model. Pass as many."
            )
        self._labels = None if renames else model_labels(theirs, ours, model.num_classes)
        self._names = theirs if renames or not ours else ours
        self.length: int | None = None  # None for a stream, whose samples can only be read in its own order
        self._indices: Sequence[int] = ()
        if not _is_indexed(self._dataset):
            return
        if self._inner is None or self._inner.batch_sampler is None:
            raise self._unknown_order()
        sampler = _sampler(self._inner)
        fixed = _fixed_positions(sampler)
        self._indices = range(len(self._dataset)) if fixed is None else fixed
        self.length = len(self._indices)
        everything = isinstance(sampler, SequentialSampler) or (
            isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == self.length
        )
        if fixed is None and not everything:
            _logger.warning(
                "%s chooses samples for training, so it is passed over: all %d samples are read in order. For some of "
                "them, pass a Subset of the data.",
                type(sampler).__name__,
                self.length,
            )

    @cached_property
    def labels(self) -> Tensor | None:
        """Labels of all samples, as in `batches`, if the data set lists them; `None` if only reading tells."""
        labels = None if self.length is None else known_labels(self._dataset)
        return None if labels is None else self._known(labels[torch.as_tensor(self._indices, dtype=torch.long)])

    @property
    def name(self) -> str:
        """Name of the data set's class; empty for a stream that does not have a data set."""
        return "" if self._dataset is None else type(innermost(self._dataset)).__name__

    @property
    def augments(self) -> bool:
        """Whether the data set's transform has parts that are random by their names."""
        return "Random" in repr(getattr(innermost(self._dataset), "transform", None))

    @property
    def class_names(self) -> list[str]:
        """Class names by the model's labels; empty if there is not one for each of the model's classes."""
        return self._names if len(self._names) == self._model.num_classes else []

    def ids(self, positions: Iterable[int]) -> list[SampleId]:
        """Returns file names where the data set knows them and they tell samples apart, else positions in it."""
        if self.length is None:
            return list(positions)
        indices = [self._indices[i] for i in positions]
        names = [name for i in indices if (name := file_name(self._dataset, i)) is not None]
        return [*names] if len(set(names)) == len(indices) else [*indices]

    def batches(self, positions: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images `[B, C, H, W]` and labels of the samples at these positions, or all for `None`.

        Labels are class indices `[B]`, or multi-hot `[B, classes]` in uint8.
        """
        inner, changes = self._inner, {}
        if inner is not None and inner.collate_fn is default_collate:
            changes["collate_fn"] = partial(_collate, self._config)
        if self.length is None:
            assert positions is None, "a stream has one order"
            yield from map(self._checked, _twin(self._loader, **changes) if changes else self._loader)
            return
        indices = [self._indices[i] for i in (range(self.length) if positions is None else positions)]
        assert inner is not None
        size = inner.batch_size or getattr(inner.batch_sampler, "batch_size", None) or BATCH_SIZE
        order, seen = _Order(indices, size), 0
        for batch in _twin(self._loader, batch_sampler=order, **changes):
            images, labels = self._checked(batch)
            seen += len(labels)
            yield images, labels
        if seen != len(indices) or order.given != len(order):
            raise self._unknown_order()

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = _pair(batch, "batch", "(images, labels)")
        images, labels = as_batch(self._config, images), torch.as_tensor(labels)
        indices, several = labels.shape == images.shape[:1], labels.ndim == 2 and len(labels) == len(images)
        if not (indices or several) or bool((labels != labels.to(LABEL_DTYPES[labels.ndim])).any()):
            raise ValueError(
                f"A batch of the data has images {list(images.shape)} and labels {list(labels.shape)} of "
                f"{labels.dtype}; expected [B, C, H, W] and [B], one class index per image, or [B, classes] of 0 and 1 "
                f"if an image may have several classes. What Mixup makes is for training, not for the memory."
            )
        return images, self._known(plain_labels(labels if several else labels.long()))

    def _known(self, labels: Tensor) -> Tensor:
        """Returns the model's labels for the data's, or raises a `ValueError` if there are no such classes."""
        num_classes = self._model.num_classes if self._labels is None else len(self._labels)
        if labels.ndim == 2:
            return self._known_classes(labels, num_classes)
        outside = labels[(labels < 0) | (labels >= num_classes)].unique().tolist()
        if outside:
            raise ValueError(
                f"Labels of the data are {', '.join(map(str, outside[:5]))}, outside num_classes={num_classes}: "
                f"expected class indices, 0 to {num_classes - 1}. Create the model with num_classes="
                f"{int(labels.max()) + 1} or more."
            )
        return labels if self._labels is None else torch.tensor(self._labels)[labels]

    def _known_classes(self, labels: Tensor, num_classes: int) -> Tensor:
        """Returns multi-hot labels with a column for each of the model's classes."""
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"Labels of the data have shape {list(labels.shape)}, a column for each of {labels.shape[1]} classes; "
                f"expected {num_classes} columns. Create the model with num_classes={labels.shape[1]}."
            )
        if self._labels is None:
            return labels
        known = labels.new_zeros(len(labels), self._model.num_classes)
        known[:, self._labels] = labels
        return known

    def _unknown_order(self) -> ValueError:
        return ValueError(
            f"{type(self._loader).__name__} reads its data set in an order that is not known, so its samples cannot be "
            f"told apart. Pass the data set, a DataLoader with a batch_size, or iter(loader) to number samples as read."
        )


def encoded_batches(model: MemoryWrapModel, data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields encodings `[B, E]` and labels of the `Samples` of a data set or loader, on the model's device.

    Raises a `ValueError` if images may have several classes and samples of the model's memory not, or the reverse.
    """
    for images, labels in Samples(data, model).batches():
        if (labels.ndim == 2) != model.multi_label:
            kinds = ("one class per image", "several classes per image")
            raise ValueError(
                f"The labels of the data say {kinds[labels.ndim == 2]}, those of the memory "
                f"{kinds[model.multi_label]}. Pass data with labels of the same kind."
            )
        encoding = model.encode(to_batch(model, images))
        yield encoding, labels.to(encoding.device)


def size_of(data: Any) -> int | None:
    """Returns the number of samples of a data set or loader, if it is known."""
    loader = _data_loader(data)
    if loader is not None:
        fixed = _fixed_positions(_sampler(loader))
        data = loader.dataset if fixed is None else fixed
    return len(data) if isinstance(data, Sized) else None


class _Order(Sampler[list[int]]):
    """Counts the batches that are asked for; `sampler` is the attribute that a `BatchSampler` has."""

    def __init__(self, indices: list[int], batch_size: int) -> None:
        self.sampler = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        self.given = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            self.given += 1
            yield batch


def _twin(loader: Any, **changes: Any) -> Any:
    """Copies a loader with changes to the `DataLoader` in it, so that whatever it does to a batch is kept."""
    twin = copy.copy(loader)
    if isinstance(loader, DataLoader):
        # It refuses to have these set. Running iterators, PyTorch's and that of timm's MultiEpochsDataLoader, go on
        # in the old order.
        vars(twin).update(changes, persistent_workers=False, _iterator=None, iterator=None)
    else:
        twin.loader = _twin(loader.loader, **changes)
    return twin


def _data_loader(data: Any) -> DataLoader | None:
    while not isinstance(data, DataLoader) and data is not None:
        data = getattr(data, "loader", None)
    return data


def _sampler(loader: DataLoader) -> Any:
    sampler: Any = loader.batch_sampler
    while hasattr(sampler, "sampler"):
        sampler = sampler.sampler
    return sampler


def _fixed_positions(sampler: Any) -> list[int] | None:
    """Returns which samples a sampler is limited to, in the data set's order; `None` if it is not."""
    sampler = sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler
    if hasattr(sampler, "tolist"):
        sampler = sampler.tolist()
    if not isinstance(sampler, Sequence):
        return None
    batches = (batch if isinstance(batch, Sequence) else (batch,) for batch in sampler)
    return sorted({int(i) for batch in batches for i in batch})


def _is_indexed(data: Any) -> TypeGuard[Any]:
    # PyTorch's IterableDataset has a __getitem__ that raises.
    return hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, IterableDataset)


def _pair(value: Any, what: str, expected: str) -> tuple[Any, Any]:
    if not isinstance(value, Sequence) or len(value) < 2:
        raise ValueError(f"A {what} of the data is {type(value).__name__}; expected {expected}.")
    return value[0], value[1]


def _collate(config: dict[str, Any], samples: list[Any]) -> tuple[Tensor, Any]:
    images, labels = zip(*(_pair(sample, "sample", "(image, label)") for sample in samples), strict=True)
    return as_batch(config, images), default_collate([*labels])
