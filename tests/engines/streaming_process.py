"""What each process of `test_processes_stream_their_shares` runs."""

import sys

import torch
import torch.distributed as dist
from memory_models import new_images, new_model

from timm_memwrap import stream_memory

if __name__ == "__main__":
    dist.init_process_group("gloo")
    model, data = new_model("joint"), torch.utils.data.TensorDataset(new_images(40, seed=2), torch.arange(40) % 4)
    stream_memory(model, data, sys.argv[1], progress=False, distributed=True)
    assert model.engine is not None and model.engine.open(model).size == 40  # noqa: PT018
    dist.destroy_process_group()
