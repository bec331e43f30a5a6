"""Names of memory samples: unique, in memory order, and cheap to add to."""

import operator
import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, overload

__all__ = ["SampleId", "SampleIds", "known_ids", "no_sample", "plain_ids", "public_ids", "short_name"]

SampleId = int | str

_ADDING = threading.Lock()


class SampleIds(Sequence[SampleId]):
    """Unique ids in memory order. They never change; `added` returns more at the price of what is added.

    Both share one list, of which each knows how much is its own.

    Raises:
        ValueError: If an id is neither text nor a whole number, or comes twice.
    """

    def __init__(self, ids: Iterable[Any] = ()) -> None:
        self._ids = plain_ids(ids)
        self._count = len(self._ids)
        self._positions = {sample_id: position for position, sample_id in enumerate(self._ids)}
        if len(self._positions) != self._count:
            twice = [sample_id for sample_id, count in Counter(self._ids).items() if count > 1]
            raise ValueError(f"Ids must be unique; {twice[:5]} come more than once. Remember a sample once.")

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> SampleId: ...

    @overload
    def __getitem__(self, index: slice) -> list[SampleId]: ...

    def __getitem__(self, index: int | slice) -> SampleId | list[SampleId]:
        if isinstance(index, slice):
            return self._ids[: self._count][index]
        return self._ids[range(self._count)[index]]

    def __contains__(self, sample_id: object) -> bool:
        return self._positions.get(sample_id, self._count) < self._count  # type: ignore[call-overload]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SampleIds) and self[:] == other[:]

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleIds, (self[:],)

    def __deepcopy__(self, memo: dict) -> "SampleIds":
        return self

    def positions(self, ids: Iterable[SampleId]) -> list[int]:
        """Returns the positions of ids, or raises a `ValueError` if one is not among them."""
        wanted = [ids] if isinstance(ids, str | int) else list(ids)
        unknown = [sample_id for sample_id in wanted if sample_id not in self]
        if unknown:
            raise ValueError(f"{no_sample(unknown, len(self))} Its ids are in bank.ids, e.g. {self[:3]}.")
        return [self._positions[sample_id] for sample_id in wanted]

    def new(self, ids: Iterable[Any]) -> "SampleIds":
        """Returns other ids alone, or raises a `ValueError` if one is known or comes twice."""
        new = ids if isinstance(ids, SampleIds) else SampleIds(ids)
        known = [sample_id for sample_id in new if sample_id in self]
        if known:
            raise known_ids(known)
        return new

    def added(self, ids: Iterable[Any]) -> "SampleIds":
        """Returns these ids and, behind them, others; raises a `ValueError` as `new` does."""
        new = self.new(ids)
        with _ADDING:
            # Behind ids that others have been added to, there is no room.
            base = self if len(self._ids) == self._count else SampleIds(self[:])
            base._ids.extend(new)
            base._positions.update(zip(new, range(self._count, len(base._ids)), strict=True))
        longer = object.__new__(SampleIds)
        longer._ids, longer._positions, longer._count = base._ids, base._positions, len(base._ids)
        return longer


def no_sample(ids: Sequence[SampleId], size: int) -> str:
    """Says that a memory of so many samples has none with these ids."""
    return f"No sample with id {_listed(ids)} in the memory of {size:,} samples."


def known_ids(ids: Sequence[SampleId]) -> ValueError:
    """Returns the error for ids that a memory has already."""
    return ValueError(
        f"The memory has {_listed(ids)} already. Forget what is there first, or give the new samples other ids."
    )


def _listed(ids: Sequence[SampleId]) -> str:
    return f"{', '.join(map(repr, ids[:5]))}{' ...' if len(ids) > 5 else ''}"


def plain_ids(ids: Iterable[Any]) -> list[SampleId]:
    """Returns ids that JSON brings back as they are: text, and whole numbers of any library."""
    plain: list[SampleId] = []
    for sample_id in ids:
        try:
            plain.append(sample_id if isinstance(sample_id, str) else operator.index(sample_id))
        except TypeError:
            raise ValueError(
                f"Id {sample_id!r} is neither text nor a whole number. Pass file names or positions."
            ) from None
    return plain


def short_name(path: str, folder: str = "") -> str:
    """Returns the last part of a path or link of any system, and with it the last folder if that is `folder`."""
    if "://" in path:
        # The query of a link may hold a token.
        path = re.split(r"[?#]", path, maxsplit=1)[0]
    if not re.search(r"[/\\]", path):
        return path
    parts = re.split(r"[/\\]+", path.rstrip("/\\"))
    keeps_folder = bool(folder) and parts[-2:-1] == [folder]
    return "/".join(parts[-2:] if keeps_folder else parts[-1:]) or "unnamed"


def public_ids(ids: Iterable[SampleId], classes: Iterable[str]) -> list[SampleId]:
    """Returns ids without the paths of this machine, still unique; a folder that is the sample's class name stays."""
    reduced = [i if isinstance(i, int) else short_name(i, name) for i, name in zip(ids, classes, strict=True)]
    taken = {new for new, old in zip(reduced, ids, strict=True) if new == old}
    public: list[SampleId] = []
    # The first number of each name that may be free. All below it are taken, and stay so.
    first: dict[SampleId, int] = {}
    for new, old in zip(reduced, ids, strict=True):
        candidate, number = new, first.get(new, 1)
        while new != old and (candidate := f"{new} ({number})" if number > 1 else new) in taken:
            number += 1
        if new != old:
            first[new] = number + 1
        public.append(candidate)
        taken.add(candidate)
    return public
