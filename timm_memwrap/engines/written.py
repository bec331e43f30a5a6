"""The memories that are in a Milvus: one for each set of weights, written whole and found when complete.

Shapes: N samples, E width of an encoding, D of a key.
"""

import hashlib
import itertools
import json
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timm_memwrap.attention import wide
from timm_memwrap.bank_format import is_finite
from timm_memwrap.engines.milvus import Milvus
from timm_memwrap.engines.samples import Contents, Row, make_rows, text_of
from timm_memwrap.fingerprint import WatchedFingerprint
from timm_memwrap.meaning import Meaning
from timm_memwrap.memory_bank import MemoryBank, SampleId
from timm_memwrap.sample_ids import SampleIds, short_name

__all__ = ["Collections", "check_labels", "keys_of", "metric_of"]

_logger = logging.getLogger(__name__)

# Of what is written; another one has another collection.
_FORMAT = 1
# Samples written at a time.
_BATCH = 1024


class Collections:
    """The memories of a name that are in a Milvus, by the weights that encoded them.

    Args:
        milvus: Where they are.
        name: What names of collections begin with.
        index: `"flat"` or `"hnsw"`, for what is written.
    """

    def __init__(self, milvus: Milvus, name: str, index: str) -> None:
        self.milvus, self.name, self.index = milvus, name, index
        self.place = milvus.name
        self._head_fingerprint = WatchedFingerprint()

    def name_of(self, model: Any) -> str:
        """Returns the name of the memory of the model's weights: what its keys are made with, and nothing else."""
        args = {name: model.memory_args[name] for name in ("read_head", "distance")}
        meaning = [_FORMAT, model.encoder_fingerprint(), self._head_fingerprint.of(model.head.head), args]
        digest = hashlib.sha256(json.dumps([*meaning, model.encoding_size], sort_keys=True).encode()).hexdigest()
        return f"{self.name}_{digest[:32]}"

    @property
    def _notes(self) -> str:
        return f"{self.name}_memories"

    def inventory(self) -> str:
        """Says what there is."""
        found = []
        for name in self.milvus.notes(self._notes):
            if (contents := self.find(name)) is not None:
                found.append(contents.described)
        if not found:
            return "It holds none of other weights either."
        return f"Of other weights it holds {len(found)}: {'; '.join(found[:5])}."

    def find(self, name: str) -> Contents | None:
        """Returns what there is of a name, or `None`."""
        text = self.milvus.read_note(self._notes, name)
        contents = None if text is None else Contents.from_json(text)
        if contents is None or contents.collection not in self.milvus.collections():
            return None
        return contents

    def note(self, name: str, contents: Contents) -> None:
        """Keeps what a collection holds."""
        self.milvus.write_note(self._notes, name, contents.to_json())

    def meaning_of(self, bank: MemoryBank) -> Meaning:
        """Returns the meaning of a bank without ids, and without paths where it leaves this machine."""
        provenance = bank.provenance
        if self.milvus.remote:
            provenance = replace(provenance, dataset=short_name(provenance.dataset))
        return Meaning(SampleIds(), bank.class_names, provenance, bank.reference)

    def write(self, model: Any, bank: MemoryBank) -> Contents:
        """Writes a bank, and returns what is there then."""
        encodings, labels = bank.filled()
        dtype, shape = encodings.dtype, () if bank.images is None else tuple(bank.images.shape[1:])
        contents = self.begin(model, dtype, encodings.shape[1], shape)
        ids = bank.ids
        with tqdm(total=len(bank), desc="Milvus", unit="img") as bar:
            for start in range(0, len(bank), _BATCH):
                part = slice(start, start + _BATCH)
                images = None if bank.images is None else bank.images[part]
                places = range(start, start + len(labels[part]))
                rows = self.rows(model, contents, encodings[part], labels[part], ids[part], images, places)
                contents = self.insert(contents, rows)
                bar.update(len(labels[part]))
        return self.complete(model, contents, self.meaning_of(bank))

    def begin(self, model: Any, dtype: torch.dtype, width: int, image_shape: tuple[int, ...]) -> Contents:
        """Makes a collection that nobody finds until it is complete; what was never completed is dropped."""
        name = self.name_of(model)
        there = self.find(name)
        for unfinished in self.milvus.collections():
            if unfinished.startswith(f"{name}_") and (there is None or unfinished != there.collection):
                _logger.info("Dropping %s, which was never completed.", unfinished)
                self.milvus.drop(unfinished)
        collection = f"{name}_{secrets.token_hex(4)}"
        keys = keys_of(model, torch.zeros(1, width))
        self.milvus.create(collection, keys.shape[1], metric_of(model.head), self.index)
        return Contents(collection, "", str(dtype).removeprefix("torch."), width, image_shape, self.index)

    def insert(self, contents: Contents, rows: list[Row]) -> Contents:
        """Adds rows to a collection that is not complete yet, and returns what it holds."""
        self.milvus.upsert(contents.collection, rows)
        return contents.changed(added=rows)

    def rows(
        self,
        model: Any,
        contents: Contents,
        encodings: Tensor,
        labels: Tensor,
        ids: Sequence[SampleId],
        images: Tensor | None,
        places: Iterable[int],
    ) -> list[Row]:
        """Returns samples as the rows of a collection.

        Args:
            model: The model that encoded them.
            contents: What the collection holds.
            encodings: Encodings `[N, E]`, finite.
            labels: Class indices `[N]`.
            ids: Their ids, which no other sample has.
            images: Their small images, as in the bank.
            places: Where they stand in the memory; of equal samples, the first counts.
        """
        check_labels(labels)
        if not is_finite(encodings):
            raise ValueError("Encodings have NaN or infinite entries. Check the images and the model's weights.")
        stored = encodings.to(getattr(torch, contents.dtype))
        return make_rows(stored, labels, ids, images, places, keys_of(model, stored))

    def complete(self, model: Any, contents: Contents, meaning: Meaning) -> Contents:
        """Makes a collection that is complete the memory of the model's weights, in the place of another."""
        name, contents = self.name_of(model), replace(contents, meaning=text_of(meaning))
        self.milvus.flush(contents.collection)
        self.milvus.load(contents.collection)
        if (count := self.milvus.count(contents.collection)) != contents.size:
            raise ValueError(
                f"{self.milvus.name} holds {count:,} of {contents.size:,} samples that were written: ids come more "
                f"than once, or another process writes the same memory. Write it from one."
            )
        there = self.find(name)
        self.note(name, contents)
        if there is not None:
            self.milvus.drop(there.collection)
        return contents

    def contents_of(self, bank: MemoryBank) -> Contents:
        """Returns what a collection holds that holds a bank."""
        encodings, labels = bank.filled()
        shape = () if bank.images is None else tuple(bank.images.shape[1:])
        text = text_of(self.meaning_of(bank))
        dtype = str(encodings.dtype).removeprefix("torch.")
        contents, ids = Contents("", text, dtype, encodings.shape[1], shape, self.index), bank.ids
        for start in range(0, len(bank), _BATCH):
            part = slice(start, start + _BATCH)
            contents = contents.changed(
                added=make_rows(encodings[part], labels[part], ids[part], None, itertools.count())
            )
        return contents


def keys_of(model: Any, encodings: Tensor) -> Tensor:
    """Returns what a model compares, of its encodings `[N, E]`, `[N, D]`: keys and queries alike."""
    parameter = next(model.backbone.parameters())
    with torch.no_grad():
        return model.head.query(encodings.to(parameter.device, wide(parameter).dtype))


def metric_of(head: Any) -> str:
    """Returns what Milvus calls the distance of a head."""
    return "L2" if head.distance == "l2" else "IP"


def check_labels(labels: Tensor) -> None:
    """Raises a `ValueError` if samples may have several classes."""
    if labels.ndim != 1:
        raise ValueError(
            f"labels have shape {list(labels.shape)}: samples of several classes. Milvus holds one class for each "
            f"sample. Keep such a memory in the bank: model.use_index(None)."
        )
