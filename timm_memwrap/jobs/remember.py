"""Saved models that are taught and made to forget: loaded, changed, and saved as a whole."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from timm_memwrap.data import image_mode, open_source
from timm_memwrap.hub import from_pretrained, save_pretrained
from timm_memwrap.jobs.explain import find_images
from timm_memwrap.jobs.inference import Inference
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.remembering import forget, relabel, remember
from timm_memwrap.training.processes import find_device

__all__ = ["editing", "forget_samples", "remember_folder"]


@contextmanager
def editing(source: str, out: str | os.PathLike | None, device: str | None = None) -> Iterator[MemoryWrapModel]:
    """Yields a saved model, and saves it at the end: to `out`, or in its place if it is a folder.

    Raises:
        ValueError: If it is a repository on the Hub, and there is no `out`.
    """
    if out is None and not os.path.isdir(source):
        raise ValueError(f"{source!r} is not a directory that the changed model could be saved to. Pass --out FOLDER.")
    model = from_pretrained(source).to(find_device(device))
    yield model
    save_pretrained(model.cpu(), source if out is None else out)


def remember_folder(
    model: MemoryWrapModel,
    folder: str | os.PathLike,
    label: str | None = None,
    unreadable: str = "fail",
    progress: bool = True,
) -> dict[str, int]:
    """Adds the images in a folder to the memory of a model, and returns how many by the name of their class.

    Args:
        model: The model.
        folder: An image folder, in which a folder stands for each class; names that the model does not know are new
            classes.
        label: Name of the class of all images, wherever they are in the folder.
        unreadable: As in `Inference`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there are no images, or as `remember` does.
    """
    paths: Sequence[Path]
    if label is not None:
        found = find_images([folder], unreadable)
        paths, ids, labels = [path for path, _ in found], [name for _, name in found], [label] * len(found)
    else:
        inference = Inference(unreadable=unreadable)  # type: ignore[arg-type]
        images = inference.readable(open_source(_directory(folder), "", None, image_mode(model.in_chans)), progress)
        ids = [images.filename(i) for i in range(len(images))]
        paths, labels = [Path(folder) / name for name in ids], [images.classes[target] for target in images.targets]
    remember(model, paths, labels, ids, progress)
    return dict(Counter(labels))


def forget_samples(
    model: MemoryWrapModel,
    ids: Iterable[SampleId],
    classes: Sequence[str] = (),
    relabels: dict[SampleId, str] | None = None,
) -> None:
    """Corrects and removes samples of a model, of which a command knows ids and classes as text alone."""
    if relabels:
        relabel(model, relabels)
    wanted = [_as_in_bank(model, each) for each in ids]
    if wanted or classes or not relabels:
        forget(model, wanted, classes)


def _as_in_bank(model: MemoryWrapModel, sample_id: SampleId) -> SampleId:
    """Returns an id as the bank has it: as it is, or the number that its text stands for."""
    if sample_id in model.memory_bank or not isinstance(sample_id, str) or not sample_id.isdecimal():
        return sample_id
    return int(sample_id)


def _directory(folder: str | os.PathLike) -> Path:
    if not os.path.isdir(folder):
        raise ValueError(f"{os.fspath(folder)!r} is not a directory. Pass a folder of images.")
    return Path(folder)
