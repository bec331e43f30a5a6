"""The data set of a memory's pictures: Parquet files as Hugging Face `datasets` reads them, and where each picture is.

The Parquet files are for the viewer and for `datasets`. A figure needs a handful of pictures, which it finds by an
index: the bytes of each lie in one piece, so that it is fetched alone, without a reader of Parquet.

Shapes: N pictures, E width of an encoding.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from timm_memwrap._utils import optional_import
from timm_memwrap.sample_ids import SampleId
from timm_memwrap.tensor_files import FileError, read_tensors, write_tensors

__all__ = [
    "INDEX_FILE",
    "MOST_BYTES",
    "MOST_PIXELS",
    "ImageIndex",
    "encoded_image",
    "features_of",
    "key_of",
    "write_tables",
]

INDEX_FILE = "memory_images.safetensors"
# Of a picture: what is written fits, and what is larger is not read.
MOST_BYTES, MOST_PIXELS = 2**26, 2**26
# How many numbers tell an encoding from others.
_KEY = 16
# Bytes of pictures in a file, and pictures in a row group: the viewer of the Hub loads one of these at a time.
_FILE_BYTES, _GROUP = 2**27, 100
_JPEG = b"\xff\xd8"
# Up to this many pixels a side, artefacts of JPEG would show, and PNG is as small.
_LOSSLESS = 128


@dataclass(frozen=True)
class ImageIndex:
    """Where the pictures of memory samples are.

    Args:
        keys: `key_of` the samples' encodings `[N, 16]`.
        files: The Parquet file of each, a position in `names`, `[N]`.
        offsets: Where its bytes begin in that file `[N]`.
        sizes: How many they are `[N]`.
        names: Paths of the Parquet files.
    """

    keys: Tensor
    files: Tensor
    offsets: Tensor
    sizes: Tensor
    names: list[str]

    def save(self, path: Path) -> None:
        """Writes the index as a safetensors file."""
        tensors = {"keys": self.keys, "files": self.files, "offsets": self.offsets, "sizes": self.sizes}
        write_tensors(tensors, path, {"files": json.dumps(self.names)})

    @classmethod
    def load(cls, path: Path, name: str) -> "ImageIndex":
        """Reads and checks what `save` wrote, or raises a `FileError`; `name` is for it."""
        file = read_tensors(path, name, "Push the pictures again.")
        try:
            names = json.loads(file.metadata.get("files", "null"))
        except (ValueError, RecursionError):
            names = None
        parts = (file.tensors.get(part, torch.empty(0)) for part in ("keys", "files", "offsets", "sizes"))
        keys, files, offsets, sizes = parts
        valid = (
            isinstance(names, list)
            and all(isinstance(each, str) and each.startswith("data/") and ".." not in each for each in names)
            and keys.dtype == torch.float32
            and keys.ndim == 2
            and keys.shape[1] == _KEY
            and len(keys) > 0
            and all(part.dtype == torch.int64 and part.shape == keys.shape[:1] for part in (files, offsets, sizes))
            and all(bool((part >= 0).all()) for part in (files, offsets, sizes))
            and bool((files < len(names)).all())
            and bool((sizes <= MOST_BYTES).all())
        )
        if not valid:
            raise FileError(f"{name} is not an index of pictures that push_memory_images wrote. Push them again.")
        return cls(keys, files, offsets, sizes, names)

    def find(self, key: Tensor) -> int | None:
        """Returns which picture is of the sample with this key `[16]`; `None` if none is."""
        distances = (self.keys - key).norm(dim=1)
        nearest = int(distances.argmin())
        # Encodings that were stored in bfloat16 since differ by less.
        return nearest if float(distances[nearest]) <= 2**-9 * float(key.norm()) else None


def key_of(encodings: Tensor) -> Tensor:
    """Returns what tells the pictures of memory samples apart `[N, 16]`: means of parts of their encodings `[N, E]`.

    An id does not: it is shortened when it is published, and after `forget` another sample may have it.
    """
    parts = [F.adaptive_avg_pool1d(part.float().cpu().unsqueeze(1), _KEY).squeeze(1) for part in encodings.split(65536)]
    return torch.cat(parts)


def encoded_image(picture: np.ndarray, max_size: int) -> bytes:
    """Returns a picture `[H, W, 3]` as the bytes of a JPEG or, if it is small, PNG file, with no metadata at all."""
    image = Image.fromarray(picture)
    image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if max(image.size) <= _LOSSLESS:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=90)
    return file.getvalue()


def features_of(ids: Iterable[SampleId], class_names: Iterable[str], multi_label: bool) -> dict[str, Any]:
    """Returns the columns as `datasets` describes them in the schema of a Parquet file."""
    label: dict[str, Any] = {"names": _unique(map(_text, class_names)), "_type": "ClassLabel"}
    numbers = all(isinstance(each, int) for each in ids)
    return {
        "image": {"_type": "Image"},
        "label": {"feature": label, "_type": "Sequence"} if multi_label else label,
        "id": {"dtype": "int64" if numbers else "string", "_type": "Value"},
    }


def write_tables(
    folder: Path,
    images: Iterable[bytes],
    labels: Tensor,
    ids: list[SampleId],
    keys: Tensor,
    features: Mapping[str, Any],
) -> list[Path]:
    """Writes pictures, labels `[N]` or multi-hot `[N, C]`, and ids to Parquet files and an index in an empty folder.

    Returns the files, the index last.
    """
    arrow = optional_import("pyarrow", extra="images", what="A data set of pictures")
    parquet = optional_import("pyarrow.parquet", extra="images", what="A data set of pictures")
    integers, text = arrow.int64(), arrow.string()
    fields = {
        "image": arrow.struct({"bytes": arrow.binary(), "path": text}),
        "label": integers if labels.ndim == 1 else arrow.list_(integers),
        "id": integers if features["id"]["dtype"] == "int64" else text,
    }
    schema = arrow.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
    values = labels.tolist() if labels.ndim == 1 else [row.nonzero().flatten().tolist() for row in labels]
    names = ids if features["id"]["dtype"] == "int64" else [_text(str(each)) for each in ids]
    (folder / "data").mkdir()
    files, sizes, places = list[Path](), list[int](), list[tuple[int, int]]()
    for contents in _parts(images):
        rows = []
        for i, content in enumerate(contents, start=len(sizes)):
            image = {"bytes": content, "path": f"{i:06d}.{'jpg' if content.startswith(_JPEG) else 'png'}"}
            rows.append({"image": image, "label": values[i], "id": names[i]})
        path = folder / "data" / f"{len(files)}.parquet"
        # Neither compressed, which they are, nor by a dictionary: so the bytes of a picture lie in one piece.
        parquet.write_table(
            arrow.Table.from_pylist(rows, schema),
            path,
            row_group_size=_GROUP,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
        places += [(len(files), offset) for offset in _offsets(path.read_bytes(), contents)]
        sizes += map(len, contents)
        files.append(path)
    renamed = [
        path.rename(path.with_name(f"train-{i:05d}-of-{len(files):05d}.parquet")) for i, path in enumerate(files)
    ]
    of_file, offsets = torch.tensor(places, dtype=torch.int64).T.contiguous()
    index = ImageIndex(keys, of_file, offsets, torch.tensor(sizes), [f"data/{path.name}" for path in renamed])
    index.save(folder / INDEX_FILE)
    return [*renamed, folder / INDEX_FILE]


def _parts(images: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yields pictures in lists, one for each file."""
    part, size = list[bytes](), 0
    for content in images:
        part.append(content)
        size += len(content)
        if size >= _FILE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _offsets(file: bytes, contents: Iterable[bytes]) -> Iterator[int]:
    """Yields where each of these contents is in a file, one behind the other."""
    end = 0
    for content in contents:
        start = file.index(content, end)
        end = start + len(content)
        yield start


def _unique(names: Iterable[str]) -> list[str]:
    """Numbers names that come again, as some of ImageNet's do: `datasets` takes none twice."""
    unique: dict[str, None] = {}
    for name in names:
        number = 1
        new = name
        while new in unique:
            number += 1
            new = f"{name} ({number})"
        unique[new] = None
    return list(unique)


def _text(text: str) -> str:
    """Returns text that is Unicode: the name of a file need not be."""
    return text.encode(errors="backslashreplace").decode()
