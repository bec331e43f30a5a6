"""The queue of recent encodings: a ring, of which a sample does not see itself."""

import copy

import pytest
import torch
from torch import Tensor

from timm_memwrap.encoding_queue import EncodingQueue


def _rows(start: int, count: int) -> Tensor:
    """Encodings that say which they are."""
    return torch.arange(start, start + count).float().unsqueeze(1).expand(-1, 3).clone()


def _held(queue: EncodingQueue) -> list[int]:
    filled = ~queue.empty_entries(1)[0]
    assert bool((queue.encodings[filled] == queue.encodings[filled][:, :1]).all())
    return sorted(int(row[0]) for row in queue.encodings[filled])


def test_a_new_queue_is_empty() -> None:
    queue = EncodingQueue(5, 3)
    assert len(queue) == 0
    assert queue.empty_entries(2).tolist() == [[True] * 5] * 2


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7])
def test_the_last_encodings_are_kept_and_no_more(batch: int) -> None:
    queue = EncodingQueue(5, 3)
    for step in range(6):
        queue.append(_rows(step * batch, batch))
        seen = (step + 1) * batch
        assert _held(queue) == list(range(max(0, seen - 5), seen))
        assert len(queue) == min(5, seen)


@pytest.mark.parametrize("batch", [5, 6, 12])
def test_of_a_batch_larger_than_the_queue_its_last_encodings_are_kept_with_their_positions(batch: int) -> None:
    queue = EncodingQueue(5, 3)
    queue.append(_rows(100, 2), torch.tensor([100, 101]))
    queue.append(_rows(0, batch), torch.arange(batch))
    assert _held(queue) == list(range(batch - 5, batch))
    assert torch.equal(queue.encodings[:, 0].long(), queue.positions)
    # The oldest goes first, whatever the size of the batch before.
    queue.append(_rows(50, 1), torch.tensor([50]))
    assert _held(queue) == [*range(batch - 4, batch), 50]


def test_a_sample_does_not_see_its_own_earlier_encoding_nor_an_empty_entry() -> None:
    queue = EncodingQueue(5, 3)
    queue.append(_rows(0, 3), torch.tensor([7, 8, 7]))
    assert queue.hidden_from(torch.tensor([7, 8, 9])).tolist() == [
        [True, False, True, True, True],
        [False, True, False, True, True],
        [False, False, False, True, True],
    ]


def test_entries_have_no_gradient_and_do_not_follow_what_was_appended() -> None:
    queue = EncodingQueue(5, 3)
    encodings = _rows(0, 2).requires_grad_()
    queue.append(encodings * 1)
    assert not queue.encodings.requires_grad
    with torch.no_grad():
        encodings.zero_()
    assert _held(queue) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_entries_are_float32_whatever_is_appended(dtype: torch.dtype) -> None:
    queue = EncodingQueue(5, 3)
    queue.append(_rows(1, 2).to(dtype))
    assert queue.encodings.dtype == torch.float32
    assert _held(queue) == [1, 2]


def test_a_state_dict_brings_the_entries_and_their_order_back() -> None:
    queue, other = EncodingQueue(5, 3), EncodingQueue(5, 3)
    queue.append(_rows(0, 7), torch.arange(7))
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    for one in (queue, other):
        one.append(_rows(7, 2), torch.tensor([7, 8]))
        assert _held(one) == [4, 5, 6, 7, 8]
    assert torch.equal(queue.positions, other.positions)


def test_a_queue_moves() -> None:
    queue = EncodingQueue(5, 3)
    assert queue.to(torch.device("meta")) is queue
    assert all(tensor.is_meta for tensor in queue.state_dict().values())
    queue.append(torch.zeros(2, 3, device="meta"))
