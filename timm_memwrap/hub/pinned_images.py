"""Fetches single pictures of a memory from the data set on the Hugging Face Hub that its bank names."""

import io
import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfFileSystem, cached_assets_path
from huggingface_hub.errors import HTTPError
from PIL import Image

from timm_memwrap._utils import printable, replacing
from timm_memwrap.data import ImageError, read_picture
from timm_memwrap.hub.client import hub_api
from timm_memwrap.hub.image_tables import INDEX_FILE, MOST_PIXELS, ImageIndex, key_of
from timm_memwrap.hub.pins import image_dataset
from timm_memwrap.memory_bank import MemoryBank, SampleId
from timm_memwrap.tensor_files import FileError

__all__ = ["PinnedImages"]

_logger = logging.getLogger(__name__)

_MOST_INDEX_BYTES = 2**30
_FOLDER = 1000  # pictures in a folder of the cache


class PinnedImages(Mapping[SampleId, Image.Image]):
    """Pictures of memory samples by id, fetched one by one when they are asked for, and kept in the cache of the Hub.

    A sample without a picture, or whose picture cannot be had, is not in the mapping. The first failure is logged.

    Args:
        bank: The bank, which names the data set.
    """

    def __init__(self, bank: MemoryBank) -> None:
        self._name, self._source, self._encodings = bank.provenance.image_dataset, image_dataset(bank), bank.filled()[0]
        self._positions = {sample_id: position for position, sample_id in enumerate(bank.ids)}
        self._files = HfFileSystem(skip_instance_cache=True)
        self._warned = self._unreachable = False

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[SampleId]:
        return iter(self._positions)

    def __getitem__(self, sample_id: SampleId) -> Image.Image:
        position, image = self._positions[sample_id], None
        if self._index is not None:
            row = self._index.find(key_of(self._encodings[position : position + 1])[0])
            image = None if row is None else self._picture(row)
        if image is None:
            raise KeyError(sample_id)
        return image

    @cached_property
    def _index(self) -> ImageIndex | None:
        try:
            if self._source is None:
                raise FileError("it is not 'owner/name@commit'. Push the pictures again.")
            (repo_id, commit), api = self._source, hub_api(None)
            # From its cache without asking the Hub, where it is there.
            size = api.hf_hub_download(
                repo_id, INDEX_FILE, repo_type="dataset", revision=commit, dry_run=True
            ).file_size
            if size is None or size > _MOST_INDEX_BYTES:
                raise FileError(f"{INDEX_FILE} has {size} bytes, of at most {_MOST_INDEX_BYTES:,}.")
            path = api.hf_hub_download(repo_id, INDEX_FILE, repo_type="dataset", revision=commit)
            return ImageIndex.load(Path(path), f"{INDEX_FILE} of {repo_id!r}")
        except (OSError, HTTPError, ValueError) as error:
            self._warn(error)
            return None

    def _picture(self, row: int) -> Image.Image | None:
        assert self._source is not None
        assert self._index is not None
        (repo_id, commit), index = self._source, self._index
        size, name = int(index.sizes[row]), index.names[int(index.files[row])]
        cached = cached_assets_path("timm_memwrap", repo_id, commit) / str(row // _FOLDER) / str(row)
        try:
            content = cached.read_bytes() if cached.is_file() else b""
            if len(content) != size:
                if self._unreachable:
                    return None
                content = self._fetch(f"datasets/{repo_id}@{commit}/{name}", int(index.offsets[row]), size)
                with replacing(cached) as temporary:
                    temporary.write_bytes(content)
            return _decoded(content, f"{row} of {repo_id}")
        except (OSError, HTTPError) as error:
            # Another attempt for each picture would take long.
            self._unreachable = True
            self._warn(error)
        except ImageError as error:
            self._warn(error)
        return None

    def _fetch(self, path: str, start: int, size: int) -> bytes:
        """Fetches a picture alone: without what the file system reads ahead by default."""
        with self._files.open(path, cache_type="none") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) != size:
            raise ImageError(f"{path} ends before the picture at {start}.")
        return content

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            reason = printable(" ".join(str(error).split()))
            name = printable(self._name)
            _logger.warning("Samples are shown without their pictures, which %s should have: %s", name, reason)
        self._warned = True


def _decoded(content: bytes, name: str) -> Image.Image:
    """Reads a picture as `push_memory_images` writes them; raises an `ImageError` if it is something else."""

    def opened() -> Image.Image:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        if image.width * image.height > MOST_PIXELS:
            raise ImageError(f"it has {image.width} by {image.height} pixels, of at most {MOST_PIXELS:,}")
        return image

    return read_picture(opened, "RGB", name)
