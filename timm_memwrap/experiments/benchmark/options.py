"""What can be chosen of the benchmark."""

from dataclasses import dataclass, field

import torch

from timm_memwrap._utils import check_choice, check_count
from timm_memwrap.search.faiss_index import INDEXES

__all__ = ["PACKAGES", "Options", "Size"]

# Packages that find nearest samples, by the name that is imported.
PACKAGES = ("sklearn", "pytorch_metric_learning", "milvus_lite")
# Among them Tiny-ImageNet's, and last ImageNet's.
SIZES = ("10x1000", "200x100000", "1000x10000", "1000x50000", "1000x1281167")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Size:
    """A data set to remember."""

    classes: int
    samples: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Reads a size as it is written, e.g. `200x100000`.

        Raises:
            ValueError: If it is not a size.
        """
        classes, _, samples = text.partition("x")
        if not (classes.isdecimal() and samples.isdecimal() and 0 < int(classes) <= int(samples)):
            raise ValueError(f"sizes={text!r} is not a size. Pass classes x samples, at least one each: '200x100000'.")
        return cls(int(classes), int(samples))


@dataclass
class Options:
    """What to measure, and of what.

    Args:
        models: Backbones; by default resnet18, and in training vit_tiny_patch16_224 too.
        img_sizes: Sizes of the images; by default 224.
        batch_sizes: Images at a time; by default 1 and 32.
        bank_sizes: Samples in the memory; by default 1000 and 100000.
        parts: What to measure: inference, compiled, onnx, read, stateless, sizes, training, explain, import, save,
            push; by default all but push, which goes to a Hub on loopback that HF_ENDPOINT names.
        device: A torch device.
        dtype: Type of weights and images in inference: float32, bfloat16 or float16.
        rounds: How often each thing is measured.
        width: Width of the encodings where the read alone is measured.
        peers: What else to search with in the part read: the faiss indexes flat, ivf and hnsw, and the packages
            sklearn, pytorch_metric_learning and milvus_lite; by default all that are installed. Of a million samples,
            some take minutes to be made ready.
        namespace: Owner of the repositories that a push creates.
        sizes: Data sets of the part sizes, as classes x samples, e.g. 200x100000.
        largest: Most samples that the part sizes makes; what more of them cost is extrapolated, and marked so.
        training_batch_sizes: Images at a time in training; by default 64 and 128.
    """

    models: list[str] | None = None
    img_sizes: list[int] = field(default_factory=lambda: [224])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    bank_sizes: list[int] = field(default_factory=lambda: [1000, 100_000])
    parts: list[str] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 9
    width: int = 512
    peers: list[str] = field(default_factory=lambda: [*INDEXES, *PACKAGES])
    namespace: str = "me"
    sizes: list[str] = field(default_factory=lambda: list(SIZES))
    largest: int = 100_000
    training_batch_sizes: list[int] = field(default_factory=lambda: [64, 128])

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_count("rounds", self.rounds)
        # A sixteenth of it is measured too.
        check_count("largest", self.largest, at_least=16)
        for peer in self.peers:
            check_choice("peer", peer, (*INDEXES, *PACKAGES))
        for size in self.sizes:
            Size.parse(size)

    @property
    def backbones(self) -> list[str]:
        """Backbones to measure with, other than in training."""
        return self.models or ["resnet18"]

    @property
    def trained_backbones(self) -> list[str]:
        """Backbones to train."""
        return self.models or ["resnet18", "vit_tiny_patch16_224"]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of weights and images in inference."""
        return getattr(torch, self.dtype)
