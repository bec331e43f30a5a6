"""WebDataset shards with random access: a memory names single samples, which a stream cannot find again."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image
from torch.utils.data import Dataset

from timm_memwrap.data.reading import SUFFIXES
from timm_memwrap.data.tars import Member, members

__all__ = ["Shards"]

# Bytes of a label.
_LONGEST_LABEL = 1000


class Shards(Dataset):
    """Images and labels of the WebDataset tar files whose names have `split` in them, or match it as a glob pattern.

    Members that share a name up to the first dot are one sample, and its `.cls` member is its class, by index or name.
    Only the tar headers and the labels are read in advance.
    """

    def __init__(self, root: str, split: str) -> None:
        pattern = split if set(split) & set("*?[") else f"*{split}*.tar"
        shards = sorted(Path(root).glob(pattern))
        if not shards:
            raise ValueError(
                f"There are no shards {pattern!r} in {root!r}. Pass their folder, and part of their names."
            )
        samples = [sample for shard in shards for sample in _read_shard(shard)]
        self._samples = [image for image, _ in samples]
        labels = [label for _, label in samples]
        numbers = all(label.isdecimal() for label in labels)
        self.classes = [] if numbers else sorted(set(labels))
        numbered = {name: i for i, name in enumerate(self.classes)}
        self.targets = [int(label) if numbers else numbered[label] for label in labels]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self._samples[index].open()), self.targets[index]

    def filename(self, index: int) -> str:
        """Returns a sample's shard and its image in it."""
        image = self._samples[index]
        return f"{image.tar.name}/{image.name}"


def _read_shard(shard: Path) -> Iterator[tuple[Member, str]]:
    """Yields the image and the label of each sample."""
    images: dict[PurePosixPath, Member] = {}
    labels: dict[PurePosixPath, str] = {}
    for member in members(shard):
        stem, _, extension = member.name.name.partition(".")
        key = member.name.parent / stem
        if extension.lower() == "cls":
            if member.size > _LONGEST_LABEL:
                raise ValueError(f"{str(member.name)!r} in {str(shard)!r} has {member.size:,} bytes: it is no label.")
            labels[key] = member.open().read().decode(errors="replace").strip()
        elif f".{extension.lower()}" in SUFFIXES:
            images[key] = member
    for key, image in images.items():
        if key not in labels:
            raise ValueError(f"{str(image.name)!r} in {str(shard)!r} has no .cls member beside it, so no label.")
        yield image, labels[key]
