"""Fills a memory bank from a dataset or loader: what to remember, its encodings, and progress.

Shapes: N samples of the data, M samples remembered, D width of an encoding.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset
from tqdm import tqdm

from timm_memwrap.memory_bank import MemoryBank, Provenance, SampleId
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.selection import SELECTIONS, needs_encodings, select

__all__ = ["build_memory_bank", "own_predictions"]

_logger = logging.getLogger(__name__)

BATCH_SIZE = 64
IMAGE_SIZE = 64

# Rows scored at a time when the model classifies its own memory.
_BLOCK = 1024


def build_memory_bank(
    model: MemoryWrapModel,
    data: Dataset | Iterable,
    size: int | None = 1000,
    selection: str = "balanced",
    store_images: bool = False,
    seed: int = 0,
    progress: bool = True,
    class_names: Sequence[str] | None = None,
    dataset_name: str | None = None,
    distributed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> MemoryBank:
    """Chooses samples of `data`, encodes them in one pass, and makes them the memory bank of `model`.

    Runs in evaluation mode without gradients, and restores the model's mode. The bank changes at the very end, so an
    interrupted call leaves the old one.

    Args:
        model: The model whose bank is to be built, with the weights that it is to be used with.
        data: A dataset or loader of `(image, label)`. Images are tensors `[C, H, W]`, or PIL images, which get the
            model's own evaluation transform. Of a PyTorch `DataLoader` the dataset is read in order, whatever its
            sampler shuffles; other loaders are read once, as they come.
        size: Number M of samples to remember; `None` for all.
        selection: `"random"`; `"balanced"`, as many of each class as there are; `"kmeans"`, per class the samples
            nearest to k-means centres of the encodings (needs scikit-learn); `"all"`.
        store_images: Whether to keep small uint8 images, at most 64 pixels a side, for people to look at. They stay in
            the bank when it is saved.
        seed: Seed of the choice.
        progress: Whether to show a progress bar.
        class_names: Names of the classes by label; `None` for `data.classes`, else the model's `label_names`.
        dataset_name: Name of the data set, for the bank's provenance; `None` for the name of its class.
        distributed: Whether all processes of `torch.distributed`'s default group make this call together. Each then
            encodes its share of the samples, and all get the same bank.
        dtype: What the encodings are stored in, as in `MemoryBank.store_as`.

    Returns:
        The bank, which is `model.memory_bank`.

    Raises:
        ValueError: If the data is empty or smaller than `size`, a label is outside `num_classes`, an encoding is not
            finite, or an argument does not fit.

    Example:
        ```python
        >>> import timm, timm_memwrap, torch
        >>> model = timm.create_model("memwrap_test_resnet", num_classes=2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 2)
        >>> timm_memwrap.build_memory_bank(model, data, size=4, progress=False)
        MemoryBank(4 samples of 2 classes, encodings [4, 96], no images, balanced from TensorDataset)

        ```
    """
    if not isinstance(model, MemoryWrapModel):
        raise ValueError(f"{type(model).__name__} has no memory bank. Wrap it first: timm_memwrap.wrap(model).")
    if model.num_classes == 0:
        raise ValueError("num_classes=0: the model has no head to read a memory with. Call reset_classifier(n) first.")
    if selection not in SELECTIONS:
        raise ValueError(f"Unknown selection={selection!r}. Pass one of {', '.join(map(repr, SELECTIONS))}.")
    if selection == "all":
        size = None
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"size={size!r} is not a number of samples. Pass an integer of at least 1, or None for all.")

    source = _Source(data, model)
    if distributed:
        _check_distributed(source)
    everything = range(source.length) if source.length is not None else None
    chosen: list[int] | None = None
    if source.labels is not None and not needs_encodings(selection):
        _check_labels(source.labels, model.num_classes)
        chosen = select(selection, source.labels, None, size, seed)

    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            encoded = _encode(
                model, source, everything if chosen is None else chosen, store_images, progress, distributed
            )
            if chosen is None:
                _check_labels(encoded.labels, model.num_classes)
                kept = select(selection, encoded.labels, encoded.encodings, size, seed)
                encoded = encoded.at(kept)
            population = source.length if source.length is not None else encoded.seen
            bank = MemoryBank()
            bank.replace(
                encoded.encodings,
                encoded.labels,
                torch.zeros_like(encoded.labels),
                encoded.ids,
                encoded.images,
                class_names if class_names is not None else source.class_names(),
                Provenance(
                    dataset=dataset_name if dataset_name is not None else source.name,
                    selection="all" if size is None else selection,
                    seed=None if size is None else seed,
                    population=population,
                    encoder=model.encoder_fingerprint(),
                ),
                dtype,
            )
            device = next(model.parameters()).device
            old, model.memory_bank = model.memory_bank, bank.to(device)
            try:
                bank.set_predictions(own_predictions(model))
            except BaseException:
                model.memory_bank = old
                raise
    finally:
        for module, was_training in training.items():
            module.training = was_training
    model.memory_bank.train(model.training)
    return model.memory_bank


def own_predictions(model: MemoryWrapModel) -> Tensor:
    """Classifies each sample of a model's bank with the sample itself hidden, `[M]`."""
    encodings = model.memory_bank.encodings
    assert encodings is not None
    if len(encodings) == 1:
        _logger.warning("The memory bank has one sample, which cannot be classified without itself.")
    itself = torch.arange(len(encodings), device=encodings.device).unsqueeze(1)
    blocks = zip(encodings.split(_BLOCK), itself.split(_BLOCK), strict=True)
    return torch.cat([model.read_encoding(block, hidden).logits.argmax(dim=-1) for block, hidden in blocks])


def _check_labels(labels: Tensor, num_classes: int) -> None:
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(
            f"{len(outside)} labels are outside num_classes={num_classes}, e.g. {int(outside[0])}. Labels are class "
            f"indices, 0 to {num_classes - 1}: create the model with num_classes={int(labels.max()) + 1}, or map them."
        )


class _Encoded:
    """Samples as they come out of the encoder, in reading order."""

    def __init__(self, encodings: Tensor, labels: Tensor, ids: list[SampleId], images: Tensor | None) -> None:
        self.encodings, self.labels, self.ids, self.images = encodings, labels, ids, images
        self.seen = len(labels)

    def at(self, positions: list[int]) -> "_Encoded":
        index = torch.tensor(positions)
        part = _Encoded(
            self.encodings[index],
            self.labels[index],
            [self.ids[i] for i in positions],
            None if self.images is None else self.images[index],
        )
        part.seen = self.seen
        return part


def _encode(
    model: MemoryWrapModel,
    source: "_Source",
    positions: Sequence[int] | None,
    store_images: bool,
    progress: bool,
    distributed: bool,
) -> _Encoded:
    encodings, labels, images = [], [], []
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    share = positions
    if distributed:
        assert positions is not None
        share = positions[dist.get_rank() :: dist.get_world_size()]
    total = len(share) if share is not None else None
    with tqdm(total=total, desc="Memory bank", unit="img", disable=not progress) as bar:
        for image, label in source.batches(share):
            encodings.append(model.encode(image.to(device=device, dtype=dtype)).float().cpu())
            labels.append(label.cpu())
            if store_images:
                images.append(_small_images(image, model))
            bar.update(len(label))
    if not labels:
        raise ValueError("The data is empty, so there is nothing to remember. Check its path and split.")
    count = sum(map(len, labels)) if positions is None else len(positions)
    ids = source.ids(range(count) if positions is None else positions)
    parts = [torch.cat(encodings), torch.cat(labels), *([torch.cat(images)] if store_images else [])]
    if distributed:
        parts = [_gather(part, count, device) for part in parts]
    return _Encoded(parts[0], parts[1], ids, parts[2] if store_images else None)


def _check_distributed(source: "_Source") -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("distributed=True, but torch.distributed has no process group. Start with torchrun.")
    if source.length is None or source.length < dist.get_world_size():
        raise ValueError(
            f"distributed=True divides the samples over {dist.get_world_size()} processes, but the data has "
            f"{source.length} that can be read in any order. Pass a data set with random access and enough samples."
        )


def _gather(part: Tensor, count: int, device: torch.device) -> Tensor:
    """Collects what the processes computed, sample i by process i modulo their number, `[count, ...]`."""
    world_size = dist.get_world_size()
    padded = part.new_zeros(-(-count // world_size), *part.shape[1:])
    padded[: len(part)] = part
    padded = padded.to(device)
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)
    return torch.stack(gathered, dim=1).flatten(0, 1)[:count].cpu()


def _small_images(images: Tensor, model: MemoryWrapModel) -> Tensor:
    """Undoes the model's normalisation, and makes uint8 images `[N, C, H, W]` of at most `IMAGE_SIZE` pixels a side."""
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    images = images.detach().float().cpu()
    channels = images.shape[1]
    if mean.shape[1] not in (1, channels):
        # As timm's loaders do for other channel counts.
        mean, std = mean.mean(dim=1, keepdim=True), std.mean(dim=1, keepdim=True)
    images = images * std + mean
    if channels not in (1, 3):
        raise ValueError(f"Images have {channels} channels; only 1 or 3 can be shown. Pass store_images=False.")
    factor = IMAGE_SIZE / max(images.shape[-2:])
    if factor < 1:
        height, width = (max(1, round(side * factor)) for side in images.shape[-2:])
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


class _Source:
    """One view of a dataset or loader: its length and labels where they are known without reading, and its batches."""

    def __init__(self, data: Dataset | Iterable, model: MemoryWrapModel) -> None:
        self._model = model
        self._loader: Iterable | None = None
        self._dataset: Any = None
        self._positions: list[int] | None = None
        self._options: dict[str, Any] = {"batch_size": BATCH_SIZE}
        if type(data) is DataLoader and _has_items(data.dataset):
            self._dataset = data.dataset
            self._options = {"num_workers": data.num_workers, "collate_fn": data.collate_fn}
            self._options["batch_size"] = data.batch_size or BATCH_SIZE
            if not isinstance(data.sampler, SequentialSampler | RandomSampler):
                # Another sampler may leave samples out. Their order does not matter here, so it must not show.
                self._positions = sorted({int(i) for i in data.sampler})
        elif _has_items(data) and not isinstance(data, DataLoader):
            self._dataset = data
        elif isinstance(data, Iterable):
            self._loader = data
            self._dataset = getattr(data, "dataset", None)
        else:
            raise ValueError(f"{type(data).__name__} is neither a dataset nor a loader of (image, label).")

    @property
    def length(self) -> int | None:
        if self._loader is not None:
            return None
        return len(self._dataset) if self._positions is None else len(self._positions)

    @property
    def labels(self) -> Tensor | None:
        """Labels `[N]` of all samples if the dataset lists them; reading them one by one would decode each image."""
        if self._loader is not None:
            return None
        labels = _known_labels(self._dataset)
        return labels if labels is None or self._positions is None else labels[torch.tensor(self._positions)]

    @property
    def name(self) -> str:
        return type(_innermost(self._dataset)).__name__ if self._dataset is not None else ""

    def class_names(self) -> list[str]:
        """Names of the classes: those of the dataset, else those that came with the model."""
        dataset = _innermost(self._dataset)
        reader = getattr(dataset, "reader", None)
        by_index = {i: name for name, i in (getattr(reader, "class_to_idx", None) or {}).items()}
        names = getattr(dataset, "classes", None) or [by_index[i] for i in sorted(by_index)]
        if not names:
            names = self._model.pretrained_cfg.get("label_names") or []
            names = list(names.values()) if isinstance(names, dict) else list(names)
        return [str(name) for name in names] if len(names) == self._model.num_classes else []

    def ids(self, positions: Iterable[int]) -> list[SampleId]:
        """File names where the dataset knows them and they tell samples apart, else positions in the dataset."""
        if self._loader is not None:
            return list(positions)
        inner = [i if self._positions is None else self._positions[i] for i in positions]
        names = [_sample_name(self._dataset, i) for i in inner]
        if all(name is not None for name in names) and len(set(names)) == len(names):
            return [name for name in names if name is not None]
        return list(inner)

    def batches(self, positions: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images `[B, C, H, W]` and labels `[B]`."""
        if self._loader is not None:
            for batch in self._loader:
                yield _checked_batch(batch)
            return
        assert positions is not None
        if not len(positions):
            return
        inner = [i if self._positions is None else self._positions[i] for i in positions]
        dataset = self._dataset
        if not isinstance(_image_of(dataset[inner[0]]), Tensor):
            dataset = _Transformed(dataset, create_transform(**resolve_model_data_config(self._model)))
        for batch in DataLoader(Subset(dataset, inner), shuffle=False, **self._options):
            yield _checked_batch(batch)


class _Transformed(Dataset):
    """A dataset of PIL images with the model's own transform."""

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor]) -> None:
        self._dataset, self._transform = dataset, transform

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self._dataset[index][:2]
        return self._transform(image), label


def _has_items(data: Any) -> bool:
    return hasattr(data, "__getitem__") and isinstance(data, Sized)


def _image_of(sample: Any) -> Any:
    if not isinstance(sample, Sequence) or len(sample) < 2:
        raise ValueError(f"A sample of the data is {type(sample).__name__}; expected (image, label).")
    return sample[0]


def _checked_batch(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise ValueError(f"A batch of the data is {type(batch).__name__}; expected (images, labels).")
    images, labels = batch[0], torch.as_tensor(batch[1])
    if not isinstance(images, Tensor) or images.ndim != 4 or labels.ndim != 1 or len(labels) != len(images):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"A batch of the data has images {shape} and labels {list(labels.shape)}; expected [B, C, H, W] and [B]: "
            f"one class index per image. Mixup and one-hot labels are for training, not for the memory."
        )
    return images, labels.long()


def _innermost(dataset: Any) -> Any:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _known_labels(dataset: Any) -> Tensor | None:
    if isinstance(dataset, Subset):
        labels = _known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    for attribute in ("targets", "labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and getattr(dataset, "target_transform", None) is None:
            return torch.as_tensor(labels).long()
    samples = getattr(getattr(dataset, "reader", None), "samples", None)
    if isinstance(samples, list) and samples and getattr(dataset, "target_transform", None) is None:
        return torch.tensor([int(label) for _, label in samples])
    return None


def _sample_name(dataset: Any, index: int) -> str | None:
    if isinstance(dataset, Subset):
        return _sample_name(dataset.dataset, int(dataset.indices[index]))
    if hasattr(dataset, "filename"):  # timm's datasets
        return dataset.filename(index, basename=False, absolute=False)
    samples = getattr(dataset, "samples", None)  # torchvision's image folders
    if isinstance(samples, list) and samples:
        path = PurePath(str(samples[index][0]))
        # The folder is the class; two classes may well both have a 0001.png.
        return str(PurePath(*path.parts[-2:]))
    return None
