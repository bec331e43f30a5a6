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

from timm_memwrap.data.classes import dataset_classes, innermost, known_class_names, known_labels
from timm_memwrap.data.naming import sample_ids
from timm_memwrap.data.transforms import BATCH_SIZE, check_images, data_config, stack, to_batch
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel

__all__ = ["Samples", "check_labels", "encoded_batches", "size_of"]

_logger = logging.getLogger(__name__)


class Samples:
    """The samples of a data set or loader of `(image, label)`.

    A data set is read in order. So is the data set of a `DataLoader`, of a subclass, and of a loader that wraps one as
    its `loader` (timm's `PrefetchLoader`), with the loader's own workers, collate function and whatever else it does
    to a batch. Which samples training draws, and in what order, does not matter: shuffling and dropping the last batch
    are undone, and a sampler is passed over with a warning. Only a `SubsetRandomSampler` or a sequence of positions
    limits the samples, as a `Subset` does.

    Other iterables of batches are read once, as they come, and their samples are numbered in that order.

    Images are tensors, which are taken for model inputs, or PIL images, which get the model's own transform unless the
    loader has a collate function for them.

    Args:
        data: The data set or loader.
        model: The model whose inputs and labels they are.

    Raises:
        ValueError: If `data` is something else, or a loader that does not let its samples be told apart.
    """

    def __init__(self, data: Any, model: MemoryWrapModel) -> None:
        self._model, self._config = model, data_config(model)
        if _is_indexed(data) or isinstance(data, IterableDataset):
            data = DataLoader(data, BATCH_SIZE)
        elif not isinstance(data, Iterable):
            raise ValueError(f"{type(data).__name__} is neither a dataset nor a loader of (image, label).")
        inner = _data_loader(data)
        self._loader, self._dataset = data, getattr(data if inner is None else inner, "dataset", None)
        self.length: int | None = None  # None for a stream, whose samples can only be read in its own order
        self._indices: Sequence[int] = ()
        if not _is_indexed(self._dataset):
            return
        if inner is None or inner.batch_sampler is None:
            raise ValueError(
                f"{type(data).__name__} reads a data set in an order that is not known, so its samples cannot be told "
                f"apart. Pass the data set, a DataLoader with a batch_size, or iter(loader) to number samples as read."
            )
        sampler = _sampler(inner)
        fixed = _fixed_positions(sampler)
        self._indices = range(len(self._dataset)) if fixed is None else fixed
        self.length = len(self._indices)
        self._batch_size = inner.batch_size or getattr(inner.batch_sampler, "batch_size", None) or BATCH_SIZE
        if fixed is None and not _reads_all_once(sampler, self.length):
            _logger.warning(
                "%s chooses samples for training, so it is passed over: all %d samples are read in order. For some of "
                "them, pass a Subset of the data.",
                type(sampler).__name__,
                self.length,
            )

    @cached_property
    def labels(self) -> Tensor | None:
        """Labels `[N]` of all samples if the data set lists them; `None` if only reading each image would tell.

        Raises:
            ValueError: If the model does not have such classes.
        """
        labels = None if self.length is None else known_labels(self._dataset)
        if labels is None:
            return None
        labels = labels[torch.as_tensor(self._indices, dtype=torch.long)]
        check_labels(labels, self._model.num_classes)
        return labels

    @property
    def name(self) -> str:
        """Name of the data set's class; empty for a stream that does not have a data set."""
        return "" if self._dataset is None else type(innermost(self._dataset)).__name__

    @property
    def class_names(self) -> list[str]:
        """Class names of the data set, else of the model; empty if there is not one for each of the model's classes."""
        names = dataset_classes(self._dataset) or known_class_names(self._model)
        return names if len(names) == self._model.num_classes else []

    def ids(self, positions: Iterable[int]) -> list[SampleId]:
        """Returns file names where the data set knows them and they tell samples apart, else positions in it."""
        if self.length is None:
            return list(positions)
        return sample_ids(self._dataset, [self._indices[i] for i in positions])

    def batches(self, positions: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images `[B, C, H, W]` and labels `[B]` of the samples at these positions, or all for `None`.

        Raises:
            ValueError: If a batch is anything else, or the model does not have such classes.
        """
        changes: dict[str, Any] = {}
        inner = _data_loader(self._loader)
        if inner is not None and inner.collate_fn is default_collate:
            changes["collate_fn"] = partial(_collate, self._config)
        if self.length is None:
            assert positions is None, "a stream has one order"
            loader = self._loader if inner is None else _twin(self._loader, **changes)
            yield from map(self._checked, loader)
            return
        indices = [self._indices[i] for i in (range(self.length) if positions is None else positions)]
        order, seen = _Order(indices, self._batch_size), 0
        for batch in _twin(self._loader, batch_sampler=order, **changes):
            images, labels = self._checked(batch)
            seen += len(labels)
            yield images, labels
        if seen != len(indices) or order.given != len(order):
            raise ValueError(
                f"{type(self._loader).__name__} does not read what its batch sampler asks for, so its samples cannot "
                f"be told apart. Pass the data set, or iter(loader) to number samples as read."
            )

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, Sequence) or len(batch) < 2:
            raise ValueError(f"A batch of the data is {type(batch).__name__}; expected (images, labels).")
        images, labels = batch[0], torch.as_tensor(batch[1])
        if not isinstance(images, Tensor):
            images = stack(self._config, images)
        check_images(images)
        if labels.shape != images.shape[:1] or bool((labels != labels.long()).any()):
            raise ValueError(
                f"A batch of the data has images {list(images.shape)} and labels {list(labels.shape)} of "
                f"{labels.dtype}; expected [B, C, H, W] and [B], one class index per image. Mixup and one-hot labels "
                f"are for training, not for the memory."
            )
        check_labels(labels, self._model.num_classes)
        return images, labels.long()


def encoded_batches(model: MemoryWrapModel, data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields encodings `[B, E]` and labels `[B]` of the `Samples` of a data set or loader, on the model's device."""
    for images, labels in Samples(data, model).batches():
        encoding = model.encode(to_batch(model, images))
        yield encoding, labels.to(encoding.device)


def size_of(data: Any) -> int | None:
    """Returns the number of samples of a data set or loader, if it is known."""
    loader = _data_loader(data)
    fixed = None if loader is None else _fixed_positions(_sampler(loader))
    dataset = getattr(data, "dataset", data) if loader is None else loader.dataset
    return len(fixed) if fixed is not None else len(dataset) if isinstance(dataset, Sized) else None


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises a `ValueError` if labels are not class indices of a model."""
    outside = labels[(labels < 0) | (labels >= num_classes)].unique().tolist()
    if outside:
        raise ValueError(
            f"Labels of the data are {', '.join(map(str, outside[:5]))}, outside num_classes={num_classes}: expected "
            f"class indices, 0 to {num_classes - 1}. Create the model with num_classes={int(labels.max()) + 1} or "
            f"more, or change the labels; timm_memwrap.data.match_labels(model, data) does so by class names."
        )


class _Order(Sampler[list[int]]):
    """A batch sampler of the given indices, which counts the batches that were asked for."""

    def __init__(self, indices: list[int], batch_size: int) -> None:
        # The attribute that a BatchSampler has.
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


def _reads_all_once(sampler: Any, length: int) -> bool:
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == length
    return isinstance(sampler, SequentialSampler)


def _is_indexed(data: Any) -> TypeGuard[Any]:
    # PyTorch's IterableDataset has a __getitem__ that raises.
    return hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, IterableDataset)


def _collate(config: dict[str, Any], samples: list[Any]) -> tuple[Tensor, Any]:
    for sample in samples:
        if not isinstance(sample, Sequence) or len(sample) < 2:
            raise ValueError(f"A sample of the data is {type(sample).__name__}; expected (image, label).")
    return stack(config, [sample[0] for sample in samples]), default_collate([sample[1] for sample in samples])
