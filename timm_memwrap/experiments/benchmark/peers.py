"""Other packages that find the nearest samples of a query, each called as its documentation has it."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_memwrap.experiments.benchmark.options import PACKAGES, Options
from timm_memwrap.experiments.benchmark.subjects import missing_of

__all__ = ["Search", "peers"]

# Searches for the nearest samples of queries `[B, D]`.
Search = Callable[[Tensor], Any]

# How many are looked for: what an exact search looks at first.
_NEAREST = 64
_INSERTED_AT_A_TIME = 1000


@contextmanager
def peers(options: Options, vectors: Tensor, labels: Tensor) -> Iterator[dict[str, Search]]:
    """Yields searches among vectors `[M, D]` of length 1 by inner product, for those packages that are installed.

    What is not is named in the log. On a device, only what runs there is compared.
    """
    chosen = [name for name in PACKAGES if name in options.peers and (options.device == "cpu" or name in _ON_DEVICES)]
    missing = missing_of(*chosen)
    vectors = vectors.to(options.device)
    with ExitStack() as stack:
        yield dict(
            stack.enter_context(_MAKE[name](vectors, labels, min(_NEAREST, len(vectors))))
            for name in chosen
            if name not in missing
        )


@contextmanager
def _scikit_learn(vectors: Tensor, labels: Tensor, count: int) -> Iterator[tuple[str, Search]]:
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(count, algorithm="brute", metric="cosine").fit(vectors.numpy(), labels.numpy())
    yield f"scikit-learn, {count} nearest", lambda queries: model.predict(queries.numpy())


@contextmanager
def _metric_learning(vectors: Tensor, labels: Tensor, count: int) -> Iterator[tuple[str, Search]]:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.inference import CustomKNN

    search = CustomKNN(CosineSimilarity())
    yield f"pytorch-metric-learning, {count} nearest", lambda queries: search(queries, count, vectors)


@contextmanager
def _milvus(vectors: Tensor, labels: Tensor, count: int) -> Iterator[tuple[str, Search]]:
    from pymilvus import DataType, MilvusClient

    with tempfile.TemporaryDirectory() as folder:
        client = MilvusClient(uri=str(Path(folder, "bank.db")))
        schema = MilvusClient.create_schema()
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        index = MilvusClient.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="IP")
        client.create_collection("bank", schema=schema)
        array = vectors.numpy()
        for start in range(0, len(array), _INSERTED_AT_A_TIME):
            rows = array[start : start + _INSERTED_AT_A_TIME]
            client.insert("bank", [{"id": start + i, "vector": row} for i, row in enumerate(rows)])
        # What is not sealed is searched another way, ten times as long.
        client.flush("bank")
        # The embedded engine lacks the call to wait for it, and is ready all the same.
        client.create_index("bank", index, sync=False)
        client.load_collection("bank")
        try:
            yield (
                f"Milvus Lite, {count} nearest",
                lambda queries: client.search("bank", list(queries.numpy()), limit=count, output_fields=["id"]),
            )
        finally:
            client.close()


_Make = Callable[[Tensor, Tensor, int], AbstractContextManager[tuple[str, Search]]]
_MAKE: dict[str, _Make] = dict(zip(PACKAGES, (_scikit_learn, _metric_learning, _milvus), strict=True))
_ON_DEVICES = ("pytorch_metric_learning",)
