"""Fills a memory in Milvus from a data set or loader, batch by batch: no process ever holds all of it.

Shapes: B samples of a batch.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from timm_memwrap._utils import check_choice, evaluating
from timm_memwrap.bank_format import DTYPES
from timm_memwrap.building import check_distributed, encoded_samples
from timm_memwrap.data import Samples
from timm_memwrap.engines.memory import MilvusMemory
from timm_memwrap.engines.samples import Contents
from timm_memwrap.meaning import Meaning, Provenance
from timm_memwrap.memory_checks import check_model, warn_of_new_classifier
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.sample_ids import SampleId, SampleIds, public_ids, short_name

__all__ = ["stream_memory"]


def stream_memory(
    model: MemoryWrapModel,
    data: Dataset | Iterable,
    uri: str,
    token: str | None = None,
    collection: str = "memwrap",
    index: str = "flat",
    store_images: bool = False,
    progress: bool = True,
    class_names: Sequence[str] | None = None,
    dataset_name: str | None = None,
    distributed: bool = False,
    dtype: torch.dtype = torch.float32,
    timeout: float = 10.0,
) -> MilvusMemory:
    """Encodes all samples of `data` in one pass into a collection of Milvus, which the model reads from then on.

    Nobody finds the collection before it is complete, when it takes the place of another of the same weights and name.
    An interrupted call leaves what was there, and the next one removes what it wrote. One at a time may write a memory
    of the same weights and name.

    Args:
        model: The model that is to read the memory, with the weights that it is to be used with, and an empty bank.
        data: As in `build_memory_bank`, with a class index for each image.
        uri: As in `MilvusMemory`, and so are `token`, `collection`, `index` and `timeout`.
        token: See `uri`.
        collection: See `uri`.
        index: See `uri`.
        store_images: Whether to keep small uint8 images, at most 64 pixels a side, in Milvus.
        progress: Whether to show a progress bar.
        class_names: Names of the classes by label; `None` for those of the data set.
        dataset_name: Name of the data set; `None` for the name of its class.
        distributed: Whether all processes of `torch.distributed`'s default group make this call together, with the uri
            of a server. Each then encodes and writes its share.
        dtype: What the encodings are stored in, as in `MemoryBank.store_as`.
        timeout: See `uri`.

    Returns:
        The memory, which is `model.engine`.

    Raises:
        ValueError: If the bank is not empty, the data is empty, a label does not fit, an id comes twice, or an argument
            does not fit.
        ConnectionError: If Milvus cannot be reached.
        TimeoutError: If it does not answer.
    """
    check_model(model)
    warn_of_new_classifier(model)
    check_choice("dtype", dtype, DTYPES)
    if len(model.memory_bank):
        raise ValueError(
            f"The model has {model.memory_bank!r}, which it would go on reading. Call model.memory_bank.clear() first, "
            f"or write it to Milvus: model.use_index('milvus', uri=...)."
        )
    samples, memory = Samples(data, model, class_names), MilvusMemory(uri, token, collection, index, timeout=timeout)
    share, rank = None if samples.length is None else range(samples.length), 0
    if distributed:
        check_distributed(samples)
        if not memory.remote:
            raise ValueError(f"distributed=True needs a server, which all processes reach, and not uri={uri!r}.")
        rank = dist.get_rank()
        assert share is not None
        share = share[rank :: dist.get_world_size()]
    places, ids = itertools.count() if share is None else iter(share), _ids(samples, share, memory.remote)
    contents: Contents | None = None
    pending: Future[Contents] | None = None
    with evaluating(model), ThreadPoolExecutor(1) as thread:
        for encodings, labels, images in encoded_samples(model, samples, share, store_images, progress):
            if contents is None:
                shape = () if images is None else tuple(images.shape[1:])
                contents = _begin(memory, model, dtype, encodings.shape[1], shape, distributed)
            if pending is not None:
                contents = pending.result()
            named = list(itertools.islice(ids, len(labels))) if ids is not None else None
            at = list(itertools.islice(places, len(labels)))
            # What is written while the next batch is encoded.
            pending = thread.submit(
                _write, memory, model, contents, encodings, labels, at if named is None else named, images, at
            )
        if contents is None or pending is None:
            raise ValueError("The data is empty, so there is nothing to remember. Check its path and split.")
        contents = pending.result()
        if distributed:
            contents = _joined(contents)
        provenance = Provenance(
            dataset=short_name(samples.name if dataset_name is None else dataset_name),
            selection="all",
            population=contents.size,
            encoder=model.encoder_fingerprint(rehash=True),
        )
        if rank == 0:
            memory.collections.complete(model, contents, Meaning(SampleIds(), samples.class_names, provenance))
        if distributed:
            dist.barrier()
    memory.open(model)
    model.engine = memory
    return memory


def _ids(samples: Samples, share: Sequence[int] | None, remote: bool) -> Iterator[SampleId] | None:
    """Returns the ids of a share of the samples, or `None` for a stream, whose samples are numbered."""
    if share is None:
        return None
    ids = samples.ids(share)
    if remote:
        labels, known = samples.labels, dict(enumerate(samples.class_names))
        classes = [""] * len(ids) if labels is None else [known.get(i, "") for i in labels[list(share)].tolist()]
        ids = public_ids(ids, classes)
    return iter(ids)


def _begin(
    memory: MilvusMemory,
    model: MemoryWrapModel,
    dtype: torch.dtype,
    width: int,
    image_shape: tuple[int, ...],
    distributed: bool,
) -> Contents:
    """Makes the collection, once for all processes."""
    if not distributed:
        return memory.collections.begin(model, dtype, width, image_shape)
    made: list[Contents | None] = [None]
    if dist.get_rank() == 0:
        made = [memory.collections.begin(model, dtype, width, image_shape)]
    dist.broadcast_object_list(made)
    assert made[0] is not None
    return made[0]


def _write(memory: MilvusMemory, model: MemoryWrapModel, contents: Contents, *samples: Any) -> Contents:
    """Adds samples, as `Collections.rows` takes them, and returns what the collection holds."""
    return memory.collections.insert(contents, memory.collections.rows(model, contents, *samples))


def _joined(contents: Contents) -> Contents:
    """Returns what all processes have written."""
    parts: list[Contents | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, contents)
    whole = replace(contents, class_counts={}, digest=0)
    for part in parts:
        assert part is not None
        whole = whole.joined(part)
    return whole
