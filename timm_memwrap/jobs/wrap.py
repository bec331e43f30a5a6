"""Gives a trained classifier a memory in one pass over its training images, with nothing to train."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import create_transform
from torch.utils.data import DataLoader

from timm_memwrap.building import build_memory_bank
from timm_memwrap.data import Images, data_config, image_mode, known_class_names, open_source
from timm_memwrap.explaining import ExplanationMetrics, MultiLabelMetrics, evaluate_explanations
from timm_memwrap.explaining import calibrate as calibrate_model
from timm_memwrap.hub import FileError, save_pretrained
from timm_memwrap.jobs.inference import Inference
from timm_memwrap.memory_args import MULTI_LABEL_READ_HEAD
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.creation import check_safetensors, source_of
from timm_memwrap.training.evaluation import evaluate
from timm_memwrap.training.processes import Processes
from timm_memwrap.wrapping import wrap

__all__ = ["WrapReport", "wrap_classifier"]


@dataclass(frozen=True)
class WrapReport:
    """The result of wrapping a classifier; what is measured is `None` without data to evaluate with."""

    directory: Path  # with the model and its memory
    model: MemoryWrapModel
    plain_accuracy: float | None  # of the classifier before, 0 to 1; `None` if it was a Memory Wrap model already
    metrics: ExplanationMetrics | MultiLabelMetrics | None  # of the model and its explanations


def wrap_classifier(
    model_id: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    checkpoint: str | None = None,
    split: str = "train",
    val_split: str | None = None,
    calibrate: bool = True,
    size: int | None = 1000,
    selection: str = "herding",
    store_images: bool = False,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> WrapReport:
    """Gives a trained classifier a memory of training samples, through which it predicts from then on.

    A plain timm model keeps its weights and is read through its own classifier (`timm_memwrap.wrap`). The memory of a
    model that has one already is built again.

    Args:
        model_id: What `timm.create_model` takes: an architecture with its tag, `"hf-hub:..."`, `"local-dir:..."`; or a
            folder.
        data: The training images: an image folder, a tar or CSV file, `"digits"`, or a data set that timm can read.
        out: Folder for the model with its memory.
        checkpoint: A safetensors file with weights for the architecture `model_id`, instead of pretrained ones.
        split: Split of `data` to remember.
        val_split: Split to evaluate with; `None` for none.
        calibrate: Whether to call `calibrate` with `val_split`, if it is given; no predicted class changes.
        size: Number of samples to remember; `None` for all.
        selection: As in `build_memory_bank`.
        store_images: As in `build_memory_bank`.
        seed: As in `build_memory_bank`.
        progress: Whether to show progress bars.
        **options: As of Inference.

    Raises:
        ValueError: If there is no such model or data, or their classes differ.
        OSError: If the model cannot be downloaded.
    """
    inference = Inference(**options)
    device = inference.find_device()
    model = _load(model_id, checkpoint, data, split)
    mode = image_mode(getattr(model, "in_chans", 3))
    has_memory = isinstance(model, MemoryWrapModel)
    images = inference.readable(open_source(data, split, known_class_names(model) or None, mode), progress)
    if model.num_classes != len(images.classes):
        raise ValueError(
            f"{model_id} has {model.num_classes} classes, {images.name} has {len(images.classes)}. Pass the data that "
            f"the model was trained on, or fine-tune it on these: timm-memwrap train."
        )
    held_out = None
    if val_split is not None:
        held_out = inference.readable(open_source(data, val_split, images.classes, mode), progress)

    model.to(device).eval()
    transform = create_transform(**data_config(model))

    def batches(part: Images) -> DataLoader:
        return inference.batches(part.with_transform(transform))

    unseen = batches(held_out) if held_out is not None else None
    plain_accuracy = None
    if not has_memory:
        if unseen:
            plain_accuracy = evaluate(model, unseen, Processes(device), images.multi_label)["accuracy"]
        model = wrap(model, read_head=MULTI_LABEL_READ_HEAD if images.multi_label else None)
    build_memory_bank(
        model,
        batches(images),
        size=size,
        selection=selection,
        store_images=store_images,
        seed=seed,
        progress=progress,
        dataset_name=images.name,
    )
    if unseen and calibrate:
        calibrate_model(model, unseen, progress)
    metrics = evaluate_explanations(model, unseen, progress=progress) if unseen else None
    card: dict[str, Any] = {}
    if metrics is not None:
        card["results"] = results = metrics.to_results(images.name, val_split)
        if plain_accuracy is not None:
            results.append({**results[0], "metric": "accuracy of the plain classifier", "value": plain_accuracy})
    save_pretrained(model.cpu(), out, model_card=card, overwrite_card=True)
    return WrapReport(Path(out), model, plain_accuracy, metrics)


def _load(model_id: str, checkpoint: str | None, data: Any, split: str) -> Any:
    if checkpoint is None:
        return timm.create_model(source_of(model_id) or model_id, pretrained=True)
    check_safetensors("checkpoint", checkpoint)
    model = timm.create_model(model_id, num_classes=len(open_source(data, split).classes))
    try:
        timm.models.load_checkpoint(model, checkpoint)
    except (RuntimeError, FileNotFoundError) as error:
        raise FileError(
            f"{checkpoint!r} does not fit {model_id} with {model.num_classes} classes: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return model
