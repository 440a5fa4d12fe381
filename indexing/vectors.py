"""The pooled vectors in Milvus: Lite in a file, a server, a cluster or Zilliz Cloud.

The only module that talks to Milvus. One code path: what differs is the URI and the token.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import BadIndex, IndexBusy, StorageError
from ..core.memory import return_freed_memory
from ..core.types import Candidates
from .catalog import Entry, id_of_path
from .filters import NO_PLACE, NOT_TAKEN, Condition, milvus_text

MAX_LIMIT = 16384  # of Milvus: results per query, and rows per page
# Milvus Lite flushes by way of Python objects, about 25 KB a row of 512 dimensions at the peak.
LITE_FLUSH_ROWS = 1024
UPSERT_ROWS = 1000  # keeps a message far below gRPC's 64 MiB at any width
PARTITIONS = 16  # of a collection that is kept by folder
_TEXT_BYTES = 8192
_RECOVERY_SECONDS = 90
_RECOVERING = ("unrecoverable error", "node not found", "not ready", "is not healthy")
_DISK_TROUBLE = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.EIO}

_INDEX_PARAMS: dict[str, dict[str, Any]] = {
    "HNSW": {"M": 16, "efConstruction": 128},
    "IVF_FLAT": {"nlist": 1024},
    "IVF_SQ8": {"nlist": 1024},
    "SCANN": {"nlist": 1024},
}


class VectorStore:
    """One collection of pooled vectors with the facts to filter by. Connects when first used.

    Args:
        uri: an absolute path ending in ``.db`` for Milvus Lite, else ``http(s)://host:port``.
        collection: its name in that Milvus.
        dim: D.
        token: "user:password" or an API key.
        index_type: HNSW, FLAT, or another the server knows.
        index_params: how to build it; None for good ones.
        by_folder: keep images in partitions by folder, so that a search in a few folders reads
            only theirs.
    """

    def __init__(
        self,
        uri: str,
        collection: str,
        dim: int,
        *,
        token: str | None = None,
        index_type: str = "HNSW",
        index_params: dict[str, Any] | None = None,
        by_folder: bool = False,
    ) -> None:
        self.uri = uri
        self.collection = collection
        self._dim = dim
        self._token = token
        self._index_type = index_type
        self._index_params = index_params or _INDEX_PARAMS.get(index_type, {})
        self._by_folder = by_folder
        self._client: Any = None
        self._found = False  # the collection, in this connection
        self._loaded = False
        self._unflushed = 0  # rows
        self._templates: bool | None = None  # whether it knows them; None: not asked yet

    @property
    def is_lite(self) -> bool:
        """Whether the vectors lie in a file of Milvus Lite."""
        return self.uri.endswith(".db")

    def search(
        self,
        queries: np.ndarray,
        limit: int,
        condition: Condition | None,
        *,
        folders: Sequence[str] | None = None,
    ) -> Candidates:
        """Return the nearest images of each query by cosine, best first, ties by id.

        Args:
            queries: (Q, D) float32, normalised.
            limit: N, at most 16,384.
            condition: what must hold of an image.
            folders: all that hold an image for which it does, if that is known.

        Raises:
            BadIndex: the collection is absent. StorageError: Milvus fails.
        """
        limit = min(limit, MAX_LIMIT)
        ids = np.full((len(queries), limit), -1, np.int64)
        scores = np.full((len(queries), limit), -np.inf, np.float32)
        step = max(1, min(1000, 200_000 // limit))  # keeps an answer below gRPC's message size
        with self._errors():
            client = self._open()
            self._load(client)
            for start in range(0, len(queries), step):
                answers = client.search(
                    self.collection,
                    data=list(np.ascontiguousarray(queries[start : start + step], np.float32)),
                    anns_field="vector",
                    limit=limit,
                    output_fields=["id"],
                    search_params=self._search_params(limit),
                    partition_names=self._partitions(folders),
                    **self._filter(client, condition),
                )
                for row, hits in enumerate(answers, start):
                    found = sorted((-hit["distance"], hit["id"]) for hit in hits)
                    ids[row, : len(found)] = [number for _, number in found]
                    scores[row, : len(found)] = [-distance for distance, _ in found]
        return Candidates(ids, scores)

    def upsert(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        """Write images, replacing those of the same id.

        Args:
            entries: searchable files.
            vectors: (N, D) float32, theirs.
        """
        rows = [_row(entry, vector) for entry, vector in zip(entries, vectors, strict=True)]
        groups: dict[str, list[dict[str, Any]]] = {}
        for entry, row in zip(entries, rows, strict=True):
            name = _partition(entry.folder) if self._by_folder else ""
            groups.setdefault(name, []).append(row)
        with self._errors():
            client = self._open()
            for name, some in groups.items():
                for start in range(0, len(some), UPSERT_ROWS):
                    part = some[start : start + UPSERT_ROWS]
                    client.upsert(self.collection, part, partition_name=name)
            self._unflushed += len(rows)
            if self.is_lite and self._unflushed >= LITE_FLUSH_ROWS:
                self._flush(client)

    def delete(self, ids: Sequence[int]) -> None:
        """Remove images; unknown ids are no error."""
        with self._errors():
            client = self._open()
            for start in range(0, len(ids), UPSERT_ROWS):
                client.delete(self.collection, ids=list(map(int, ids[start : start + UPSERT_ROWS])))

    def flush(self) -> None:
        """Make everything written durable and indexed; searches are slow before."""
        with self._errors():
            client = self._open()
            self._flush(client)
            self._load(client)

    def _flush(self, client: Any) -> None:
        client.flush(self.collection)
        self._unflushed = 0
        if self.is_lite:
            return_freed_memory()

    def ids(self) -> np.ndarray:
        """Return the ids of all images in Milvus, ascending, (M,) int64."""
        with self._errors():
            client = self._open()
            self._load(client)
            iterator = client.query_iterator(
                self.collection,
                batch_size=MAX_LIMIT,
                filter="id >= 0",
                output_fields=["id"],
                consistency_level="Strong",
            )
            found: list[int] = []
            while page := iterator.next():
                found.extend(row["id"] for row in page)
            iterator.close()
        return np.unique(np.array(found, np.int64))

    def vectors(self, ids: Sequence[int]) -> dict[int, np.ndarray]:
        """Return the stored vectors by id; unknown ids are absent."""
        with self._errors():
            client = self._open()
            self._load(client)
            found = {}
            for start in range(0, len(ids), UPSERT_ROWS):
                part = list(map(int, ids[start : start + UPSERT_ROWS]))
                for row in client.get(self.collection, ids=part, output_fields=["vector"]):
                    found[row["id"]] = np.asarray(row["vector"], np.float32)
        return found

    def create(self) -> None:
        """Make the collection anew, dropping one of the same name."""
        with self._errors():
            client = self._connect()
            if client.has_collection(self.collection):
                client.drop_collection(self.collection)
            self._create(client)
            self._found, self._loaded = True, False

    def exists(self) -> bool:
        """Say whether the collection is there."""
        with self._errors():
            return bool(self._connect().has_collection(self.collection))

    def drop(self) -> None:
        """Remove the collection."""
        with self._errors():
            self._connect().drop_collection(self.collection)

    def close(self) -> None:
        """Disconnect; Milvus Lite finishes its background work and lets go of its file."""
        if self._client is None:
            return
        client, self._client = self._client, None
        self._found = self._loaded = False
        self._templates = None
        client.close()
        if self.is_lite:  # closing the client alone would keep the file's lock in this process
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)

    def _open(self) -> Any:
        """Connect and make sure that the collection is there."""
        client = self._connect()
        if not self._found:
            if not client.has_collection(self.collection):
                raise BadIndex(
                    f"Milvus at {self.uri} has no collection {self.collection!r}",
                    "Rebuild it from the shards: mmsearch check --repair",
                )
            self._found = True
        return client

    def _create(self, client: Any) -> None:
        from pymilvus import DataType

        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._dim)
        for name in ("path", "extension", "camera"):
            schema.add_field(name, DataType.VARCHAR, max_length=_TEXT_BYTES)
        for name in ("size", "modified", "taken", "width", "height", "shape"):
            schema.add_field(name, DataType.INT64)
        for name in ("latitude", "longitude"):
            schema.add_field(name, DataType.DOUBLE)
        index = client.prepare_index_params()
        index.add_index(
            "vector",
            index_type=self._index_type,
            metric_type="COSINE",
            params=self._index_params,
        )
        client.create_collection(self.collection, schema=schema, index_params=index)
        if self._by_folder:
            for number in range(PARTITIONS):
                client.create_partition(self.collection, _partition_name(number))
        # Released, Milvus Lite builds the index once at the end instead of again and again.
        client.release_collection(self.collection)

    def _partitions(self, folders: Sequence[str] | None) -> list[str] | None:
        """Return the partitions to search; None for all."""
        if not (self._by_folder and folders):
            return None
        names = {_partition(folder) for folder in folders}
        return sorted(names) if len(names) < PARTITIONS else None

    def _load(self, client: Any) -> None:
        if self._loaded:
            return
        from pymilvus.exceptions import MilvusException

        deadline = time.monotonic() + _RECOVERY_SECONDS
        while True:
            try:
                client.load_collection(self.collection)
                break
            except MilvusException as error:
                # A server that was just started again still counts on nodes that are gone.
                recovering = any(sign in str(error) for sign in _RECOVERING)
                if self.is_lite or not recovering or time.monotonic() > deadline:
                    raise
                time.sleep(1)
        self._loaded = True

    def _search_params(self, limit: int) -> dict[str, Any]:
        """Look at more than is asked for, so that little is missed."""
        if self._index_type.startswith("HNSW"):
            return {"metric_type": "COSINE", "params": {"ef": max(200, 2 * limit)}}
        if self._index_type.startswith("IVF"):
            return {"metric_type": "COSINE", "params": {"nprobe": 64}}
        if self._index_type == "SCANN":
            return {"metric_type": "COSINE", "params": {"nprobe": 64, "reorder_k": 2 * limit}}
        if self._index_type == "DISKANN":
            return {"metric_type": "COSINE", "params": {"search_list": max(200, 2 * limit)}}
        return {"metric_type": "COSINE", "params": {}}

    def _filter(self, client: Any, condition: Condition | None) -> dict[str, Any]:
        if condition is None:
            return {}
        if self._templates is None:
            self._templates = not self.is_lite and _knows_templates(client.get_server_version())
        if not self._templates:
            return {"filter": condition.inlined()}
        return {"filter": condition.expression, "filter_params": condition.values}

    def _connect(self) -> Any:
        if self._client is None:
            # Its transport would tell the user about pings while a long flush goes on.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
            import pymilvus

            for name in ("pymilvus", "milvus_lite", "grpc"):  # they log what is raised here anyway
                logging.getLogger(name).setLevel(logging.CRITICAL)
            try:
                self._client = pymilvus.MilvusClient(self.uri, token=self._token or "", timeout=30)
            except pymilvus.exceptions.MilvusException as error:
                if self.is_lite:
                    raise _lite_error(Path(self.uri)) from error
                raise StorageError(
                    f"cannot reach Milvus at {self.uri}: {_first_line(error)}",
                    "Is it running, and are --milvus and $MMSEARCH_MILVUS_TOKEN right?",
                ) from error
        return self._client

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import grpc
        import pymilvus

        try:
            yield
        except (pymilvus.exceptions.MilvusException, grpc.RpcError) as error:
            raise StorageError(
                f"Milvus at {self.uri} failed: {_first_line(error)}",
                "Run the same command again, or `mmsearch check`.",
            ) from error


def _row(entry: Entry, vector: np.ndarray) -> dict[str, Any]:
    facts = entry.content.facts if entry.content else None
    assert facts is not None, "only searchable files have a vector"
    return {
        "id": entry.id,
        "vector": np.asarray(vector, np.float32),
        "path": _fit(milvus_text(entry.path)),
        "extension": _fit(milvus_text(Path(entry.name).suffix.lower().lstrip("."))),
        "camera": facts.camera,
        "size": entry.size,
        "modified": entry.mtime_ns // 1_000_000_000,
        "taken": NOT_TAKEN if facts.taken is None else facts.taken,
        "width": facts.width,
        "height": facts.height,
        "shape": facts.width - facts.height,
        "latitude": NO_PLACE if facts.latitude is None else facts.latitude,
        "longitude": NO_PLACE if facts.longitude is None else facts.longitude,
    }


def _partition(folder: str) -> str:
    """Name the partition of a folder's images."""
    # Not Milvus's own partition key: with it, 2.3 puts upserted rows into wrong partitions.
    return _partition_name(id_of_path(folder) % PARTITIONS)


def _partition_name(number: int) -> str:
    return f"folders_{number:02d}"


def _fit(text: str) -> str:
    """Cut a text to what a field holds, at a character's end."""
    return text.encode()[:_TEXT_BYTES].decode("utf-8", "ignore")


def _knows_templates(version: str) -> bool:
    """Say whether a server fills values into expressions, as Milvus does from 2.5 on."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    # Zilliz Cloud and builds off the main branch name no number; they are never old.
    return match is None or (int(match[1]), int(match[2])) >= (2, 5)


def _lite_error(path: Path) -> Exception:
    """Find out why Milvus Lite did not open, which its client does not say."""
    from milvus_lite.db import MilvusLite
    from milvus_lite.exceptions import DataDirLockedError

    for _ in range(2):  # a holder that just left makes the first try succeed
        try:
            MilvusLite(str(path)).close()
            time.sleep(0.1)
        except DataDirLockedError:
            return IndexBusy(
                f"another program has {path} open",
                "Let it finish, or wait for it with --wait SECONDS.",
            )
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_TROUBLE:
                return StorageError(
                    f"cannot open {path}: {error.strerror}",
                    "Make room, or make the folder writable.",
                )
            return BadIndex(
                f"{path} is damaged: {_first_line(error)}",
                "Rebuild it from the shards: mmsearch check --repair",
            )
    return StorageError(f"cannot open {path}", "Run the same command again.")


def _first_line(error: BaseException) -> str:
    return str(getattr(error, "message", "") or error).strip().split("\n")[0][:300]
