"""What `test_milvus_standalone.py` runs beside a standalone server."""

import socket
import sys
import threading
from typing import Any

import torch
from memory_models import fill, new_images, new_model
from milvus import MilvusServer, MilvusServerConfig

from timm_memwrap import explaining, stream_memory

IMAGES = new_images(4)


class Config(MilvusServerConfig):
    """Finds the ports of a server that was stopped just now."""

    def try_bind_port(self, port: int) -> Any:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        made.listen()
        return made


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, atol=1e-5), (found, expected)


@torch.no_grad()
def main(folder: str) -> None:
    server = MilvusServer(Config(data_dir=folder))
    server.start()
    uri = f"http://127.0.0.1:{server.listen_port}"
    for variant in ("joint", "linear identity l2", "vote"):
        bank = fill(new_model(variant), 150)
        expected, explained = bank(IMAGES), explaining.explain(bank, IMAGES)
        close(bank.use_index("milvus", uri=uri, timeout=60)(IMAGES), expected)
        model = new_model(variant).use_index("milvus", uri=uri, timeout=60)
        for one, other in zip(explaining.explain(model, IMAGES), explained, strict=True):
            assert [sample.id for sample in one.samples] == [sample.id for sample in other.samples]
            for found, known in zip(one.contenders, other.contenders, strict=True):
                assert [sample.id for sample in found.samples] == [sample.id for sample in known.samples]

    model.remember(new_images(3, seed=5), [0, 1, 2], ids=["a", "b'\"", "c"], progress=False)
    model.forget(["a", 5])
    model.relabel({"b'\"": 3})
    model.forget(classes=2)
    taught = model.engine.fetch(model)
    assert {"a", 5}.isdisjoint(taught.ids)
    assert "b'\"" in taught
    assert 2 not in taught.class_counts
    close(model(IMAGES), new_model(variant).use_index("milvus", uri=uri, timeout=60)(IMAGES))

    data = torch.utils.data.TensorDataset(new_images(150, seed=2), torch.arange(150) % 4)
    streamed, expected = new_model("joint"), fill(new_model("joint"), 150)(IMAGES)
    stream_memory(streamed, data, uri, collection="streamed", progress=False, timeout=60)
    close(streamed(IMAGES), expected)
    server.stop()
    again = threading.Timer(2.0, server.start)
    again.start()
    close(streamed(IMAGES), expected)
    again.join()
    server.stop()


if __name__ == "__main__":
    main(sys.argv[1])
