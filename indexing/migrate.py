"""Move an index's vectors from one Milvus to another, from the shards: nothing is embedded again.

The manifest names the new place only once everything is there, so a move that is cut off leaves
the index as it was, and the same command goes on with what is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.errors import BadIndex, MmsearchError, StorageError, UsageError
from .index import VECTORS, ImageIndex, collection_name
from .manifest import Manifest
from .vectors import VectorStore

LITE = "lite"  # what to call Milvus Lite in the index folder
_STEP = 1000  # images written in one go
_LITE_INDEX_TYPES = ("HNSW", "FLAT", "IVF_FLAT", "IVF_SQ8")


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move did."""

    images: int  # in the new place
    written: int  # of them by this run
    left_behind: str = ""  # why the old place could not be cleared; empty if it was


def migrate(
    index: ImageIndex,
    to: str,
    *,
    token: str | None = None,
    index_type: str | None = None,
    index_params: dict[str, Any] | None = None,
    partition_by: str | None = None,
    keep: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Moved:
    """Move the vectors of an index and make it use the new place; then close it and open it again.

    Args:
        index: an open index.
        to: the URI of a Milvus server, or "lite" for Milvus Lite in the index folder.
        token: for that server.
        index_type: how the new Milvus is to index them; None for the same type as now.
        index_params: as above; None for good ones.
        partition_by: "folder" or "none"; None for the same as now.
        keep: leave the vectors in the old place.
        progress: told (images in the new place, images in all).

    Raises:
        UsageError: the vectors are there already.
        BadIndex: shards or catalog are damaged.
        StorageError: the new Milvus cannot be reached or fails.
    """
    tell = progress or (lambda done, total: None)
    index.hold()
    old = index.manifest
    new = _target(index, to, index_type, index_params, partition_by)
    if new.milvus_uri == old.milvus_uri:
        raise UsageError(
            f"the vectors are at {to} already", "To build them anew there: mmsearch check --repair"
        )
    catalog, shards, source = index.parts
    target = VectorStore(
        new.milvus_uri or str(index.path / VECTORS),
        new.collection,
        new.encoder.embed_dim,
        token=token,
        index_type=new.index_type,
        index_params=new.index_params,
        by_folder=new.partition_by == "folder",
    )
    try:
        live, positions = catalog.live()
        if damaged := int(shards.damaged(positions).sum()):
            raise BadIndex(
                f"the features of {damaged} pictures are damaged or missing",
                "Mend the index first: mmsearch check --repair",
            )
        to_write = _prepare(target, live, shards.pooled(positions))
        done = len(live) - len(to_write)
        tell(done, len(live))
        for start in range(0, len(to_write), _STEP):
            part = to_write[start : start + _STEP].tolist()
            index.push(part, target)
            done += len(part)
            tell(done, len(live))
        target.flush()
        if not np.array_equal(target.ids(), live):
            raise StorageError(
                f"{to} does not hold what was written to it", "Run the same command again."
            )
    finally:
        target.close()
    new.write(index.path)
    left_behind = "" if keep else _clear(index, source)
    return Moved(len(live), len(to_write), left_behind)


def _target(
    index: ImageIndex,
    to: str,
    index_type: str | None,
    index_params: dict[str, Any] | None,
    partition_by: str | None,
) -> Manifest:
    old = index.manifest
    kind = index_type or old.index_type
    if index_params is None and kind == old.index_type:
        index_params = old.index_params
    if to == LITE:
        if index_type is None and kind not in _LITE_INDEX_TYPES:
            kind, index_params = "HNSW", None
        uri, collection = None, "images"
    elif to.startswith(("http://", "https://", "tcp://", "unix:")):
        uri, collection = to, collection_name(index.path)
    else:
        raise UsageError(
            f"--to {to!r} is no Milvus server",
            f"Give http(s)://host:port, or {LITE!r} for Milvus Lite in the index folder.",
        )
    return replace(
        old,
        milvus_uri=uri,
        collection=collection,
        index_type=kind,
        index_params=index_params,
        partition_by=partition_by or old.partition_by,
    )


def _prepare(target: VectorStore, live: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """Make the collection, or take up one that an earlier move began; return the ids to write."""
    if not target.exists():
        target.create()
        return live
    try:
        there = target.ids()
    except (BadIndex, StorageError):  # cut off while it was made
        target.create()
        return live
    target.delete(np.setdiff1d(there, live).tolist())
    lacking = ~np.isin(live, there)  # (M,)
    known = np.flatnonzero(~lacking)
    for start in range(0, len(known), _STEP):  # pictures may have changed in between
        places = known[start : start + _STEP]
        stored = target.vectors(live[places].tolist())
        for place in places:
            vector = stored.get(int(live[place]))
            lacking[place] = vector is None or not np.allclose(vector, pooled[place], atol=1e-3)
    return live[lacking]


def _clear(index: ImageIndex, source: VectorStore) -> str:
    """Remove the vectors from the old place; return why that could not be done."""
    try:
        if source.is_lite:
            source.close()
            shutil.rmtree(index.path / VECTORS)
        else:
            source.drop()
    except MmsearchError as error:
        return error.message
    except OSError as error:
        return f"cannot delete {index.path / VECTORS}: {error.strerror}"
    return ""
