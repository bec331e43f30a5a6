"""The nearest samples of each class, against a loop over queries, classes and samples."""

import pytest
import torch
from torch import Tensor

from timm_memwrap.search import ClassIndex, by_class


def _nearest(queries: Tensor, encodings: Tensor, labels: Tensor, classes: Tensor, count: int) -> list[list[list[int]]]:
    """Returns positions by input and class, from cosines of float64 computed one by one."""
    wide, found = encodings[:, : queries.shape[1]].double(), []
    for query, asked in zip(queries.double(), classes.tolist(), strict=True):
        cosines = [float(query @ key / (query.norm() * key.norm()).clamp(min=1e-300)) for key in wide]
        found.append([
            sorted((i for i in range(len(labels)) if int(labels[i]) == one), key=lambda i: (-cosines[i], i))[:count]
            for one in asked
        ])  # fmt: skip
    return found


def _index(queries: Tensor, encodings: Tensor, labels: Tensor) -> ClassIndex:
    return ClassIndex(encodings, labels, queries.shape[1], queries.dtype)


def _search(queries: Tensor, encodings: Tensor, labels: Tensor, classes: Tensor, count: int) -> list[list[list[int]]]:
    similarities, positions = _index(queries, encodings, labels).nearest(queries, classes, count)
    assert similarities.dtype == queries.dtype
    assert torch.equal(positions < 0, similarities == -torch.inf)
    return [[[i for i in one if i >= 0] for one in asked] for asked in positions.tolist()]


def _parts(size: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns queries of 5 columns, encodings with 2 more, labels of 6 classes, and 3 classes for each query."""
    generator = torch.Generator().manual_seed(size)
    queries, encodings = torch.randn(7, 5, generator=generator), torch.randn(size, 7, generator=generator)
    # Far larger than what is compared.
    encodings[:, 5:] *= 100
    labels = torch.randint(6, (size,), generator=generator)
    return queries, encodings.to(dtype), labels, torch.rand(7, 6, generator=generator).argsort(dim=1)[:, :3]


@pytest.fixture(params=[1, 3, 2**13], ids="blocks of {}".format)
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(by_class, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("size", [1, 4, 50])
@pytest.mark.parametrize("count", [1, 3, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_finds_the_nearest_of_each_class(size: int, count: int, dtype: torch.dtype, block_size: int) -> None:
    queries, encodings, labels, classes = _parts(size, dtype)
    expected = _nearest(queries, encodings, labels, classes, count)
    assert _search(queries, encodings, labels, classes, count) == expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, [0, 1]), (torch.float64, [1, 0])])
def test_samples_are_compared_in_the_precision_of_the_queries(
    dtype: torch.dtype, expected: list[int], block_size: int
) -> None:
    query = torch.tensor([[1.0, 2.0, 2.0]], dtype=dtype)
    # Its cosine is below 1 by 1e-13, which float32 cannot tell from 1.
    keys = torch.tensor([[1.0, 2.0, 2.0 + 1e-6], [1.0, 2.0, 2.0]], dtype=torch.float64)
    found = _search(query, keys, torch.zeros(2, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), 2)
    assert found == [[expected]]


def test_of_equal_samples_the_first_comes_first(block_size: int) -> None:
    # Sums of powers of two, which are exact in whatever order they are taken.
    keys = torch.tensor([[4.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0]]).repeat(5, 1)
    labels, classes = torch.arange(20) % 2, torch.tensor([[1, 0], [0, 1]])
    found = _search(torch.tensor([[2.0, 0.0], [0.0, 8.0]]), keys, labels, classes, 3)
    assert found == [[[1, 3, 5], [0, 2, 4]], [[0, 2, 4], [1, 3, 5]]]


def test_similarities_are_cosines_also_of_zeros(block_size: int) -> None:
    encodings = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-30.0, -40.0]])
    queries, labels = torch.tensor([[0.3, 0.4], [0.0, 0.0]]), torch.zeros(3, dtype=torch.long)
    similarities, positions = _index(queries, encodings, labels).nearest(queries, torch.tensor([[0], [0]]), 3)
    torch.testing.assert_close(similarities, torch.tensor([[[1.0, 0.0, -1.0]], [[0.0, 0.0, 0.0]]]))
    assert positions.tolist() == [[[1, 0, 2]], [[0, 1, 2]]]


def test_a_class_without_samples_has_none(block_size: int) -> None:
    queries, encodings, labels, _ = _parts()
    # Beyond the largest label, and between others.
    classes = torch.tensor([[9, 2, 1]]).expand(7, 3)
    found = _search(queries, encodings, labels.masked_fill(labels == 2, 3), classes, 4)
    assert all(len(one) == 3 and one[0] == one[1] == [] and len(one[2]) == 4 for one in found)


def test_nothing_of_the_size_of_the_memory_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, encodings, labels, classes = _parts(5000)
    index = _index(queries, encodings, labels)
    monkeypatch.setattr(by_class, "_BLOCK", 100)
    largest = 0

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watching():
        index.nearest(queries, classes, 3)
    # Seven queries by a block, or a block of encodings.
    assert largest <= 7 * 100


@pytest.mark.parametrize("size", [1, 4, 50])
@pytest.mark.parametrize("count", [1, 3, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sample_of_several_classes_is_found_for_each(
    size: int, count: int, dtype: torch.dtype, block_size: int
) -> None:
    queries, encodings, _, classes = _parts(size, dtype)
    # Of 5 classes; no sample says anything of the sixth, which came later.
    labels = (torch.rand(size, 5, generator=torch.Generator().manual_seed(size)) < 0.4).to(torch.uint8)
    similarities, positions = _index(queries, encodings, labels).nearest(queries, classes, count)
    assert positions.shape == (7, 3, count)
    for label in range(6):
        of_class = [i for i in range(size) if label < 5 and labels[i, label]]
        rows = (classes == label).nonzero().tolist()
        if not of_class:
            assert all((positions[row, place] == -1).all() for row, place in rows)
            continue
        alone = torch.where(torch.tensor([i in of_class for i in range(size)]), 0, 1)
        expected = _search(queries, encodings, alone, torch.zeros(7, 1, dtype=torch.long), count)
        for row, place in rows:
            found = [i for i in positions[row, place].tolist() if i >= 0]
            assert found == expected[row][0]
            assert similarities[row, place, : len(found)].isfinite().all()
