"""A tensor with room behind it, so that adding rows costs what is added and not what is there."""

import threading
from collections.abc import Mapping

from torch import Tensor

__all__ = ["Rows", "add_rows"]

# One row in so many is room: then as many copies are made of each row over the life of a memory, however long it grows.
_ROOM = 8

_ADDING = threading.Lock()


class Rows:
    """A copy of rows `[M, ...]` with room behind it.

    `tensor` and what `added` returns are parts of one storage. Rows once written are never written again, so each
    stays as it is when others are added.
    """

    def __init__(self, rows: Tensor, more: int = 0) -> None:
        count = len(rows)
        self._storage = rows.new_empty((count + max(more, count // _ROOM), *rows.shape[1:]))
        self._storage[:count] = rows
        # Whoever pickles a tensor writes its whole storage.
        self._storage[count:] = 0
        self._count = count
        self.tensor = self._first(count)

    def _first(self, count: int) -> Tensor:
        # Not detach, by which all parts would count as written to when a row is added.
        return self._storage.data[:count]

    def added(self, tensor: Tensor, rows: Tensor) -> Tensor | None:
        """Returns `tensor`, which is these rows, and others behind it; `None` if there is no room."""
        start, end = len(tensor), len(tensor) + len(rows)
        with _ADDING:
            if start != self._count or end > len(self._storage) or tensor.data_ptr() != self._storage.data_ptr():
                return None
            self._count = end
        self._storage.data[start:end] = rows
        return self._first(end)


def add_rows(
    known: dict[str, Rows], tensors: Mapping[str, Tensor | None], new: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Returns tensors and new rows behind them, in the room that is known for their names, or in larger ones."""
    longer = {}
    for name, rows in new.items():
        tensor = tensors[name]
        if rows is None or tensor is None:
            continue
        grown = known[name].added(tensor, rows) if name in known else None
        if grown is None:
            known[name] = Rows(tensor, len(rows))
            grown = known[name].added(known[name].tensor, rows)
            assert grown is not None
        longer[name] = grown
    return longer
