"""Teaches a memory in Milvus: samples that are added, removed and relabelled, without all of them.

Shapes: N samples, E width of an encoding.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from timm_memwrap.engines.memory import ROW, MilvusMemory
from timm_memwrap.engines.samples import Contents, Row, row_key, to_tensors
from timm_memwrap.engines.written import keys_of
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.sample_ids import SampleIds, known_ids, no_sample, public_ids

__all__ = ["add", "describe", "relabel", "remove"]


def add(
    memory: MilvusMemory, model: Any, encodings: Tensor, labels: Tensor, ids: Sequence[SampleId], images: Tensor | None
) -> list[SampleId]:
    """Adds samples to the memory, and returns their ids: of paths, a server knows the names alone.

    Raises:
        ValueError: If an id is in the memory.
    """
    chosen = SampleIds(ids)[:]
    if memory.remote:
        names = dict(enumerate(memory.class_names(model)))
        chosen = public_ids(chosen, [names.get(label, "") for label in labels.tolist()])

    def plan(contents: Contents) -> tuple[Contents, Callable[[], None]]:
        known = _find(memory, contents, chosen, ["name"])
        if known:
            raise known_ids([json.loads(row["name"]) for row in known.values()])
        # Behind all that is there, whoever added it.
        places = itertools.count(time.time_ns())
        meaning = contents.read_meaning()
        provenance = replace(meaning.provenance, appended=meaning.provenance.appended + len(chosen))
        rows = memory.collections.rows(model, contents, encodings, labels, chosen, images, places)
        changed = contents.changed(added=rows, meaning=replace(meaning, provenance=provenance))
        return changed, lambda: memory.collections.milvus.upsert(contents.collection, rows)

    memory.change(model, plan)
    return chosen


def remove(memory: MilvusMemory, model: Any, ids: Iterable[SampleId] = (), labels: Sequence[int] = ()) -> None:
    """Removes the samples with these ids, and all with these labels.

    Raises:
        ValueError: If an id is not in the memory, or nothing would be left.
    """
    wanted = list(ids)

    def plan(contents: Contents) -> tuple[Contents, Callable[[], None]]:
        fields = ["label", "encoding"]
        rows = _find(memory, contents, wanted, fields)
        _check_found(wanted, rows, contents)
        where = f"label in {list(map(int, labels))}"
        for page in (
            memory.collections.milvus.pages(contents.collection, fields, contents.size, where) if labels else ()
        ):
            rows |= {row["id"]: row for row in page}
        if len(rows) >= contents.size:
            raise ValueError(f"Removing {len(rows):,} samples would leave the memory empty.")
        meaning = contents.read_meaning()
        provenance = replace(meaning.provenance, removed=meaning.provenance.removed + len(rows))
        changed = contents.changed(removed=rows.values(), meaning=replace(meaning, provenance=provenance))
        return changed, lambda: memory.collections.milvus.delete(contents.collection, list(rows))

    memory.change(model, plan)


def relabel(memory: MilvusMemory, model: Any, labels: Mapping[SampleId, int]) -> None:
    """Gives the samples with these ids other labels.

    Raises:
        ValueError: If an id is not in the memory.
    """

    def plan(contents: Contents) -> tuple[Contents, Callable[[], None]]:
        rows = _find(memory, contents, list(labels), [*ROW, "image"])
        _check_found(list(labels), rows, contents)
        new = [{**rows[row_key(sample_id)], "label": int(label)} for sample_id, label in labels.items()]
        keys = keys_of(model, to_tensors(contents, new)[0]).float().cpu().numpy()
        whole = [{**row, "key": key} for row, key in zip(new, keys, strict=True)]
        changed = contents.changed(added=new, removed=rows.values())
        return changed, lambda: memory.collections.milvus.upsert(contents.collection, whole)

    memory.change(model, plan)


def describe(memory: MilvusMemory, model: Any, **changed: Any) -> None:
    """Changes what of the memory is not in its samples: fields of a `Meaning`."""

    def plan(contents: Contents) -> tuple[Contents, Callable[[], None]]:
        return contents.changed(meaning=replace(contents.read_meaning(), **changed)), lambda: None

    memory.change(model, plan)


def _find(memory: MilvusMemory, contents: Contents, ids: Sequence[SampleId], fields: Sequence[str]) -> dict[str, Row]:
    if not ids:
        return {}
    rows = memory.collections.milvus.query(contents.collection, fields, [row_key(sample_id) for sample_id in ids])
    return {row["id"]: row for row in rows}


def _check_found(ids: Sequence[SampleId], rows: Mapping[str, Row], contents: Contents) -> None:
    unknown = [sample_id for sample_id in ids if row_key(sample_id) not in rows]
    if unknown:
        raise ValueError(no_sample(unknown, contents.size))
