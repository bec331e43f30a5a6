"""A faiss index over the keys of a very large memory: exact, or approximate and faster.

Shapes: B queries, M memory samples, D width of a key, H samples hidden from a query, K samples kept per query.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap._utils import check_choice, check_count, optional_import
from timm_memwrap.attention import MASKED, Keys, content_weights, threshold, trim
from timm_memwrap.tensor_files import FileError, read_tensors, write_tensors

__all__ = ["FaissIndex", "check_index"]

_logger = logging.getLogger(__name__)

INDEXES = ("flat", "ivf", "hnsw")

# Samples of a cell that the training of an inverted file looks at; faiss warns below 39.
_PER_CELL = 64


def check_index(kind: str, effort: int | None) -> None:
    """Raises if there is no such index.

    Raises:
        ValueError: If the kind is unknown, or the effort does not fit it.
    """
    check_choice("index", kind, INDEXES)
    check_count("effort", effort, none=True)
    if effort is not None and kind == "flat":
        raise ValueError(f"effort={effort!r} does not fit index='flat', which looks at all samples. Leave it out.")


class FaissIndex:
    """A faiss index of prepared keys, searched by inner product.

    Args:
        keys: Prepared keys of the memory.
        kind: `"flat"` looks at all keys, exactly; `"ivf"` at the cells of an inverted file that are nearest to the
            query; `"hnsw"` walks a graph of neighbours.
        effort: How much is looked at: cells for `"ivf"` (default 16), candidates for `"hnsw"` (default 128). More finds
            more of what an exact read finds, and takes longer.
        path: A file to read the index from if it holds one of these very keys, and to write it to otherwise.
        at_least: How many samples per row to ask for first.

    Raises:
        ValueError: If the kind or the effort is unknown, or the keys are not on a CPU.
        ImportError: If faiss is not installed.
    """

    def __init__(
        self,
        keys: Keys,
        kind: str = "flat",
        effort: int | None = None,
        path: str | os.PathLike | None = None,
        at_least: int = 64,
    ) -> None:
        check_index(kind, effort)
        if keys.vectors.device.type != "cpu":
            raise ValueError(f"The memory is on {keys.vectors.device}, the index is for a CPU. Call model.cpu() first.")
        self.keys, self.kind, self.at_least = keys, kind, at_least
        self._faiss = optional_import("faiss", "faiss", "An index")
        self._index = self._read_or_build(Path(path) if path is not None else None)
        if kind == "ivf":
            self._index.nprobe = min(effort or 16, self._index.nlist)
        elif kind == "hnsw":
            self._index.hnsw.efSearch = effort or 128

    @torch.no_grad()
    def search(
        self, queries: Tensor, scale: float | Tensor = 1.0, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the samples with positive weight among those that the index finds, as `ExactIndex.search` does."""
        queries, size = self._searched(queries), self._index.ntotal
        k = min(self.at_least + (0 if hidden is None else hidden.shape[-1]), size)
        best, positions, last = self._ask(queries, k, scale, hidden)
        while k < size:
            # As in the search by blocks: the threshold of some scores bounds that of all from below.
            needed = (last > threshold(best)).flatten()
            if not bool(needed.any()):
                break
            before, k = k, min(4 * k, size)
            best, positions = F.pad(best, (0, k - before), value=MASKED), F.pad(positions, (0, k - before))
            best[needed], positions[needed], last[needed] = self._ask(
                queries[needed], k, scale, None if hidden is None else hidden[needed]
            )
        weights, positions, best = trim(content_weights(best), positions, best)
        return weights, positions, best

    @torch.no_grad()
    def nearest(self, queries: Tensor, count: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Finds the samples with the highest scores among those that the index finds, as `ExactIndex.nearest` does."""
        k = min(count + (0 if hidden is None else hidden.shape[-1]), self._index.ntotal)
        best, positions, _ = self._ask(self._searched(queries), k, 1.0, hidden)
        return best[:, :count], positions[:, :count]

    def _searched(self, queries: Tensor) -> Tensor:
        """Returns queries as the index takes them."""
        if self.keys.centre is not None:
            queries = queries - self.keys.centre
        if self.keys.offsets is not None:
            # A one, which meets the keys' offsets.
            queries = F.pad(queries, (0, 1), value=1.0)
        return queries.float()

    def _ask(
        self, queries: Tensor, k: int, scale: float | Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the best scores `[B, k]`, sorted, their positions, and the last of these scores `[B, 1]`.

        Hidden samples are masked, and so is what an approximate index does not find: it then has no more to give.
        """
        found, where = self._index.search(queries.contiguous().numpy(), k)
        scores, positions = torch.from_numpy(found) * scale, torch.from_numpy(where)
        unseen = positions < 0
        last = scores[:, -1:].masked_fill(unseen[:, -1:], MASKED)
        if hidden is not None:
            unseen = unseen | (positions.unsqueeze(-1) == hidden.unsqueeze(1)).any(dim=-1)
        scores, order = scores.masked_fill(unseen, MASKED).sort(dim=-1, descending=True, stable=True)
        return scores, positions.clamp(min=0).gather(1, order), last

    def _read_or_build(self, path: Path | None) -> Any:
        vectors = self.keys.vectors
        if self.keys.offsets is not None:
            vectors = torch.cat([vectors, self.keys.offsets.unsqueeze(1)], dim=1)
        array = vectors.float().contiguous().numpy()
        meaning = {"kind": self.kind, "keys": hashlib.sha256(array.data).hexdigest()} if path is not None else {}
        known = _read(path, meaning) if path is not None and path.exists() else None
        if known is not None:
            return self._faiss.deserialize_index(known.numpy())
        index = self._build(array)
        if path is not None:
            serialized = torch.from_numpy(self._faiss.serialize_index(index))
            try:
                write_tensors({"index": serialized}, path, meaning)
            except OSError as error:
                _logger.warning("The index is not kept in %s: %s", path, error)
        return index

    def _build(self, vectors: Any) -> Any:
        count, width = vectors.shape
        if self.kind == "flat":
            index = self._faiss.IndexFlatIP(width)
        elif self.kind == "hnsw":
            index = self._faiss.IndexHNSWFlat(width, 32, self._faiss.METRIC_INNER_PRODUCT)
        else:
            cells = max(1, min(int(4 * count**0.5), count // _PER_CELL))
            quantizer = self._faiss.IndexFlatIP(width)
            index = self._faiss.IndexIVFFlat(quantizer, width, cells, self._faiss.METRIC_INNER_PRODUCT)
            index.train(vectors)
        index.add(vectors)
        return index


def _read(path: Path, meaning: dict[str, str]) -> Tensor | None:
    """Reads an index from a file if it is whole and of the same keys; `None` if it has to be built."""
    try:
        file = read_tensors(path, str(path))
    except (FileError, OSError) as error:
        _logger.warning("%s", error)
    else:
        if file.verified and {name: file.metadata.get(name) for name in meaning} == meaning:
            return file.tensors["index"]
    _logger.info("The index in %s is not of this memory, so it is built again.", path)
    return None
