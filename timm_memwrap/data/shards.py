"""WebDataset shards with random access: a memory names single samples, which a stream cannot find again."""

import io
import tarfile
from pathlib import Path, PurePosixPath

from PIL import Image
from timm.data import get_img_extensions
from torch.utils.data import Dataset

__all__ = ["Shards"]

_LABEL = "cls"


class Shards(Dataset):
    """Images and labels of WebDataset tar files: members that share a name up to the first dot are one sample.

    The label is the sample's `.cls` member: a class index, or a class name. Only the tar headers and the labels are
    read in advance.

    Args:
        root: Folder of the shards.
        split: Part of their file names, e.g. `"train"` for `pets-train-0000.tar`; or a glob pattern.

    Raises:
        ValueError: If there are no such shards, or a sample has no label.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        pattern = split if any(sign in split for sign in "*?[") else f"*{split}*.tar"
        shards = sorted(Path(root).glob(pattern)) if Path(root).is_dir() else []
        if not shards:
            raise ValueError(
                f"There are no shards {pattern!r} in {str(root)!r}. Pass their folder, and part of their names."
            )
        self._samples: list[tuple[Path, int, int, str]] = []
        labels: list[str] = []
        for shard in shards:
            self._index(shard, labels)
        numbers = all(label.isdecimal() for label in labels)
        highest = max(map(int, labels), default=-1) if numbers else -1
        self.classes = [str(i) for i in range(highest + 1)] if numbers else sorted(set(labels))
        position = {name: i for i, name in enumerate(self.classes)}
        self.targets = [int(label) if numbers else position[label] for label in labels]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, offset, size, _ = self._samples[index]
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        return Image.open(io.BytesIO(content)), self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Returns a sample's name, as timm's data sets do: its shard and its member in it."""
        path, _, _, member = self._samples[index]
        if basename:
            return PurePosixPath(member).name
        return f"{path if absolute else path.name}/{member}"

    def _index(self, shard: Path, labels: list[str]) -> None:
        images: dict[str, tuple[int, int, str]] = {}
        found: dict[str, str] = {}
        extensions = get_img_extensions(as_set=True)
        try:
            with tarfile.open(shard) as file:
                for member in file:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = f"{folder}/{stem}"
                    if extension.lower() == _LABEL:
                        content = file.extractfile(member)
                        found[key] = content.read().decode().strip() if content is not None else ""
                    elif f".{extension.lower()}" in extensions:
                        images[key] = (member.offset_data, member.size, member.name)
        except tarfile.TarError as error:
            raise ValueError(f"{str(shard)!r} is not a whole tar file: {error}") from error
        for key, (offset, size, member_name) in images.items():
            if key not in found:
                raise ValueError(f"{member_name!r} in {str(shard)!r} has no .{_LABEL} member beside it, so no label.")
            self._samples.append((shard, offset, size, member_name))
            labels.append(found[key])
