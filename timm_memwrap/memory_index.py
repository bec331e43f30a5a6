"""An index over the keys of a very large memory, with faiss: exact, or approximate and faster.

Shapes: B queries, M memory samples, D width of a key, K samples kept per query.
"""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap.attention import MASKED, Keys, content_weights, ready_queries, threshold, trim

__all__ = ["INDEXES", "MemoryIndex", "check_index"]

_logger = logging.getLogger(__name__)

INDEXES = ("flat", "ivf", "hnsw")

# Samples of a cell that the training of an inverted file looks at; faiss warns below 39.
_PER_CELL = 64


def check_index(kind: str, effort: int | None) -> None:
    """Refuses an index that is unknown.

    Raises:
        ValueError: If the kind or the effort is.
    """
    if kind not in INDEXES:
        raise ValueError(f"Unknown index={kind!r}. Pass one of {', '.join(map(repr, INDEXES))}.")
    if effort is not None and (kind == "flat" or isinstance(effort, bool) or effort < 1):
        raise ValueError(f"effort={effort!r} does not fit index={kind!r}. Pass 1 or more, with 'ivf' or 'hnsw'.")


class MemoryIndex:
    """A faiss index of prepared keys, searched by inner product.

    Args:
        keys: Prepared keys of the memory.
        distance: The distance that they were prepared for.
        kind: `"flat"` looks at all keys, exactly; `"ivf"` at the cells of an inverted file that are nearest to the
            query; `"hnsw"` walks a graph of neighbours.
        effort: How much is looked at: cells for `"ivf"` (default 16), candidates for `"hnsw"` (default 128). More finds
            more of what an exact read finds, and takes longer.
        path: A file to read the index from if it is there and of these very keys, and to write it to otherwise.

    Raises:
        ValueError: If the kind or the effort is unknown, or the keys are not on a CPU.
        ImportError: If faiss is not installed.
    """

    def __init__(
        self,
        keys: Keys,
        distance: str,
        kind: str = "flat",
        effort: int | None = None,
        path: str | os.PathLike | None = None,
    ) -> None:
        check_index(kind, effort)
        if keys.vectors.device.type != "cpu":
            raise ValueError(f"The memory is on {keys.vectors.device}, the index is for a CPU. Call model.cpu() first.")
        self.keys, self.distance, self.kind = keys, distance, kind
        self._index = self._read_or_build(Path(path) if path is not None else None)
        if kind == "ivf":
            self._index.nprobe = min(effort or 16, self._index.nlist)
        elif kind == "hnsw":
            self._index.hnsw.efSearch = effort or 128

    def search(
        self, queries: Tensor, scale: float | Tensor = 1.0, hidden: Tensor | None = None, at_least: int = 64
    ) -> tuple[Tensor, Tensor]:
        """Finds the samples with positive weight among those that the index finds, as `attention.search` does.

        Args:
            queries: Projected input encodings `[B, D]`.
            scale: Factor on the similarities.
            hidden: Positions `[B, H]` of samples that a row must not see.
            at_least: How many samples per row to ask for first.
        """
        queries = self._augmented_queries(queries)
        size = self._index.ntotal
        k = min(at_least + (0 if hidden is None else hidden.shape[-1]), size)
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
        return trim(content_weights(best), positions)

    def _ask(
        self, queries: Tensor, k: int, scale: float | Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the best scores `[B, k]`, sorted, their positions, and the last of these scores `[B, 1]`.

        What is hidden is masked, and what an approximate index does not find: it then has no more to give.
        """
        found, where = self._index.search(queries.contiguous().numpy(), k)
        scores, positions = torch.from_numpy(found) * scale, torch.from_numpy(where)
        unseen = positions < 0
        last = scores[:, -1:].masked_fill(unseen[:, -1:], MASKED)
        if hidden is not None:
            unseen = unseen | (positions.unsqueeze(-1) == hidden.unsqueeze(1)).any(dim=-1)
        scores, order = scores.masked_fill(unseen, MASKED).sort(dim=-1, descending=True, stable=True)
        return scores, positions.clamp(min=0).gather(1, order), last

    def _augmented_queries(self, queries: Tensor) -> Tensor:
        """Appends a one, which meets the keys' offsets."""
        queries = ready_queries(queries, self.keys, self.distance).float()
        return queries if self.keys.offsets is None else F.pad(queries, (0, 1), value=1.0)

    def _vectors(self) -> Any:
        vectors = self.keys.vectors
        if self.keys.offsets is not None:
            vectors = torch.cat([vectors, self.keys.offsets.unsqueeze(1)], dim=1)
        return vectors.float().contiguous().numpy()

    def _read_or_build(self, path: Path | None) -> Any:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("An index needs faiss: pip install 'timm-memwrap[faiss]'") from error
        vectors = self._vectors()
        meaning = {"kind": self.kind, "keys": hashlib.sha256(vectors).hexdigest()}
        beside = path.with_name(path.name + ".json") if path is not None else None
        if path is not None and beside is not None and path.exists() and beside.exists():
            if json.loads(beside.read_text(encoding="utf-8")) == meaning:
                return faiss.read_index(str(path))
            _logger.info("The index in %s is of another memory, and is built anew.", path)
        index = _build(faiss, self.kind, vectors)
        if path is not None and beside is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
                file, note = Path(folder, path.name), Path(folder, beside.name)
                faiss.write_index(index, str(file))
                note.write_text(json.dumps(meaning), encoding="utf-8")
                # The note last: an index without it is built anew.
                beside.unlink(missing_ok=True)
                os.replace(file, path)
                os.replace(note, beside)
        return index


def _build(faiss: Any, kind: str, vectors: Any) -> Any:
    count, width = vectors.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(width)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
    else:
        cells = max(1, min(int(4 * count**0.5), count // _PER_CELL))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
    index.add(vectors)
    return index
