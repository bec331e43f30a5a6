"""Image files explained: found, explained, written as a report, and described for a terminal."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from timm_memwrap._utils import printable
from timm_memwrap.data import SUFFIXES, ImageError, class_names, read_picture
from timm_memwrap.explaining.explanation import Explanation, MemorySample, explain
from timm_memwrap.explaining.figures.html import write_html
from timm_memwrap.explaining.heatmaps import attribute
from timm_memwrap.jobs.inference import Inference
from timm_memwrap.model import MemoryWrapModel

__all__ = ["describe", "explain_files", "find_images"]

_logger = logging.getLogger(__name__)


def find_images(paths: Sequence[str | os.PathLike], unreadable: str = "fail") -> list[tuple[Path, str]]:
    """Lists image files, and those in folders, each with a name to show that does not tell where the folder is.

    With `unreadable="skip"`, those that cannot be read are left out and logged.
    """
    found: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            inside = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
            if not inside:
                raise ValueError(f"{str(path)!r} holds no images. Expected files ending in {', '.join(SUFFIXES)}.")
            found += [(file, file.relative_to(path).as_posix()) for file in inside]
        elif path.is_file():
            found.append((path, path.name))
        else:
            raise ValueError(f"There is no {str(path)!r}. Pass image files, or folders of them.")
    if unreadable == "skip":
        found = [(path, name) for path, name in found if _is_readable(path)]
    if not found:
        raise ValueError("No images: the list is empty. Pass image files, or folders of them.")
    return found


def _is_readable(path: Path) -> bool:
    try:
        read_picture(path, "RGB", repr(path.name))
        return True
    except ImageError as error:
        _logger.warning("Left out: %s", printable(str(error)))
        return False


def explain_files(
    model: MemoryWrapModel,
    images: Sequence[tuple[Path, str]],
    top_k: int = 5,
    memory: Any = None,
    heatmaps: str | None = None,
    contenders: int = 3,
    correspondences: int = 0,
    abstain: float = 0.0,
    out: str | os.PathLike | None = None,
    progress: bool = True,
    inference: Inference = Inference(),  # noqa: B008  (frozen)
) -> list[Explanation]:
    """Explains what `find_images` found, and writes an HTML report to `out`, with heatmaps of a method of `attribute`.

    `memory` are the images that the memory was built from, for a model that holds none. The counts and `abstain` are as
    in `explain`.
    """
    paths, names = [path for path, _ in images], [name for _, name in images]
    if heatmaps is not None and (memory is None or out is None):
        raise ValueError(
            f"heatmaps={heatmaps!r} needs the images that the memory was built from, and a report to show them in: "
            f"pass --memory_data and --out too."
        )
    shown = tqdm(inference.inputs(model, paths), desc="Explaining", unit="batch", disable=not progress)
    explanations = [
        each
        for batch in shown
        for each in explain(model, batch, top_k, contenders, correspondences, dataset=memory, abstain=abstain)
    ]
    attributions = None
    if heatmaps is not None:
        attributions = attribute(
            model,
            paths,
            memory,
            heatmaps,
            explanations=explanations,
            batch_size=inference.batch_size,
            progress=progress,
        )
    if out is not None:
        write_html(model, paths, explanations, out, names=names, attributions=attributions, dataset=memory)
    return explanations


def describe(model: MemoryWrapModel, name: str, explanation: Explanation) -> str:
    """Returns an explanation as a short table, for a terminal; of several classes, a table for each."""
    lines = [
        f"{name}: {explanation.verdict}{'' if explanation.classes else f', {_alone(model, explanation)}'}",
        *(f"  but {doubt}" for doubt in explanation.doubts),
    ]
    for each in explanation.classes or [explanation]:
        if explanation.classes:
            lines.append(f"  {each.class_name} ({each.probability:.0%}), {_alone(model, each)}")
        lines += _evidence(model, each)
    if explanation.contenders:
        lines.append(
            f"  {'may be':16}  {'probability':>11}  {'alike':>6}  images that look most like it, with similarity"
        )
    for contender in explanation.contenders:
        near = ", ".join(f"{str(sample.id)[-28:]} {sample.similarity:.2f}" for sample in contender.samples)
        alike = "" if contender.similarity is None else f"{contender.similarity:.3f}"
        mark = "most alike: " if contender == explanation.most_alike else ""
        head = f"  {contender.class_name[:16]:16}  {contender.probability:11.1%}  {alike:>6}"
        lines.append(f"{head}  {mark}{near or 'none remembered'}")
    return "\n".join(map(printable, lines))


def _instead(
    model: MemoryWrapModel, explanation: Explanation, prediction: int | None, probability: float, nothing: str
) -> str:
    if prediction == explanation.prediction:
        return f"still {explanation.class_name} ({probability:.0%})"
    if model.multi_label:
        return f"no {explanation.class_name} ({probability:.0%})"
    return nothing if prediction is None else class_names(model)[prediction]


def _alone(model: MemoryWrapModel, explanation: Explanation) -> str:
    without, probability = explanation.prediction_without_memory, explanation.probability_without_memory
    return f"without its memory {_instead(model, explanation, without, probability, 'it could not tell')}"


def _evidence(model: MemoryWrapModel, explanation: Explanation) -> list[str]:
    def row(sample: MemorySample) -> str:
        sees = f"{'' if sample.is_example else '≠ '}{sample.predicted_class_name}"[:18]
        probability = explanation.probability - sample.influence
        left = _instead(model, explanation, sample.prediction_without, probability, "no class leads")
        return f"  {sample.weight:6.1%}  {str(sample.id)[-28:]:28}  {sample.class_name[:16]:16}  {sees:18}  {left}"

    lines = [
        f"  {'weight':>6}  {'id':28}  {'labelled':16}  {'model sees':18}  without it",
        *map(row, explanation.samples),
    ]
    rest = explanation.support_size - len(explanation.samples)
    if rest > 0:
        lines.append(f"  {max(0.0, 1 - sum(sample.weight for sample in explanation.samples)):6.1%}  {rest} more")
    if explanation.carried is not None:
        lines.append(f"  the samples carry {explanation.carried:.0%} of the plain classifier's margin")
    return lines
