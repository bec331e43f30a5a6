"""A model for the tests of the Hub: small, with a memory that has what must not leave."""

import timm
import torch
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import MemoryWrapModel


def make_model(store_images: bool = True, seed: int = 0) -> MemoryWrapModel:
    torch.manual_seed(seed)
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3))
    # What a pixel is worth differs from sample to sample, so that nothing in the memory is alike.
    data = TensorDataset(torch.randn(12, 3, 64, 64), torch.arange(12) % 3)
    names = ["cat", "dog", "a|b <i>*c*</i>"]
    timm_memwrap.build_memory_bank(
        model, data, size=None, store_images=store_images, progress=False, class_names=names, dataset_name="pets"
    )
    ids = [f"/home/me/pets/{'cat' if i % 2 else 'dog'}/{i // 2:04}.png" for i in range(12)]
    bank = model.memory_bank
    bank.replace(bank.encodings, bank.labels, ids, bank.images, bank.class_names, bank.provenance)
    return model.eval()
