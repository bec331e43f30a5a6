"""Fills a memory bank from a data set or loader: what to remember, its encodings, and progress.

Shapes: N samples of the data, M samples remembered, E width of an encoding.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_memwrap._utils import check_choice, check_count, evaluating
from timm_memwrap.attention import unit
from timm_memwrap.data import BATCH_SIZE, Samples, known_class_names, small_images
from timm_memwrap.labels import multi_hot, present
from timm_memwrap.memory_bank import MemoryBank, Provenance, SampleId
from timm_memwrap.memory_checks import check_model, warn_of_new_classifier
from timm_memwrap.memory_layer import LARGE
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.read_heads import CentredLogits
from timm_memwrap.selection import SELECTIONS, find_candidates, herd

__all__ = ["build_memory_bank", "check_distributed", "encoded_samples", "points_to_herd"]

_logger = logging.getLogger(__name__)

# Largest difference, relative to the logits, between the backbone's and those of its classifier on its pre-logits.
_TOLERANCE = 1e-2

# Encodings looked at at a time.
_ROWS = 2**12


def build_memory_bank(
    model: MemoryWrapModel,
    data: Dataset | Iterable,
    size: int | None = 1000,
    selection: str = "herding",
    store_images: bool = False,
    seed: int = 0,
    progress: bool = True,
    class_names: Sequence[str] | None = None,
    dataset_name: str | None = None,
    distributed: bool = False,
    dtype: torch.dtype | None = None,
) -> MemoryBank:
    """Chooses samples of `data`, encodes them in one pass, and makes them the memory bank of `model`.

    Runs in evaluation mode without gradients, and restores the model's mode. The bank changes at the very end, so an
    interrupted call leaves the old one.

    Args:
        model: The model whose bank is to be built, with the weights that it is to be used with.
        data: A data set or loader of `(image, label)`; see `timm_memwrap.data.Samples` for how loaders are read. A
            label is a class index, or a vector of 0 and 1 where an image may have several classes: this makes the model
            multi-label. Images are remembered as they come: an augmentation at random is not undone, and warned of
            where it shows.
        size: Most samples to remember; `None` for all.
        selection: `"herding"`, an even share of each class, whose mean is close to that of the class; up to 100 random
            samples of each are encoded to choose from, and the last digits of encodings, which batches of another size
            change, may change the choice. `"balanced"`, even shares at random; `"random"`; `"all"`. Where images may
            have several classes, shares are about even, and herding follows the mean of all samples.
        store_images: Whether to keep small uint8 images, at most 64 pixels a side, for people to look at. They stay in
            the bank when it is saved.
        seed: Seed of the choice.
        progress: Whether to show a progress bar.
        class_names: Names of the classes by label; `None` for those of the data set. If the model knows the same names
            in another order, its order stays and the labels follow; other names take the place of the model's.
        dataset_name: Name of the data set, for the bank's provenance; `None` for the name of its class.
        distributed: Whether all processes of `torch.distributed`'s default group make this call together. Each then
            encodes its share of the samples, and all get the same bank.
        dtype: What the encodings are stored in, as in `MemoryBank.store_as`. `None` for float32 up to 4,096 samples and
            float16 beyond, unless it does not hold them: it takes half the space, and changes predictions by a
            hundredth of what half precision of the backbone does.

    Returns:
        The bank, which is `model.memory_bank`.

    Raises:
        ValueError: If the data is empty, a label is not a class index below `num_classes`, a class of the data set is
            not among the model's class names, an encoding is not finite, or an argument does not fit.

    Example:
        ```python
        >>> import timm, timm_memwrap, torch
        >>> model = timm.create_model("memwrap_test_resnet", num_classes=2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 2)
        >>> timm_memwrap.build_memory_bank(model, data, size=4, progress=False)
        MemoryBank(4 samples of 2 classes, encodings [4, 96], no images, herding from TensorDataset)

        ```
    """
    check_model(model)
    warn_of_new_classifier(model)
    check_choice("selection", selection, SELECTIONS)
    check_count("size", size, none=True)
    if selection == "all":
        size = None
    samples, named = Samples(data, model, class_names), bool(known_class_names(model))
    if samples.augments:
        _logger.warning(
            "The data is augmented at random, and remembered as it comes. For the images themselves, give the data the "
            "model's evaluation transform."
        )
    if distributed:
        check_distributed(samples)
    candidates: list[int] | None = None
    if samples.labels is not None:
        _check_kind(model, samples.labels)
        candidates = find_candidates(selection, samples.labels, size, seed)
    with evaluating(model):
        encoded = _encode(model, samples, candidates, store_images, progress, distributed)
        population = samples.length if samples.length is not None else len(encoded.labels)
        if candidates is None:
            encoded = encoded.at(find_candidates(selection, encoded.labels, size, seed))
        if size is not None and size < len(encoded.labels):
            encoded = _herded(model, encoded, size)
        provenance = Provenance(
            dataset=dataset_name if dataset_name is not None else samples.name,
            selection="all" if size is None else selection,
            seed=None if size is None else seed,
            population=population,
            encoder=model.encoder_fingerprint(rehash=True),
        )
        dtype = _dtype_for(encoded.encodings) if dtype is None else dtype
        model.memory_bank.replace(
            encoded.encodings, encoded.labels, encoded.ids, encoded.images, samples.class_names, provenance, dtype
        )
        if not named:
            _warn_of_other_labels(model, encoded)
    if model.multi_label and bool((encoded.labels.sum(dim=1) == 1).all()):
        _logger.warning(
            "Labels are multi-hot, so the model is multi-label, but each sample has exactly one class. If classes "
            "exclude each other, pass class indices."
        )
    if len(model.memory_bank) == 1:
        _logger.warning("The memory bank has one sample: each prediction reads it alone, and its own reads nothing.")
    return model.memory_bank


def _dtype_for(encodings: Tensor) -> torch.dtype:
    """Returns float16 for encodings `[M, E]` that are many and lose no more in it than its rounding, else float32."""
    if len(encodings) <= LARGE:
        return torch.float32
    for part in encodings.split(_ROWS):
        lost = torch.linalg.vector_norm(part - part.half().float(), dim=1)
        # Written so that NaN is not taken for one that fits.
        if not bool((lost <= torch.finfo(torch.float16).eps * torch.linalg.vector_norm(part, dim=1)).all()):
            return torch.float32
    return torch.float16


def _herded(model: MemoryWrapModel, encoded: "_Encoded", size: int) -> "_Encoded":
    """Chooses `size` of the candidates."""
    points = points_to_herd(model, encoded.encodings)
    bad = (~points.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        # One of them moves the mean of its class, and may not be chosen itself.
        raise ValueError(
            f"{len(bad)} of {len(points)} encodings have NaN or infinite entries, the first for id "
            f"{encoded.ids[bad[0]]!r}. Check the images and the model's weights."
        )
    return encoded.at(herd(encoded.labels, points, size))


@torch.no_grad()
def points_to_herd(model: MemoryWrapModel, encodings: Tensor) -> Tensor:
    """Returns what herding compares of encodings `[N, E]`: they and, to the same share, the centred logits.

    Without the logits, if the classifier is trained with the memory.
    """
    if not model.keeps_classifier:
        return encodings
    logits = _by_parts(CentredLogits(model.own_classifier), model, encodings)
    return torch.cat([unit(encodings), unit(logits)], dim=1)


def _by_parts(function: Callable[[Tensor], Tensor], model: MemoryWrapModel, encodings: Tensor) -> Tensor:
    """Applies a function to encodings, some at a time, on the device of the model."""
    device = next(model.backbone.parameters()).device
    return torch.cat([function(part.to(device)).to(encodings) for part in encodings.split(BATCH_SIZE)])


def _check_kind(model: MemoryWrapModel, labels: Tensor) -> None:
    """Raises if the model cannot read a memory of samples of several classes, before they are encoded."""
    if labels.ndim == 2 and model.memory_args["classifier"] == "vote":
        raise ValueError(
            f"The labels have shape {list(labels.shape)}, of samples of several classes, but classifier='vote' counts "
            f"one label for each sample. Pass classifier='own', 'linear' or 'mlp'."
        )


def _warn_of_other_labels(model: MemoryWrapModel, encoded: "_Encoded") -> None:
    """Warns if the backbone's own classifier disagrees with most labels: they may be numbered otherwise than its."""
    if model.memory_args["classifier"] != "own":
        return
    logits = _by_parts(model.own_classifier, model, encoded.encodings)
    has = multi_hot(encoded.labels, model.num_classes)
    said = present(logits) if model.multi_label else multi_hot(logits.argmax(dim=1), model.num_classes)
    # Of several labels each counts.
    agree = said[has].float().mean().item()
    if agree < 0.5:
        _logger.warning(
            "The model's own classifier puts %.0f %% of the memory samples into the class of their label. If it is "
            "trained, the data numbers the classes otherwise than the model: give the model its class names, "
            "model.pretrained_cfg['label_names'] = [...], and labels are matched by name.",
            100 * agree,
        )


@dataclass(frozen=True)
class _Encoded:
    """Samples as they come out of the encoder, in reading order, on the CPU."""

    encodings: Tensor
    labels: Tensor
    ids: list[SampleId]
    images: Tensor | None

    def at(self, positions: list[int]) -> "_Encoded":
        """Returns the samples at these different positions, in increasing order."""
        if len(positions) == len(self.labels):
            return self
        index = torch.tensor(positions)
        return replace(
            self,
            encodings=self.encodings[index],
            labels=self.labels[index],
            ids=[self.ids[i] for i in positions],
            images=None if self.images is None else self.images[index],
        )


def _encode(
    model: MemoryWrapModel,
    samples: Samples,
    positions: Sequence[int] | None,
    store_images: bool,
    progress: bool,
    distributed: bool,
) -> _Encoded:
    """Encodes the samples at these positions, or all for `None`, in one pass."""
    if positions is None and samples.length is not None:
        positions = range(samples.length)
    share = positions
    if distributed:
        assert positions is not None
        share = positions[dist.get_rank() :: dist.get_world_size()]
    encodings, labels, images = list[Tensor](), list[Tensor](), list[Tensor]()
    for encoding, label, small in encoded_samples(model, samples, share, store_images, progress):
        encodings.append(encoding)
        labels.append(label)
        if small is not None:
            images.append(small)
    if not labels:
        raise ValueError("The data is empty, so there is nothing to remember. Check its path and split.")
    count = sum(map(len, labels)) if positions is None else len(positions)
    parts = [torch.cat(encodings), torch.cat(labels), *([torch.cat(images)] if store_images else [])]
    if distributed:
        device = next(model.parameters()).device
        parts = [_gather(part, count, device) for part in parts]
    ids = samples.ids(range(count) if positions is None else positions)
    return _Encoded(parts[0], parts[1], ids, parts[2] if store_images else None)


def encoded_samples(
    model: MemoryWrapModel, samples: Samples, positions: Sequence[int] | None, store_images: bool, progress: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Encodes the samples at these positions, or all for `None`, in evaluation mode and without gradients.

    Yields:
        Encodings `[B, E]` in float32, labels, and small images if they are to be stored, on the CPU.
    """
    parameter, first = next(model.parameters()), True
    total = None if positions is None else len(positions)
    with tqdm(total=total, desc="Memory bank", unit="img", disable=not progress) as bar:
        for image, label in samples.batches(positions):
            features = model.backbone.forward_features(image.to(parameter))
            if first:
                _check_encoder(model, features)
                _check_kind(model, label)
                first = False
            small = small_images(image, model) if store_images else None
            yield model.encode_features(features).float().cpu(), label.cpu(), small
            bar.update(len(label))


def _check_encoder(model: MemoryWrapModel, features: Tensor) -> None:
    """Raises if the backbone's logits are not those of its classifier on its pre-logits, as the memory takes them."""
    if not model.keeps_classifier or model.encodes_logits:
        return
    expected = model.backbone.forward_head(features).float()
    found = model.own_classifier(model.encode_features(features)).float()
    if found.shape != expected.shape or (found - expected).abs().max() > _TOLERANCE * expected.abs().max():
        raise ValueError(
            f"The logits of {type(model.backbone).__name__} are not those of its classifier on its pre-logits, so they "
            f"cannot be read through a memory. Make forward_head(x) and get_classifier() agree, or pass "
            f"read_head='linear' to train a head."
        )


def check_distributed(samples: Samples) -> None:
    """Raises a `ValueError` if the samples cannot be shared out over processes."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("distributed=True, but torch.distributed has no process group. Start with torchrun.")
    if samples.length is None or samples.length < dist.get_world_size():
        raise ValueError(
            f"distributed=True divides the samples over {dist.get_world_size()} processes, but the data has "
            f"{samples.length} that can be read in any order. Pass a data set with random access and enough samples."
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
