"""A memory sample as a row of an engine, and back, to the bit.

Shapes: N samples, E width of an encoding, D of a key.
"""

import base64
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from timm_memwrap._utils import check_choice, printable
from timm_memwrap.bank_format import DTYPES
from timm_memwrap.meaning import Meaning
from timm_memwrap.memory_bank import MemoryBank, SampleId

__all__ = [
    "Contents",
    "Row",
    "digest_of",
    "encoded_bytes",
    "in_order",
    "make_rows",
    "row_key",
    "text_of",
    "to_bank",
    "to_tensors",
]

Row = dict[str, Any]

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Contents:
    """What a collection holds, written once it is complete, and kept true by what is added and removed.

    Args:
        collection: Name of the collection.
        meaning: What of the memory is not in its rows, as JSON of a `Meaning` without ids.
        dtype: What the encodings are stored in, e.g. `"float32"`.
        width: Width E of an encoding.
        image_shape: Shape of the small images; empty without any.
        index: `"flat"`, exact, or `"hnsw"`, approximate.
        class_counts: Number of samples by label.
        digest: Sum of the hashes of all samples, in which their order plays no part.
        changing: Whether rows are being changed; if nobody does, whoever did was interrupted.
    """

    collection: str
    meaning: str
    dtype: str
    width: int
    image_shape: tuple[int, ...] = ()
    index: str = "flat"
    class_counts: dict[int, int] = field(default_factory=dict)
    digest: int = 0
    changing: bool = False

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(self.class_counts.values())

    @property
    def described(self) -> str:
        """How many samples of what, for messages."""
        return printable(f"{self.size:,} samples of {self.read_meaning().provenance.dataset or 'an unknown data set'}")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as text, but for its key."""
        return 256 + 2 * (self.width * getattr(torch, self.dtype).itemsize + math.prod(self.image_shape or (0,)))

    def read_meaning(self) -> Meaning:
        """Returns the meaning of the memory, without ids."""
        text = bytearray(self.meaning.encode(errors="surrogatepass"))
        return Meaning.from_tensor(torch.frombuffer(text, dtype=torch.uint8))

    def changed(
        self, added: Iterable[Row] = (), removed: Iterable[Row] = (), meaning: Meaning | None = None
    ) -> "Contents":
        """Returns what a collection holds after rows have come or gone."""
        counts, digest = Counter(self.class_counts), self.digest
        for sign, rows in ((1, added), (-1, removed)):
            for row in rows:
                counts[row["label"]] += sign
                digest += sign * digest_of(row)
        kept = {label: count for label, count in sorted(counts.items()) if count > 0}
        text = self.meaning if meaning is None else text_of(meaning)
        return replace(self, meaning=text, class_counts=kept, digest=digest % 256**_DIGEST_BYTES)

    def joined(self, other: "Contents") -> "Contents":
        """Returns what a collection holds when two processes have written to it."""
        counts = Counter(self.class_counts) + Counter(other.class_counts)
        digest = (self.digest + other.digest) % 256**_DIGEST_BYTES
        return replace(self, class_counts=dict(sorted(counts.items())), digest=digest)

    def to_json(self) -> str:
        """Returns it as JSON."""
        return json.dumps(vars(self) | {"digest": f"{self.digest:x}"})

    @classmethod
    def from_json(cls, text: str) -> "Contents":
        """Parses what `to_json` returned."""
        values = json.loads(text)
        check_choice("dtype", values.get("dtype"), [str(dtype).removeprefix("torch.") for dtype in DTYPES])
        counts = {int(label): count for label, count in values["class_counts"].items()}
        shape = tuple(values["image_shape"])
        return cls(**values | {"class_counts": counts, "image_shape": shape, "digest": int(values["digest"], 16)})


def text_of(meaning: Meaning) -> str:
    """Returns a meaning as JSON."""
    return bytes(meaning.to_tensor().numpy()).decode(errors="surrogatepass")


def row_key(sample_id: SampleId) -> str:
    """Returns the primary key of a sample: a hash, so that any text can be an id and none is part of a filter."""
    return blake2b(json.dumps(sample_id).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def digest_of(row: Row) -> int:
    """Returns the hash of what a sample is: id, label and encoding."""
    text = f"{row['id']} {row['label']} {row['encoding']}"
    return int.from_bytes(blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest(), "big")


def make_rows(
    encodings: Tensor,
    labels: Tensor,
    ids: Sequence[SampleId],
    images: Tensor | None,
    places: Iterable[int],
    keys: Tensor | None = None,
) -> list[Row]:
    """Returns samples as rows, with their keys `[N, D]` unless only their digest is wanted."""
    columns: dict[str, Iterable[Any]] = {
        "id": map(row_key, ids),
        "name": map(json.dumps, ids),
        "place": itertools.islice(places, len(ids)),
        "label": labels.tolist(),
        "encoding": encoded_bytes(encodings),
        # A field that is not there would be a schema of its own.
        "image": [""] * len(ids) if images is None else encoded_bytes(images),
    }
    if keys is not None:
        columns["key"] = keys.float().cpu().numpy()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class _Text(str):
    """A text of which pymilvus checks the whole at once: it goes through the letters of others one by one."""

    __slots__ = ()

    def __iter__(self) -> Iterator[str]:
        yield self


def encoded_bytes(tensor: Tensor) -> list[str]:
    """Returns the bytes of each row of a tensor `[N, ...]` as text: engines have no type for bytes in common."""
    array = tensor.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [_Text(base64.b64encode(row).decode()) for row in array]


def _decoded(texts: Iterable[str], dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    parts = [base64.b64decode(text) for text in texts]
    size = math.prod(shape) * dtype.itemsize
    if any(len(part) != size for part in parts):
        raise ValueError(
            f"A sample in the engine is not of {size} bytes, as its collection says. Write the memory again."
        )
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype).view(-1, *shape)


def to_tensors(contents: Contents, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Returns the encodings `[N, E]`, in the precision that they are stored in, and the labels `[N]` of rows."""
    encodings = _decoded((row["encoding"] for row in rows), getattr(torch, contents.dtype), [contents.width])
    return encodings, torch.tensor([row["label"] for row in rows])


def in_order(rows: Mapping[str, Row]) -> list[Row]:
    """Returns rows in the order in which they were remembered."""
    return sorted(rows.values(), key=lambda row: (row["place"], row["id"]))


def to_bank(contents: Contents, rows: Mapping[str, Row]) -> MemoryBank:
    """Returns a bank of these rows, in the order in which they were remembered."""
    ordered = in_order(rows)
    encodings, labels = to_tensors(contents, ordered)
    images = None
    if contents.image_shape and all("image" in row for row in ordered):
        images = _decoded((row["image"] for row in ordered), torch.uint8, contents.image_shape)
    meaning, bank = contents.read_meaning(), MemoryBank()
    ids = [json.loads(row["name"]) for row in ordered]
    bank.replace(encodings, labels, ids, images, meaning.class_names, meaning.provenance, encodings.dtype)
    bank.set_reference(meaning.reference)
    return bank
