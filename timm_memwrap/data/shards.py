"""WebDataset shards with random access: a memory names single samples, which a stream cannot find again."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image
from timm.data import get_img_extensions
from torch.utils.data import Dataset

__all__ = ["Shards"]


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
        self._samples = [(shard, image) for shard, image, _ in samples]
        labels = [label for *_, label in samples]
        numbers = all(label.isdecimal() for label in labels)
        self.classes = [] if numbers else sorted(set(labels))
        numbered = {name: i for i, name in enumerate(self.classes)}
        self.targets = [int(label) if numbers else numbered[label] for label in labels]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        shard, (_, offset, size) = self._samples[index]
        with shard.open("rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))), self.targets[index]

    def filename(self, index: int) -> str:
        """Returns a sample's shard and its image in it."""
        shard, (name, *_) = self._samples[index]
        return f"{shard.name}/{name}"


def _read_shard(shard: Path) -> Iterator[tuple[Path, tuple[str, int, int], str]]:
    """Yields each sample's shard, its image's name, offset and size there, and its label."""
    images: dict[PurePosixPath, tuple[str, int, int]] = {}
    labels: dict[PurePosixPath, str] = {}
    extensions = get_img_extensions(as_set=True)
    try:
        with tarfile.open(shard) as file:
            for member in file:
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                if extension.lower() == "cls" and (content := file.extractfile(member)):
                    labels[path.parent / stem] = content.read().decode().strip()
                elif f".{extension.lower()}" in extensions:
                    images[path.parent / stem] = (member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{str(shard)!r} is not a whole tar file: {error}") from error
    for key, image in images.items():
        if key not in labels:
            raise ValueError(f"{image[0]!r} in {str(shard)!r} has no .cls member beside it, so no label.")
        yield shard, image, labels[key]
