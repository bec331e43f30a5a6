"""Rows that grow in place: what is there is neither copied nor changed."""

import pytest
import torch

from timm_memwrap.rows import Rows, add_rows


def test_rows_are_added_in_place_while_there_is_room() -> None:
    old, new = torch.arange(64.0).view(32, 2), torch.full((3, 2), 7.0)
    rows = Rows(old)
    first, version = rows.tensor, rows.tensor._version
    longer = rows.added(first, new)
    assert longer is not None
    assert torch.equal(longer, torch.cat([old, new]))
    assert torch.equal(first, old)
    assert longer.data_ptr() == first.data_ptr()
    assert first._version == version, "a gradient that needs the first would fail"
    assert rows.added(longer, new) is None, "no room is left for three"
    assert rows.added(first, new) is None, "others stand behind the first"


def test_rows_of_another_tensor_are_not_added() -> None:
    rows = Rows(torch.zeros(32, 2))
    assert rows.added(rows.tensor.clone(), torch.ones(1, 2)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("sizes", [[1] * 40, [3, 50, 1, 1, 200, 2]])
def test_rows_added_one_after_the_other_are_those_added_at_once(dtype: torch.dtype, sizes: list[int]) -> None:
    parts = [torch.full((size, 3), i, dtype=dtype) for i, size in enumerate(sizes)]
    known: dict[str, Rows] = {}
    tensor, seen, storages = parts[0], [], set()
    for part in parts[1:]:
        tensor = add_rows(known, {"name": tensor}, {"name": part})["name"]
        seen.append((tensor, tensor.clone()))
        storages.add(tensor.data_ptr())
    assert torch.equal(tensor, torch.cat(parts))
    assert all(torch.equal(now, then) for now, then in seen)
    assert len(storages) < len(sizes)


def test_the_room_behind_rows_holds_nothing() -> None:
    storage = Rows(torch.ones(100, 4)).tensor.untyped_storage()
    assert len(storage) > 1600
    assert not any(storage[1600:])
