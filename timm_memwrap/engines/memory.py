"""The memory of a model in Milvus: found by the model's weights, and read a batch at a time.

Shapes: B inputs, N samples, E width of an encoding, D of a key, R classes asked for per input.
"""

import copy
import hashlib
import itertools
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from timm_memwrap._utils import check_choice, check_count
from timm_memwrap.attention import threshold, unit, wide
from timm_memwrap.bank_memory import empty_memory
from timm_memwrap.constants import MEMORY_BANK
from timm_memwrap.engines.milvus import MOST_HITS, Milvus, MissingCollectionError
from timm_memwrap.engines.samples import Contents, Row, make_rows, row_key, to_bank, to_tensors
from timm_memwrap.fingerprint import Watch, WatchedFingerprint
from timm_memwrap.meaning import Meaning
from timm_memwrap.memory_bank import MemoryBank, SampleId
from timm_memwrap.memory_layer import MemoryLayer, PreparedMemory
from timm_memwrap.reconstruction import CANDIDATES
from timm_memwrap.sample_ids import SampleIds, public_ids, short_name

__all__ = ["MilvusMemory", "with_bank"]

_logger = logging.getLogger(__name__)

INDEXES = ("flat", "hnsw")
# Of what is written; another one has another collection.
_FORMAT = 1
# Candidates that a graph looks at unless told otherwise, as with faiss.
_EFFORT = 128
# Samples written at a time.
_BATCH = 1024

_ROW = ("name", "place", "label", "encoding")
# Heads whose keys begin with the pre-logits, all of one length: keys tell which samples look alike, too.
_SHOW_FEATURES = ("joint", "joint_equal", "probabilities", "pre_logits")


class MilvusMemory:
    """The memory of a model in Milvus, which a process need not hold and several may share.

    A batch asks for its nearest samples once, and reads those as it would read a bank. With `index="flat"` the samples
    read are the same as from a bank: for a reconstruction its candidates are all that is asked for, and for the
    sparsemax more is asked for until the last score is below the threshold. A support beyond Milvus' 16,384 samples per
    input is cut off, with a warning. `"hnsw"` is approximate.

    What is written belongs to the weights that encoded it: with others, another collection is looked for. A collection
    is found only once it is complete. Those of other weights stay until they are dropped.

    To a server (`http://`, `https://`), ids that are paths are sent, and known in the bank from then on, by their file
    name and class folder; images are sent if the bank holds any. A file stays on this machine as it is.

    Args:
        uri: A file that ends in `.db`, for Milvus Lite in this process alone; or `http(s)://host:port`, for a server.
        token: As `pymilvus.MilvusClient` takes it. It is never logged, saved or copied to other processes.
        collection: What names of collections begin with, to keep several memories of the same weights.
        index: `"flat"` scores all samples, exactly; `"hnsw"` walks a graph of neighbours.
        effort: How many candidates a walk through the graph keeps; `None` for 128.
        timeout: Seconds after which a call fails with a `ConnectionError` or `TimeoutError`.

    Raises:
        ValueError: If an argument does not fit.
        ImportError: If pymilvus, or for a file milvus-lite, is not installed.
    """

    def __init__(
        self,
        uri: str,
        token: str | None = None,
        collection: str = "memwrap",
        index: str = "flat",
        effort: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        check_choice("index", index, INDEXES)
        check_count("effort", effort, none=True)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", collection):
            raise ValueError(f"collection={collection!r} is not a name. Pass up to 64 letters, digits and underscores.")
        if index == "hnsw":
            _logger.warning("Reads through index='hnsw' are approximate: samples may be missed. 'flat' is exact.")
        self._milvus = Milvus(uri, token, timeout)
        self._collection, self._index, self._effort = collection, index, effort or _EFFORT
        self._head_fingerprint = WatchedFingerprint()
        # What is read, and the bank that is known to be the same.
        self._known: tuple[str, Contents] | None = None
        self._bank: tuple[Watch, Any] | None = None
        self._quantiles: tuple[Contents, Tensor] | None = None
        self._warned = False
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MilvusMemory({self._milvus.name!r}, collection={self._collection!r}, index={self._index!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_known": None, "_bank": None, "_quantiles": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.RLock()}

    @property
    def remote(self) -> bool:
        """Whether samples leave this machine, or may."""
        return self._milvus.remote

    # --- what is there ---

    def open(self, model: Any) -> Contents:
        """Returns what the collection of a model holds; writes the model's bank to it if it holds another.

        Raises:
            ValueError: If there is none and the bank is empty, or it holds what others wrote.
        """
        name = self._name_of(model)
        with self._lock:
            if len(model.memory_bank):
                return self._follow(model, name)
            if self._known is None or self._known[0] != name:
                contents = self._read(name)
                if contents is None:
                    raise ValueError(
                        f"{self._milvus.name} has no memory {self._collection!r} of these weights. {self._inventory()} "
                        f"Call timm_memwrap.build_memory_bank(model, data) and use_index again, or stream one with "
                        f"timm_memwrap.stream_memory(model, data, uri=...)."
                    )
                self._take(name, contents)
            assert self._known is not None
            return self._known[1]

    def _name_of(self, model: Any) -> str:
        """Returns the name of the memory of the model's weights: what its keys are made with, and nothing else."""
        args = {name: model.memory_args[name] for name in ("read_head", "distance")}
        meaning = [_FORMAT, model.encoder_fingerprint(), self._head_fingerprint.of(model.head.head), args]
        digest = hashlib.sha256(json.dumps([*meaning, model.encoding_size], sort_keys=True).encode()).hexdigest()
        return f"{self._collection}_{digest[:32]}"

    @property
    def _notes(self) -> str:
        return f"{self._collection}_memories"

    def _inventory(self) -> str:
        """Says what there is."""
        found = []
        for name in self._milvus.notes(self._notes):
            if (contents := self._read(name)) is not None:
                source = contents.read_meaning().provenance.dataset or "an unknown data set"
                found.append(f"{contents.size:,} samples of {source}")
        if not found:
            return "It holds none of other weights either."
        return f"Of other weights it holds {len(found)}: {'; '.join(found[:5])}."

    def _read(self, name: str) -> Contents | None:
        text = self._milvus.read_note(self._notes, name)
        contents = None if text is None else Contents.from_json(text)
        if contents is None or contents.collection not in self._milvus.collections():
            return None
        return contents

    def _take(self, name: str, contents: Contents) -> None:
        self._milvus.load(contents.collection)
        self._known = (name, contents)

    def _follow(self, model: Any, name: str) -> Contents:
        """Returns what the collection holds once it is what the bank holds."""
        bank = model.memory_bank
        tensors = [*bank.filled()]
        same_bank = self._bank is not None and self._bank[0].unchanged(tensors) and self._bank[1] is bank._meaning
        if same_bank and self._known is not None and self._known[0] == name:
            return self._known[1]
        if model.memory_is_stale():
            raise ValueError(
                "The memory bank is stale: the weights have changed since it was built, so that its encodings are not "
                "theirs. Call timm_memwrap.build_memory_bank(model, data) again."
            )
        if self._milvus.remote:
            _make_public(bank)
            tensors = [*bank.filled()]
        _check_labels(bank.filled()[1])
        watched, there = (Watch(tensors), bank._meaning), self._read(name)
        own = _contents_of(bank, self._meaning_of(bank), "", self._index)
        written = self._known[1] if self._known is not None and self._known[0] == name else None
        if there is not None and not there.changing and _same(there, own):
            own = replace(own, collection=there.collection, index=there.index)
            if there.meaning != own.meaning:
                self._note(name, own)
        elif there is None or there.changing or (written is not None and written.digest == there.digest):
            own = self._write(model, name, bank)
        else:
            raise ValueError(
                f"{self._milvus.name} holds another memory {self._collection!r} of these weights: {there.size:,} samples "
                f"of {there.read_meaning().provenance.dataset or 'an unknown data set'}, and the bank {len(bank):,}. Call "
                f"model.memory_bank.clear() to read what is there, or pass collection='another_name'."
            )
        self._take(name, own)
        self._bank = watched
        return own

    def _meaning_of(self, bank: MemoryBank) -> Meaning:
        provenance = bank.provenance
        if self._milvus.remote:
            provenance = replace(provenance, dataset=short_name(provenance.dataset))
        return Meaning(SampleIds(), bank.class_names, provenance, bank.reference)

    def _note(self, name: str, contents: Contents) -> None:
        self._milvus.write_note(self._notes, name, contents.to_json())

    def class_names(self, model: Any) -> list[str]:
        """Returns the names of the classes by label; empty if unknown."""
        return self.open(model).read_meaning().class_names

    def check_whole(self, bank: MemoryBank) -> None:
        """Raises a `ValueError` if all samples are wanted at once, and the bank has none of them."""
        if not len(bank):
            raise ValueError(
                f"This takes all samples of the memory, which are in {self._milvus.name} and not in the bank. If they "
                f"fit into this process: model.memory_bank = model.engine.fetch(model)."
            )

    # --- writing ---

    def _write(self, model: Any, name: str, bank: MemoryBank) -> Contents:
        encodings, labels = bank.filled()
        dtype, shape = encodings.dtype, () if bank.images is None else tuple(bank.images.shape[1:])
        contents = self.begin(model, dtype, encodings.shape[1], shape)
        ids = bank.ids
        with tqdm(total=len(bank), desc="Milvus", unit="img") as bar:
            for start in range(0, len(bank), _BATCH):
                part = slice(start, start + _BATCH)
                images = None if bank.images is None else bank.images[part]
                places = range(start, start + len(labels[part]))
                contents = self.insert(model, contents, encodings[part], labels[part], ids[part], images, places)
                bar.update(len(labels[part]))
        return self.complete(model, contents, self._meaning_of(bank))

    def begin(self, model: Any, dtype: torch.dtype, width: int, image_shape: tuple[int, ...]) -> Contents:
        """Makes a collection that nobody finds until it is complete; what was never completed is dropped."""
        name = self._name_of(model)
        there = self._read(name)
        for unfinished in self._milvus.collections():
            if unfinished.startswith(f"{name}_") and (there is None or unfinished != there.collection):
                _logger.info("Dropping %s, which was never completed.", unfinished)
                self._milvus.drop(unfinished)
        collection = f"{name}_{secrets.token_hex(4)}"
        keys = self._keys(model, torch.zeros(1, width))
        self._milvus.create(collection, keys.shape[1], _metric(model.head), self._index)
        return Contents(collection, "", str(dtype).removeprefix("torch."), width, image_shape, self._index)

    def insert(
        self,
        model: Any,
        contents: Contents,
        encodings: Tensor,
        labels: Tensor,
        ids: Sequence[SampleId],
        images: Tensor | None,
        places: Iterable[int],
    ) -> Contents:
        """Adds samples to a collection that is not complete yet, and returns what it holds.

        Args:
            model: The model that encoded them.
            contents: What the collection holds.
            encodings: Encodings `[N, E]`, finite.
            labels: Class indices `[N]`.
            ids: Their ids, which no other sample has.
            images: Their small images, as in the bank.
            places: Where they stand in the memory; of equal samples, the first counts.
        """
        rows = self._rows(model, contents, encodings, labels, ids, images, places)
        self._milvus.upsert(contents.collection, rows)
        return contents.changed(added=rows)

    def _rows(
        self,
        model: Any,
        contents: Contents,
        encodings: Tensor,
        labels: Tensor,
        ids: Sequence[SampleId],
        images: Tensor | None,
        places: Iterable[int],
    ) -> list[Row]:
        _check_labels(labels)
        if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(encodings)):
            raise ValueError("Encodings have NaN or infinite entries. Check the images and the model's weights.")
        stored = encodings.to(getattr(torch, contents.dtype))
        return make_rows(stored, labels, ids, images, places, self._keys(model, stored))

    def complete(self, model: Any, contents: Contents, meaning: Meaning) -> Contents:
        """Makes a collection that is complete the memory of the model's weights, in the place of another."""
        text = bytes(meaning.to_tensor().numpy()).decode(errors="surrogatepass")
        name, contents = self._name_of(model), replace(contents, meaning=text)
        self._milvus.flush(contents.collection)
        self._milvus.load(contents.collection)
        if (count := self._milvus.count(contents.collection)) != contents.size:
            raise ValueError(
                f"{self._milvus.name} holds {count:,} of {contents.size:,} samples that were written: ids come more "
                f"than once, or another process writes the same memory. Write it from one."
            )
        there = self._read(name)
        self._note(name, contents)
        if there is not None:
            self._milvus.drop(there.collection)
        with self._lock:
            self._known = (name, contents)
        return contents

    def _keys(self, model: Any, encodings: Tensor) -> Tensor:
        parameter = next(model.backbone.parameters())
        with torch.no_grad():
            return model.head.query(encodings.to(parameter.device, wide(parameter).dtype))

    def add(
        self, model: Any, encodings: Tensor, labels: Tensor, ids: Sequence[SampleId], images: Tensor | None
    ) -> list[SampleId]:
        """Adds samples to the memory, and returns their ids: of paths, a server knows the names alone.

        Raises:
            ValueError: If an id is in the memory.
        """
        chosen = [short_name(i) if self._milvus.remote and isinstance(i, str) and "/" in i else i for i in ids]
        SampleIds(chosen)

        def plan(contents: Contents) -> tuple[Contents, Callable[[], None]]:
            known = self._find(contents, chosen, ["name"])
            if known:
                names = [json.loads(row["name"]) for row in known.values()]
                raise ValueError(
                    f"The memory has {', '.join(map(repr, names[:5]))}{' ...' if len(names) > 5 else ''} already. Forget "
                    f"what is there first, or give the new samples other ids."
                )
            # Behind all that is there, whoever added it.
            places = itertools.count(time.time_ns())
            meaning = contents.read_meaning()
            provenance = replace(meaning.provenance, appended=meaning.provenance.appended + len(chosen))
            rows = self._rows(model, contents, encodings, labels, chosen, images, places)
            changed = _with_meaning(contents.changed(added=rows), replace(meaning, provenance=provenance))
            return changed, lambda: self._milvus.upsert(contents.collection, rows)

        self._change(model, plan)
        return chosen

    def remove(self, model: Any, ids: Iterable[SampleId] = (), labels: Sequence[int] = ()) -> None:
        """Removes the samples with these ids, and all with these labels.

        Raises:
            ValueError: If an id is not in the memory, or nothing would be left.
        """
        wanted = list(ids)

        def plan(contents: Contents) -> tuple[Contents, Callable[[], None]]:
            fields = ["label", "encoding"]
            rows = self._find(contents, wanted, fields)
            _check_found(wanted, rows, contents)
            where = f"label in {list(map(int, labels))}"
            for page in self._milvus.pages(contents.collection, fields, contents.size, where) if labels else ():
                rows |= {row["id"]: row for row in page}
            if len(rows) >= contents.size:
                raise ValueError(f"Removing {len(rows):,} samples would leave the memory empty.")
            meaning = contents.read_meaning()
            provenance = replace(meaning.provenance, removed=meaning.provenance.removed + len(rows))
            changed = contents.changed(removed=rows.values())
            changed = _with_meaning(changed, replace(meaning, provenance=provenance))
            return changed, lambda: self._milvus.delete(contents.collection, list(rows))

        self._change(model, plan)

    def relabel(self, model: Any, labels: Mapping[SampleId, int]) -> None:
        """Gives the samples with these ids other labels.

        Raises:
            ValueError: If an id is not in the memory.
        """

        def plan(contents: Contents) -> tuple[Contents, Callable[[], None]]:
            rows = self._find(contents, list(labels), [*_ROW, "image"])
            _check_found(list(labels), rows, contents)
            new = [{**rows[row_key(sample_id)], "label": int(label)} for sample_id, label in labels.items()]
            keys = self._keys(model, to_tensors(contents, new)[0]).float().cpu().numpy()
            whole = [{**row, "key": key} for row, key in zip(new, keys, strict=True)]
            changed = contents.changed(added=new, removed=rows.values())
            return changed, lambda: self._milvus.upsert(contents.collection, whole)

        self._change(model, plan)

    def _change(self, model: Any, plan: Callable[[Contents], tuple[Contents, Callable[[], None]]]) -> None:
        with self._lock:
            known = self.open(model)
            name = self._name_of(model)
            contents = self._read(name)
            if contents is None:
                raise MissingCollectionError(f"{self._milvus.name} has lost the memory {known.collection}.")
            if len(model.memory_bank) and (contents.digest != known.digest or contents.changing):
                raise ValueError(
                    f"Another process has changed the memory in {self._milvus.name} since the bank was written to it. "
                    f"Call model.memory_bank.clear() to go on with what is there."
                )
            changed, apply = plan(contents)
            # Whoever is interrupted leaves this, so that no bank is taken for the same.
            self._note(name, replace(contents, changing=True))
            apply()
            self._note(name, replace(changed, changing=False))
            self._known = (name, replace(changed, changing=False))

    def _find(self, contents: Contents, ids: Sequence[SampleId], fields: Sequence[str]) -> dict[str, Row]:
        if not ids:
            return {}
        rows = self._milvus.query(contents.collection, fields, [row_key(sample_id) for sample_id in ids])
        return {row["id"]: row for row in rows}

    # --- reading ---

    def memory(self, model: Any, encoding: Tensor, hidden: Tensor | None) -> PreparedMemory:
        """Returns the samples that encodings `[B, E]` read, ready to be read.

        Raises:
            ValueError: If samples are to be hidden: they have no positions before they are found.
        """
        if hidden is not None:
            raise ValueError(
                "hidden names samples by their position, and the memory is in Milvus. Read the nearest samples: "
                "near = timm_memwrap.explaining.nearby(model, encoding); near.read(encoding, hidden=hidden)."
            )
        if torch.compiler.is_compiling():
            raise ValueError("torch.compile cannot trace a read from Milvus. Call model.use_index(None) first.")
        if not len(encoding):
            return empty_memory(model.head, encoding)
        contents, rows = self.nearest(model, encoding)
        ordered = sorted(rows.values(), key=lambda row: (row["place"], row["id"]))
        encodings, labels = to_tensors(contents, ordered)
        with torch.inference_mode(False), torch.no_grad():
            return model.head.prepare(encodings.to(encoding.device, wide(encoding).dtype), labels.to(encoding.device))

    def nearest(
        self, model: Any, encoding: Tensor, extra: int = 0, images: bool = False
    ) -> tuple[Contents, dict[str, Row]]:
        """Finds the samples that encodings `[B, E]` read, also without their `extra` strongest ones.

        Returns:
            What the collection holds, and the rows found by their primary key.
        """
        keys, head = self._keys(model, encoding), model.head
        fields = [*_ROW, "image"] if images else _ROW

        def find(contents: Contents) -> dict[str, Row]:
            rows, pending, count = dict[str, Row](), list(range(len(keys))), CANDIDATES + extra
            while pending:
                hits = self._search(contents, head, keys[pending], count, fields)
                rows.update((row["id"], row) for found in hits for _, row in found)
                if head.reconstructs:
                    break
                scores = [[score for score, _ in found] for found in hits]
                pending = [i for i, own in zip(pending, scores, strict=True) if _may_miss(own, count, extra, head)]
                if pending and count == MOST_HITS:
                    self._warn_of_cut()
                    break
                count = min(4 * count, MOST_HITS)
            return rows

        return self._reading(model, find)

    def of_classes(
        self, model: Any, encoding: Tensor, classes: Tensor, count: int, images: bool = False
    ) -> dict[str, Row]:
        """Finds samples of classes `[B, R]` that look most like inputs, by the cosine of their pre-logits.

        Where the keys do not tell, the nearest by the keys are found, of which these are the most alike.
        """
        keys, head = self._keys(model, encoding), model.head
        if model.memory_args["read_head"] in _SHOW_FEATURES:
            seen = unit(wide(encoding)[:, : model.head_hidden_size])
            keys = F.pad(seen, (0, keys.shape[1] - seen.shape[1]))
        else:
            count = max(count, CANDIDATES)
        fields = [*_ROW, "image"] if images else _ROW

        def find(contents: Contents) -> dict[str, Row]:
            rows = dict[str, Row]()
            for label in classes.unique().tolist():
                if label in contents.class_counts:
                    asking = keys[(classes == label).any(dim=1)]
                    hits = self._search(contents, head, asking, count, fields, f"label == {label}")
                    rows.update((row["id"], row) for found in hits for _, row in found)
            return rows

        return self._reading(model, find)[1]

    def spread(self, model: Any, count: int) -> MemoryBank:
        """Returns up to `count` samples, spread evenly over those that were remembered first."""
        contents = self.open(model)
        places = torch.linspace(0, contents.size - 1, min(count, contents.size)).long().tolist()
        rows = self._milvus.query(contents.collection, _ROW, where=f"place in {places}")
        if not rows:
            rows = self._milvus.query(contents.collection, _ROW, where="place >= 0", limit=count)
        return self.bank(model, contents, {row["id"]: row for row in rows})

    def fetch(self, model: Any) -> MemoryBank:
        """Returns a bank of all samples, for a memory that fits into that of this process."""
        contents, rows = self.open(model), dict[str, Row]()
        fields = [*_ROW, "image"]
        with tqdm(total=contents.size, desc="Milvus", unit="img") as bar:
            for page in self._milvus.pages(contents.collection, fields, contents.size):
                rows |= {row["id"]: row for row in page}
                bar.update(len(page))
        return self.bank(model, contents, rows)

    def bank(self, model: Any, contents: Contents, rows: Mapping[str, Row]) -> MemoryBank:
        """Returns a bank of rows that were found, where the model is."""
        return to_bank(contents, rows).to(next(model.backbone.parameters()).device)

    def quantiles(self, model: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Returns what is computed of the whole memory, once for what it holds."""
        contents = self.open(model)
        if self._quantiles is None or self._quantiles[0] != contents:
            self._quantiles = (contents, compute())
        return self._quantiles[1]

    def _reading(
        self, model: Any, find: Callable[[Contents], dict[str, Row]]
    ) -> tuple[Contents, dict[str, Row]]:
        """Finds rows, once more if another process has put a new collection in the place of the one that was read."""
        contents = self.open(model)
        try:
            return contents, find(contents)
        except MissingCollectionError:
            with self._lock:
                self._known = self._bank = None
                again = self.open(model)
            if again.collection == contents.collection:
                raise
            return again, find(again)

    def _search(
        self, contents: Contents, head: MemoryLayer, keys: Tensor, count: int, fields: Sequence[str], where: str = ""
    ) -> list[list[tuple[float, Row]]]:
        arrays = keys.float().cpu().split(max(1, MOST_HITS // count))
        effort = self._effort if contents.index == "hnsw" else 0
        parts = [
            self._milvus.search(contents.collection, part.numpy(), count, _metric(head), fields, where, effort)
            for part in arrays
        ]
        return [hits for part in parts for hits in part]

    def _warn_of_cut(self) -> None:
        if not self._warned:
            self._warned = True
            _logger.warning(
                "The read is approximate: an input has weight on more than the %d samples that Milvus returns. Raise "
                "the scale, or read from a bank.",
                MOST_HITS,
            )


def with_bank(model: Any, bank: MemoryBank) -> Any:
    """Returns the model with another bank, which it reads itself; the two share weights and mode."""
    same = copy.copy(model)
    same.engine, same._modules = None, {**model._modules, MEMORY_BANK: bank}
    return same


def _metric(head: MemoryLayer) -> str:
    return "L2" if head.distance == "l2" else "IP"


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1:
        raise ValueError(
            f"labels have shape {list(labels.shape)}: samples of several classes. Milvus holds one class for each "
            f"sample. Keep such a memory in the bank: model.use_index(None)."
        )


def _may_miss(scores: list[float], count: int, extra: int, head: MemoryLayer) -> bool:
    """Returns whether samples that were not found may have weight, also without the `extra` strongest that were."""
    if len(scores) < count:
        return False
    ordered = torch.tensor([scores], dtype=torch.float64) * float(head.scale)
    return bool(ordered[0, -1] > threshold(ordered[:, extra:]))


def _contents_of(bank: MemoryBank, meaning: Meaning, collection: str, index: str) -> Contents:
    encodings, labels = bank.filled()
    shape = () if bank.images is None else tuple(bank.images.shape[1:])
    text = bytes(meaning.to_tensor().numpy()).decode(errors="surrogatepass")
    dtype = str(encodings.dtype).removeprefix("torch.")
    contents, ids = Contents(collection, text, dtype, encodings.shape[1], shape, index), bank.ids
    for start in range(0, len(bank), _BATCH):
        part = slice(start, start + _BATCH)
        contents = contents.changed(added=make_rows(encodings[part], labels[part], ids[part], None, itertools.count()))
    return contents


def _same(there: Contents, own: Contents) -> bool:
    return all(getattr(there, name) == getattr(own, name) for name in ("dtype", "width", "image_shape", "digest"))


def _with_meaning(contents: Contents, meaning: Meaning) -> Contents:
    return replace(contents, meaning=bytes(meaning.to_tensor().numpy()).decode(errors="surrogatepass"))


def _make_public(bank: MemoryBank) -> None:
    """Gives samples whose ids are paths of this machine the names that others may see."""
    ids, names = bank.ids, dict(enumerate(bank.class_names))
    labels = bank.filled()[1]
    classes = [""] * len(ids) if labels.ndim > 1 else [names.get(label, "") for label in labels.tolist()]
    public = public_ids(ids, classes)
    if public != ids:
        count, shown = sum(a != b for a, b in zip(public, ids, strict=True)), next(p for p in public if p not in ids)
        _logger.warning(
            "%d samples have paths of this machine as ids. They are sent, and from now on known, by names: %r.",
            count,
            shown,
        )
        bank._describe(ids=SampleIds(public))


def _check_found(ids: Sequence[SampleId], rows: Mapping[str, Row], contents: Contents) -> None:
    unknown = [sample_id for sample_id in ids if row_key(sample_id) not in rows]
    if unknown:
        raise ValueError(
            f"No sample with id {', '.join(map(repr, unknown[:5]))}{' ...' if len(unknown) > 5 else ''} in the memory "
            f"of {contents.size:,} samples."
        )
