"""The memory of a model in Milvus: found by the model's weights, and read a batch at a time.

Shapes: B inputs, N samples, E width of an encoding, D of a key, R classes asked for per input.
"""

import copy
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
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
from timm_memwrap.engines.samples import Contents, Row, in_order, to_bank, to_tensors
from timm_memwrap.engines.written import Collections, check_labels, keys_of, metric_of
from timm_memwrap.fingerprint import Watch
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.memory_layer import MemoryLayer, PreparedMemory
from timm_memwrap.reconstruction import CANDIDATES
from timm_memwrap.sample_ids import SampleIds, public_ids

__all__ = ["ROW", "MilvusMemory", "with_bank"]

_logger = logging.getLogger(__name__)

INDEXES = ("flat", "hnsw")
# Candidates that a graph looks at unless told otherwise, as with faiss.
_EFFORT = 128

# Bytes of samples that are asked for at once.
_ANSWER_BYTES = 2**26
# What a read takes of a sample.
ROW = ("name", "place", "label", "encoding")
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
        self.collections, self._effort = Collections(Milvus(uri, token, timeout), collection, index), effort or _EFFORT
        # What is read, and the bank that is known to be the same.
        self._known: tuple[str, Contents] | None = None
        self._bank: tuple[Watch, Any] | None = None
        self._quantiles: tuple[Contents, Tensor] | None = None
        self._warned = False
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MilvusMemory({self.collections.place!r}, collection={self.collections.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_known": None, "_bank": None, "_quantiles": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.RLock()}

    @property
    def remote(self) -> bool:
        """Whether samples leave this machine, or may."""
        return self.collections.milvus.remote

    def open(self, model: Any) -> Contents:
        """Returns what the collection of a model holds; writes the model's bank to it if it holds another.

        Raises:
            ValueError: If there is none and the bank is empty, or it holds what others wrote.
        """
        name = self.collections.name_of(model)
        with self._lock:
            if len(model.memory_bank):
                return self._follow(model, name)
            if self._known is None or self._known[0] != name:
                contents = self.collections.find(name)
                if contents is None:
                    raise ValueError(
                        f"{self.collections.place} has no memory {self.collections.name!r} of these weights. "
                        f"{self.collections.inventory()} Build a bank with timm_memwrap.build_memory_bank(model, data) "
                        f"and call use_index again, or stream one: timm_memwrap.stream_memory(model, data, uri=...)."
                    )
                self._take(model, name, contents)
            assert self._known is not None
            return self._known[1]

    def _take(self, model: Any, name: str, contents: Contents) -> None:
        model.check_bank(torch.empty(0, contents.width), max(contents.class_counts, default=-1))
        self.collections.milvus.load(contents.collection)
        if contents.index != "flat":
            _logger.warning("Reads through the index %r are approximate: samples may be missed.", contents.index)
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
        if self.remote:
            _make_public(bank)
            tensors = [*bank.filled()]
        check_labels(bank.filled()[1])
        watched, there = (Watch(tensors), bank._meaning), self.collections.find(name)
        own = self.collections.contents_of(bank)
        ours = {own.digest} | ({self._known[1].digest} if self._known is not None and self._known[0] == name else set())
        if there is not None and not there.changing and _same(there, own):
            own = replace(own, collection=there.collection)
            if there.meaning != own.meaning:
                self.collections.note(name, own)
        elif there is None or there.digest in ours:
            own = self.collections.write(model, bank)
        else:
            raise ValueError(
                f"{self.collections.place} holds another memory {self.collections.name!r} of these weights: "
                f"{there.described}, and the bank has {len(bank):,}. Call model.memory_bank.clear() to read what is "
                f"there, or pass collection='another_name'."
            )
        self._take(model, name, own)
        self._bank = watched
        return own

    def class_names(self, model: Any) -> list[str]:
        """Returns the names of the classes by label; empty if unknown."""
        return self.open(model).read_meaning().class_names

    def check_whole(self, bank: MemoryBank) -> None:
        """Raises a `ValueError` if all samples are wanted at once, and the bank has none of them."""
        if not len(bank):
            raise ValueError(
                f"This takes all samples of the memory, which are in {self.collections.place} and not in the bank. If "
                f"they fit into this process: model.memory_bank = model.engine.fetch(model)."
            )

    def change(self, model: Any, plan: Callable[[Contents], tuple[Contents, Callable[[], None]]]) -> None:
        """Changes the memory, by what `plan` returns of what it holds: what it will hold, and how it comes to that."""
        with self._lock:
            known = self.open(model)
            name = self.collections.name_of(model)
            contents = self.collections.find(name)
            if contents is None:
                raise MissingCollectionError(f"{self.collections.place} has lost the memory {known.collection}.")
            if len(model.memory_bank) and (contents.digest != known.digest or contents.changing):
                raise ValueError(
                    f"Another process has changed the memory in {self.collections.place} since the bank was written to "
                    f"it. Call model.memory_bank.clear() to go on with what is there."
                )
            changed, apply = plan(contents)
            # Whoever is interrupted leaves this, so that no bank is taken for the same.
            self.collections.note(name, replace(contents, changing=True))
            apply()
            self.collections.note(name, replace(changed, changing=False))
            self._known = (name, replace(changed, changing=False))

    # A compiled model is so in two parts, before and after it.
    @torch.compiler.disable
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
        if not len(encoding):
            return empty_memory(model.head, encoding)
        contents, rows = self.nearest(model, encoding)
        encodings, labels = to_tensors(contents, in_order(rows))
        with torch.inference_mode(False), torch.no_grad():
            return model.head.prepare(encodings.to(encoding.device, wide(encoding).dtype), labels.to(encoding.device))

    def nearest(
        self, model: Any, encoding: Tensor, extra: int = 0, images: bool = False
    ) -> tuple[Contents, dict[str, Row]]:
        """Finds the samples that encodings `[B, E]` read, also without their `extra` strongest ones.

        Returns:
            What the collection holds, and the rows found by their primary key.
        """
        keys, head = keys_of(model, encoding), model.head
        fields = [*ROW, "image"] if images else ROW

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
        keys, head = keys_of(model, encoding), model.head
        if model.memory_args["read_head"] in _SHOW_FEATURES:
            seen = unit(wide(encoding)[:, : model.head_hidden_size])
            keys = F.pad(seen, (0, keys.shape[1] - seen.shape[1]))
        else:
            count = max(count, CANDIDATES)
        fields = [*ROW, "image"] if images else ROW

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
        rows = self.collections.milvus.query(contents.collection, ROW, where=f"place in {places}")
        if not rows:
            rows = self.collections.milvus.query(contents.collection, ROW, where="place >= 0", limit=count)
        return self.bank(model, contents, {row["id"]: row for row in rows})

    def fetch(self, model: Any) -> MemoryBank:
        """Returns a bank of all samples, for a memory that fits into that of this process."""
        contents, rows = self.open(model), dict[str, Row]()
        fields = [*ROW, "image"]
        with tqdm(total=contents.size, desc="Milvus", unit="img") as bar:
            for page in self.collections.milvus.pages(contents.collection, fields, contents.size):
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

    def _reading(self, model: Any, find: Callable[[Contents], dict[str, Row]]) -> tuple[Contents, dict[str, Row]]:
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
        most = min(MOST_HITS, _ANSWER_BYTES // contents.row_bytes)
        arrays = keys.float().cpu().split(max(1, most // count))
        effort = self._effort if contents.index == "hnsw" else 0
        parts = [
            self.collections.milvus.search(
                contents.collection, part.numpy(), count, metric_of(head), fields, where, effort
            )
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


def _may_miss(scores: list[float], count: int, extra: int, head: MemoryLayer) -> bool:
    """Returns whether samples that were not found may have weight, also without the `extra` strongest that were."""
    if len(scores) < count:
        return False
    ordered = torch.tensor([scores], dtype=torch.float64) * float(head.scale)
    return bool(ordered[0, -1] > threshold(ordered[:, extra:]))


def _same(there: Contents, own: Contents) -> bool:
    return all(
        getattr(there, name) == getattr(own, name) for name in ("dtype", "width", "image_shape", "index", "digest")
    )


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
