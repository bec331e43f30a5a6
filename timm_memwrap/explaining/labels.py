"""Gives a data set the labels that a model's classes have, by their names."""

import logging
from collections import Counter
from typing import Any

from torch.utils.data import Dataset, Subset

from timm_memwrap.explaining.explanation import known_class_names
from timm_memwrap.model import MemoryWrapModel

__all__ = ["dataset_classes", "match_labels"]

_logger = logging.getLogger(__name__)


class _Relabelled(Dataset):
    """A dataset of `(image, label)` with other labels."""

    def __init__(self, dataset: Any, labels: list[int], classes: list[str]) -> None:
        self.dataset, self._labels, self.classes = dataset, labels, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index][:2]
        label = int(label)
        if not 0 <= label < len(self._labels):
            raise ValueError(
                f"Sample {index} has the label {label}; expected 0 to {len(self._labels) - 1}. Pass labelled data."
            )
        return image, self._labels[label]


def match_labels(model: MemoryWrapModel, dataset: Any) -> Any:
    """Gives a dataset the labels that the model's classes have: by name where both name them, else by number.

    An image folder numbers the classes that it holds. One that holds some of the model's, or that a model with another
    order of classes is to be judged on, would be judged wrongly by these numbers.

    Args:
        model: The model, whose memory bank or pretrained cfg names its classes.
        dataset: A dataset of `(image, label)`. Its `classes`, or what its reader knows, are its names.

    Returns:
        The dataset, or a view of it with other labels.

    Raises:
        ValueError: If a class of the data is not among the model's, a name is there twice, or the numbers of classes
            differ where only one side names them.
    """
    theirs, ours = dataset_classes(dataset), known_class_names(model)
    if theirs == ours or not theirs:
        return dataset
    # Positions for names are no names.
    if not ours or theirs == [str(i) for i in range(len(theirs))]:
        if len(theirs) != model.num_classes:
            raise ValueError(
                f"The data has {len(theirs)} classes and the model {model.num_classes}, and only one of them names its "
                f"classes, so they cannot be matched. Name the model's: model.memory_bank.set_class_names(names)."
            )
        if ours:
            _logger.warning(
                "The data numbers its classes and the model names them: labels are taken by number, so that %r is 0.",
                ours[0],
            )
        return dataset
    unknown = sorted(set(theirs) - set(ours))
    if unknown:
        raise ValueError(
            f"The data has classes that the model does not know: {', '.join(map(repr, unknown[:5]))}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}. It knows "
            f"{', '.join(map(repr, ours[:10]))}{f' and {len(ours) - 10} more' if len(ours) > 10 else ''}. Rename or "
            f"remove them in the data."
        )
    twice = sorted(name for name, count in Counter(ours).items() if count > 1 and name in theirs)
    if twice:
        raise ValueError(
            f"The model has {twice[0]!r} as the name of several classes, so labels cannot be matched by name. Give "
            f"each its own: model.memory_bank.set_class_names(names)."
        )
    return _Relabelled(dataset, [ours.index(name) for name in theirs], ours)


def dataset_classes(dataset: Any) -> list[str]:
    """Names a dataset's classes by label: as its `classes` do, else its reader; empty if they are unknown."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    reader = getattr(dataset, "reader", None)
    by_name = getattr(reader, "class_to_idx", None) or {}
    by_index = {int(i): str(name) for name, i in by_name.items()}
    names = getattr(dataset, "classes", None) or [by_index.get(i, "") for i in range(max(by_index, default=-1) + 1)]
    return [str(name) for name in names]
