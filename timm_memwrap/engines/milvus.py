"""Milvus through pymilvus: the calls that a memory needs, whose failures are one clear error each."""

import itertools
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from timm_memwrap._utils import optional_import

__all__ = ["MOST_HITS", "MissingCollectionError", "Milvus"]

_logger = logging.getLogger(__name__)

# Milvus' own limits: samples that a query may ask for, and bytes of text in a field.
MOST_HITS = 16_384
_MOST_TEXT = 65_535
# Samples in a page of all, about.
_PAGE = 1024
# Bytes of rows in a call.
_CALL_BYTES = 2**23
# Seconds that indexing and loading a collection may take.
_PATIENCE = 3600.0
# Seconds between attempts to reach a server again.
_PAUSE = 0.25

_MISSING, _NOT_LOADED, _LOST = 100, 101, 2


class MissingCollectionError(ValueError):
    """A collection is not there, or not any more."""


class Milvus:
    """A connection to Milvus, made when it is first needed.

    Args:
        uri: A file that ends in `.db`, for Milvus Lite in this process; or `http(s)://host:port`, for a server.
        token: What the server wants to see, e.g. `"user:password"`. It is neither logged nor saved.
        timeout: Seconds after which a call fails. Until then, a lost connection is made again.

    Raises:
        ValueError: If the uri is neither.
        ImportError: If pymilvus is not installed.
    """

    def __init__(self, uri: str, token: str | None = None, timeout: float = 10.0) -> None:
        scheme = urlsplit(str(uri)).scheme
        self.remote = scheme in ("http", "https")
        if not self.remote and not (str(uri).endswith(".db") and len(scheme) < 2):
            raise ValueError(
                f"uri={_shown(uri)!r} is not a place of Milvus. Pass a file that ends in .db, e.g. 'memory.db', for "
                f"Milvus Lite in this process, or http://host:19530 for a server."
            )
        if not self.remote and not Path(uri).expanduser().absolute().parent.is_dir():
            raise ValueError(f"uri={str(uri)!r} is in a directory that does not exist. Make it first.")
        parts = urlsplit(str(uri))
        if self.remote and parts.username and not token:
            token = f"{parts.username}:{parts.password or ''}"
        self.name, self._token, self.timeout = _shown(uri), token, timeout
        self._uri = f"{self.name}{parts.path}" if self.remote else str(Path(uri).expanduser().absolute())
        self._pymilvus = optional_import("pymilvus", "milvus", "use_index('milvus')")
        if not self.remote:
            optional_import("milvus_lite", "milvus", f"uri={self.name!r}")
        self._client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A connection belongs to a process. The token stays where it was given.
        return self.__dict__ | {"_client": None, "_pymilvus": None, "_token": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_pymilvus": optional_import("pymilvus", "milvus", "use_index('milvus')")}

    def __deepcopy__(self, memo: dict) -> "Milvus":
        # An average of weights reads the same collection over the same connection.
        return self

    def call(self, method: str, *args: Any, patience: float = 0.0, **kwargs: Any) -> Any:
        """Calls a method of `pymilvus.MilvusClient`, again while the server is away and there is time.

        With `patience`, in seconds, a server that is there may work so long at it.

        Raises:
            MissingCollectionError: If there is no such collection.
            ConnectionError: If the server cannot be reached.
            TimeoutError: If it does not answer in time.
            ValueError: If Milvus refuses the call.
        """
        import grpc

        end = time.monotonic() + self.timeout
        while True:
            left = max(end - time.monotonic(), _PAUSE)
            try:
                if self._client is None:
                    self._client = self._pymilvus.MilvusClient(self._uri, token=self._token or "", timeout=left)
                return getattr(self._client, method)(*args, timeout=max(left, patience), **kwargs)
            except (self._pymilvus.MilvusException, grpc.RpcError) as error:
                failure = self._failure(error)
                if isinstance(failure, ConnectionError) and time.monotonic() + _PAUSE < end:
                    time.sleep(_PAUSE)
                    continue
                if isinstance(failure, _NotLoadedError) and time.monotonic() < end:
                    # A server that was started again need not have loaded what it holds.
                    self._client.load_collection(args[0], timeout=_PATIENCE)
                    continue
                raise failure from error

    def _failure(self, error: Any) -> Exception:
        import grpc

        code = error.code() if callable(getattr(error, "code", None)) else error.code
        text = str(getattr(error, "message", "") or error)
        if code == _MISSING or "not found[database" in text:
            return MissingCollectionError(f"Milvus at {self.name} has no such collection: {text}")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED or "DEADLINE_EXCEEDED" in text:
            return TimeoutError(f"Milvus at {self.name} did not answer within {self.timeout:g} seconds.")
        if code in (_LOST, grpc.StatusCode.UNAVAILABLE) or "UNAVAILABLE" in text:
            return ConnectionError(
                f"Milvus at {self.name} could not be reached for {self.timeout:g} seconds. Check that it runs, the uri "
                f"and the token."
            )
        if code == _NOT_LOADED or "not loaded" in text:
            return _NotLoadedError(f"Milvus at {self.name} has not loaded the collection: {text}")
        if "Open local milvus failed" in text:
            return ValueError(
                f"{self.name} could not be opened: another process may have it open, as Milvus Lite serves one. Start "
                f"a server for several, and pass its http://host:port."
            )
        return ValueError(f"Milvus at {self.name} refused: {text}")

    def create(self, collection: str, width: int, metric: str, index: str) -> None:
        """Makes a collection of memory samples with keys of this width, which replaces none."""
        kinds = self._pymilvus.DataType
        text = {name: (kinds.VARCHAR, {"max_length": _MOST_TEXT}) for name in ("name", "encoding", "image")}
        fields = {"place": (kinds.INT64, {}), "label": (kinds.INT64, {}), **text}
        self._create(collection, {**fields, "key": (kinds.FLOAT_VECTOR, {"dim": width})}, metric, index)

    def _create(self, collection: str, fields: dict[str, tuple[Any, dict]], metric: str, index: str) -> None:
        client, kinds = self._pymilvus.MilvusClient, self._pymilvus.DataType
        schema, params = client.create_schema(auto_id=False, enable_dynamic_field=False), client.prepare_index_params()
        schema.add_field("id", kinds.VARCHAR, is_primary=True, max_length=128)
        for name, (kind, options) in fields.items():
            schema.add_field(name, kind, **options)
        built = {"M": 32, "efConstruction": 200} if index == "hnsw" else {}
        params.add_index("key", index_type=index.upper(), metric_type=metric, params=built)
        self.call("create_collection", collection, schema=schema, consistency_level="Strong")
        # What is empty need not be waited for.
        self.call("create_index", collection, index_params=params, sync=False)
        self.load(collection)

    def collections(self) -> list[str]:
        """Returns the names of all collections."""
        return self.call("list_collections")

    def load(self, collection: str) -> None:
        """Makes a collection ready to be searched, with all that was written until now."""
        self.call("load_collection", collection, patience=_PATIENCE)
        self.count(collection)

    def drop(self, collection: str) -> None:
        """Removes a collection, if it is there."""
        self.call("drop_collection", collection)

    def flush(self, collection: str) -> None:
        """Writes what came in to the disk."""
        self.call("flush", collection, patience=_PATIENCE)

    def upsert(self, collection: str, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows, or replaces those with the same ids: doing so twice, as a retry may, changes nothing."""
        for part in _parts(rows):
            self.call("upsert", collection, part)

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Removes the rows with these ids."""
        for start in range(0, len(ids), MOST_HITS // 16):
            self.call("delete", collection, ids=list(ids[start : start + MOST_HITS // 16]))

    def search(
        self,
        collection: str,
        keys: Any,
        count: int,
        metric: str,
        fields: Sequence[str],
        where: str = "",
        effort: int = 0,
    ) -> list[list[tuple[float, dict[str, Any]]]]:
        """Finds the rows whose keys score highest, `count` for each of `keys` `[B, D]`, in one request.

        Returns:
            For each the scores, highest first, and the rows. Squared distances count as negative scores.
        """
        params = {"metric_type": metric, "params": {"ef": max(effort, count)} if effort else {}}
        options: dict[str, Any] = {
            "limit": count,
            "output_fields": list(fields),
            "search_params": params,
            "anns_field": "key",
        }
        # What this process has written is seen. Waiting for what others write takes a server 200 ms.
        found = self.call("search", collection, data=keys, filter=where, consistency_level="Session", **options)
        sign = -1.0 if metric == "L2" else 1.0
        return [[(sign * hit["distance"], {"id": hit["id"], **hit["entity"]}) for hit in hits] for hits in found]

    def query(
        self, collection: str, fields: Sequence[str], ids: Sequence[str] = (), where: str = "", limit: int = MOST_HITS
    ) -> list[dict]:
        """Returns the rows with these ids, or up to `limit` of those that a filter is true of."""
        if where:
            return list(self.call("query", collection, filter=where, output_fields=list(fields), limit=limit))
        found: list[dict] = []
        for start in range(0, len(ids), MOST_HITS // 16):
            part = list(ids[start : start + MOST_HITS // 16])
            found += self.call("query", collection, ids=part, output_fields=list(fields))
        return found

    def pages(self, collection: str, fields: Sequence[str], size: int, where: str = "") -> Iterator[list[dict]]:
        """Yields all rows of a collection of so many that a filter is true of, page by page."""
        # Their ids are hashes, so that as many begin with each digit. An iterator of Milvus is not in all of its kinds.
        digits = next(count for count in itertools.count() if size <= _PAGE * 16**count)
        for prefix in map("".join, itertools.product("0123456789abcdef", repeat=digits)):
            page = self.query(collection, fields, where=f"{where or 'place >= 0'} and id like '{prefix}%'")
            if len(page) == MOST_HITS:
                raise ValueError(f"{collection} at {self.name} has more samples than it is said to have.")
            yield page

    def count(self, collection: str) -> int:
        """Returns the number of rows."""
        return int(self.call("query", collection, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def write_note(self, notes: str, name: str, text: str) -> None:
        """Keeps a text under a name in a collection of notes, at once: who reads it finds the old or the new one."""
        if notes not in self.collections():
            kinds = self._pymilvus.DataType
            fields = {"text": (kinds.VARCHAR, {"max_length": _MOST_TEXT}), "key": (kinds.FLOAT_VECTOR, {"dim": 2})}
            self._create(notes, fields, "IP", "flat")
        # ASCII, as JSON is here: as many bytes as characters.
        parts = [text[start : start + _MOST_TEXT] for start in range(0, len(text), _MOST_TEXT)]
        version, old = secrets.token_hex(4), self._note_version(notes, name)
        rows = [{"id": f"{name}.{version}.{i}", "text": part} for i, part in enumerate(parts)]
        self._upsert_notes(notes, rows)
        self._upsert_notes(notes, [{"id": name, "text": f"{version} {len(parts)}"}])
        if old is not None:
            self.delete(notes, [f"{name}.{old[0]}.{i}" for i in range(old[1])])

    def _upsert_notes(self, notes: str, rows: list[dict[str, Any]]) -> None:
        self.upsert(notes, [{**row, "key": [0.0, 0.0]} for row in rows])

    def _note_version(self, notes: str, name: str) -> tuple[str, int] | None:
        found = self.query(notes, ["text"], [name])
        if not found:
            return None
        version, count = found[0]["text"].split()
        return version, int(count)

    def read_note(self, notes: str, name: str) -> str | None:
        """Returns the text that is kept under a name, or `None`."""
        if notes not in self.collections():
            return None
        self.load(notes)
        # Whoever replaces it removes the old parts last, so that a second look finds the new ones.
        for _ in range(3):
            if (version := self._note_version(notes, name)) is None:
                return None
            names = [f"{name}.{version[0]}.{i}" for i in range(version[1])]
            parts = {row["id"]: row["text"] for row in self.query(notes, ["text"], names)}
            if len(parts) == len(names):
                return "".join(parts[each] for each in names)
        raise ValueError(f"Milvus at {self.name} has {name} in parts only. Write the memory again.")

    def notes(self, notes: str) -> list[str]:
        """Returns the names of all notes."""
        if notes not in self.collections():
            return []
        self.load(notes)
        return sorted(row["id"] for row in self.query(notes, ["id"], where="id != ''") if "." not in row["id"])

    def delete_note(self, notes: str, name: str) -> None:
        """Removes a note, if it is there."""
        if notes in self.collections() and (version := self._note_version(notes, name)) is not None:
            self.delete(notes, [name, *(f"{name}.{version[0]}.{i}" for i in range(version[1]))])


class _NotLoadedError(ValueError):
    """A collection has to be loaded before it can be searched."""


def _shown(uri: Any) -> str:
    """Returns a uri without what may be secret: user, password and query."""
    parts = urlsplit(str(uri))
    if parts.scheme not in ("http", "https"):
        return str(uri)
    return f"{parts.scheme}://{parts.hostname}{'' if parts.port is None else f':{parts.port}'}"


def _parts(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Splits rows into as many as fit into a call."""
    part: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        own = sum(getattr(value, "nbytes", 0) or len(str(value)) for value in row.values())
        if part and size + own > _CALL_BYTES:
            yield part
            part, size = [], 0
        part.append(row)
        size += own
    if part:
        yield part
