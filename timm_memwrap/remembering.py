"""Teaches a memory by showing, and makes it forget by telling: single samples and whole classes, without training."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timm_memwrap._utils import evaluating, printable
from timm_memwrap.added_classes import check_can_add, learn_classes
from timm_memwrap.data import BATCH_SIZE, class_names, known_class_names, one_by_one, small_images, to_batch
from timm_memwrap.engines import changes
from timm_memwrap.memory_bank import MemoryBank, SampleId
from timm_memwrap.memory_checks import check_memory, check_single_label
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.sample_ids import short_name

__all__ = ["forget", "relabel", "remember"]

_logger = logging.getLogger(__name__)


def remember(
    model: MemoryWrapModel,
    images: Any,
    labels: Any,
    ids: Sequence[SampleId] | None = None,
    progress: bool = True,
) -> MemoryBank:
    """Adds images to the memory of a model, which predicts with them from then on, and returns its bank.

    A label that is a new name adds a class: the model gets one more output, and the bank its name. A model that keeps
    its classifier gets a row of weights for it, computed from the encodings in the memory without training, and again
    whenever samples of it come or go through this function and `forget`. What the classifier knows of other classes
    does not change, and neither do other samples. A memory in Milvus gets them too; where it has no bank beside it, a
    class cannot be added.

    Args:
        model: A model with a memory.
        images: What is to be remembered, as `explain` takes it: model inputs `[N, C, H, W]`, PIL images or paths.
        labels: A class index or a class name for each image, or one for all of them. Where samples may have several
            classes, a list of them for each image, or multi-hot `[N, C]`; a class cannot then be added.
        ids: What names each sample; `None` for the file names of paths, with the folder that is the class, and else for
            "remembered-1" and so on.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the bank is empty or stale, an id is in it already, a label is neither a class of the model nor a
            name, or a class cannot be added to the model. Nothing is then changed.

    Example:
        ```python
        >>> import timm, timm_memwrap, torch
        >>> model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=2))
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 2)
        >>> names = ["cat", "dog"]
        >>> bank = timm_memwrap.build_memory_bank(model, data, class_names=names, progress=False)
        >>> model.remember(torch.randn(3, 3, 64, 64), "zebra")
        MemoryBank(11 samples of 3 classes, encodings [11, 96], no images, herding from TensorDataset)
        >>> model.num_classes, bank.class_names
        (3, ['cat', 'dog', 'zebra'])

        ```
    """
    check_memory(model, stale="refuse", rehash=True, whole=False)
    several = one_by_one(images)
    if not several:
        raise ValueError("No images to remember: the list is empty. Pass at least one.")
    bank, engine = _seen_bank(model), model.engine
    if bank.multi_label:
        targets, names = _multi_hot_targets(model, labels, len(several)), class_names(model)
    else:
        targets, names = _targets(model, labels, len(several))
    if len(names) > model.num_classes:
        check_can_add(model, names[model.num_classes])
        if engine is not None:
            engine.check_whole(model.memory_bank)
    chosen = list(ids) if ids is not None else _default_ids(bank, several, targets, names)
    parts, pictures = list[Tensor](), list[Tensor]()
    with evaluating(model), tqdm(total=len(several), desc="Remember", unit="img", disable=not progress) as bar:
        for start in range(0, len(several), BATCH_SIZE):
            batch = to_batch(model, several[start : start + BATCH_SIZE])
            parts.append(model.encode(batch).float())
            if bank.images is not None:
                pictures.append(small_images(batch.cpu(), model, bank.images.shape[-2:]))
            bar.update(len(batch))
    encodings, there = bank.filled()
    new = (torch.cat(parts).to(encodings), targets.to(there))
    stored = torch.cat(pictures) if pictures else None
    given = (*new, chosen, stored, names if known_class_names(model) else None)
    # First, so that nothing is changed if something does not fit; and the classifier before the bank, so that who reads
    # meanwhile finds no label without a class.
    bank.check_append(*given)
    added_classes = bank.provenance.added_classes + len(names) - model.num_classes
    if engine is not None and not added_classes:
        changes.add(engine, model, *new, chosen, stored)
    if bank is not model.memory_bank:
        return model.memory_bank
    _tell_of_new(names, model.num_classes)
    if added_classes:
        learn_classes(model, len(names), added_classes, torch.cat([encodings, new[0]]), torch.cat([there, new[1]]))
    bank.append(*given)
    if added_classes:
        bank.set_provenance(added_classes=added_classes, encoder=model.encoder_fingerprint())
    return bank


def forget(
    model: MemoryWrapModel,
    ids: SampleId | Iterable[SampleId] = (),
    classes: int | str | Iterable[int | str] = (),
) -> MemoryBank:
    """Removes samples from the memory of a model, which predicts without them from then on, and returns its bank.

    Warns of classes of which no sample is left. A class that `remember` added goes with its last sample; one that the
    model was trained on stays, and may still be predicted.

    Args:
        model: A model with a memory bank.
        ids: Ids of samples to forget.
        classes: Classes to forget all samples of, by index or name.

    Raises:
        ValueError: If an id or a class is not in the memory, or nothing would be left. Nothing is then changed.
    """
    check_memory(model, stale="refuse", rehash=True, whole=False)
    bank, engine, names = model.memory_bank, model.engine, class_names(model)
    wanted = [ids] if isinstance(ids, str | int) else list(ids)
    whole = [_class_index(each, names) for each in ([classes] if isinstance(classes, str | int) else classes)]
    if whole:
        check_single_label(model, "forget(classes=...)")
    counts = engine.open(model).class_counts if engine is not None else bank.class_counts
    missing = [names[label] for label in whole if label not in counts]
    if missing:
        raise ValueError(f"The memory has no sample of {missing[0]!r}, so there is none to forget.")
    if not wanted and not whole:
        raise ValueError("Nothing to forget: pass the ids of samples, or classes.")
    if engine is not None and not _seen_bank(model).provenance.added_classes:
        changes.remove(engine, model, wanted, whole)
    if not len(bank):
        return bank
    if whole:
        # Once each: an id may be of a class that goes too.
        of_classes = torch.isin(bank.filled()[1], torch.tensor(whole, device=bank.filled()[1].device))
        wanted += [sample_id for sample_id, gone in zip(bank.ids, of_classes.tolist(), strict=True) if gone]
    bank.remove(dict.fromkeys(wanted))
    _learn_again(model)
    return bank


def relabel(model: MemoryWrapModel, labels: Mapping[SampleId, int | str]) -> MemoryBank:
    """Corrects the labels of samples in the memory of a model, and returns its bank.

    Args:
        model: A model with a memory bank.
        labels: The class of each of these samples, an index or a name that the model has, by id.

    Raises:
        ValueError: If an id is not in the memory, or a label is not a class of the model. Nothing is then changed.
    """
    check_memory(model, stale="refuse", rehash=True, whole=False)
    check_single_label(model, "relabel")
    names = class_names(model)
    indices = {sample_id: _class_index(label, names) for sample_id, label in labels.items()}
    if model.engine is not None and not _seen_bank(model).provenance.added_classes:
        changes.relabel(model.engine, model, indices)
    if len(model.memory_bank):
        model.memory_bank.relabel(indices)
        _learn_again(model)
    return model.memory_bank


def _seen_bank(model: MemoryWrapModel) -> MemoryBank:
    """Returns the bank of a model, or one sample that stands for all that are in an engine: for their kind and classes.

    Raises:
        ValueError: If the classifier knows of classes by their samples, which all would be needed.
    """
    if model.engine is None or len(model.memory_bank):
        return model.memory_bank
    bank = model.engine.spread(model, 1)
    if bank.provenance.added_classes:
        model.engine.check_whole(model.memory_bank)
    return bank


def _targets(model: MemoryWrapModel, labels: Any, count: int) -> tuple[Tensor, list[str]]:
    """Returns class indices `[N]` of so many images, and the names of the model's classes with those that are new."""
    names, named = class_names(model), bool(known_class_names(model))
    single = isinstance(labels, str) or not isinstance(labels, Iterable)
    given = [labels] if single else labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(given) not in (1, count):
        raise ValueError(f"{len(given)} labels for {count} images. Pass one for each, or one for all.")
    targets = []
    for label in given:
        if isinstance(label, str) and label.strip() and label not in names:
            if not named:
                raise ValueError(
                    f"{label!r} cannot be told from the classes of the model, which have no names. Name them first: "
                    f"model.memory_bank.set_class_names(names)."
                )
            names.append(label)
        targets.append(_class_index(label, names))
    return torch.tensor(targets).expand(count), names


def _multi_hot_targets(model: MemoryWrapModel, labels: Any, count: int) -> Tensor:
    """Returns multi-hot labels `[N, C]` of so many images."""
    names, width = class_names(model), _seen_bank(model).filled()[1].shape[1]
    if not isinstance(labels, Tensor):
        several = [[label] if isinstance(label, str | Integral) else label for label in labels]
        positions = [[_class_index(label, names) for label in each] for each in several]
        labels = torch.tensor([[int(i in each) for i in range(width)] for each in positions]).reshape(-1, width)
    if labels.shape != (count, width):
        raise ValueError(
            f"labels have shape {list(labels.shape)}; expected [{count}, {width}] of 0 and 1, or a list of the classes "
            f"of each image, since a sample of this memory may have several."
        )
    return labels


def _class_index(label: Any, names: Sequence[str]) -> int:
    """Returns the index of a class that is given by index or name."""
    if isinstance(label, str) and names.count(label) == 1:
        return names.index(label)
    if isinstance(label, Integral) and not isinstance(label, bool) and 0 <= int(label) < len(names):
        return int(label)
    raise ValueError(
        f"{label!r} is neither the name of one of the {len(names)} classes nor its index, 0 to {len(names) - 1}: "
        f"{', '.join(map(repr, names[:10]))}{' ...' if len(names) > 10 else ''}."
    )


def _tell_of_new(names: Sequence[str], first: int) -> None:
    """Logs the classes from `first` on, and which of the others a name may be a misspelling of."""
    for name in names[first:]:
        near = get_close_matches(name, names[:first], n=1)
        _logger.info("New class: %s%s", printable(name), printable(f" (there is also {near[0]})") if near else "")


def _default_ids(bank: MemoryBank, images: Sequence[Any], targets: Tensor, names: Sequence[str]) -> list[SampleId]:
    """Names images by their files, as the data sets do, or numbers them."""
    number, ids = bank.provenance.appended, list[SampleId]()
    for image, target in zip(images, targets, strict=True):
        if isinstance(image, str | os.PathLike):
            ids.append(short_name(os.fspath(image), "" if target.ndim else names[int(target)]))
            continue
        number += 1
        while f"remembered-{number}" in bank:
            number += 1
        ids.append(f"remembered-{number}")
    return ids


def _learn_again(model: MemoryWrapModel) -> None:
    """Computes what a model knows of the classes that were added; one of which no sample is left goes again."""
    bank = model.memory_bank
    if not (added_classes := bank.provenance.added_classes):
        return
    names, (encodings, labels) = bank.class_names, bank.filled()
    first = model.num_classes - added_classes
    kept = [label for label in range(model.num_classes) if label < first or label in bank.class_counts]
    if len(kept) < model.num_classes:
        new_labels = {label: position for position, label in enumerate(kept)}
        bank.relabel(dict(zip(bank.ids, (new_labels[label] for label in labels.tolist()), strict=True)))
        bank.set_class_names([names[label] for label in kept])
        encodings, labels = bank.filled()
    learn_classes(model, len(kept), len(kept) - first, encodings, labels)
    bank.set_provenance(added_classes=len(kept) - first, encoder=model.encoder_fingerprint())
