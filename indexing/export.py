"""The vectors and facts of an index as files that other programs read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .filters import milvus_text
from .index import ImageIndex

_STEP = 4096  # rows held in memory


def write_parquet(index: ImageIndex, path: Path) -> int:
    """Write a row per searchable file: path, facts, pooled vector; return how many.

    Raises:
        OSError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    catalog, shards, _ = index.parts
    ids, positions = catalog.live()
    schema = pa.schema(
        {
            "id": pa.int64(),
            "path": pa.string(),
            "size": pa.int64(),
            "modified": pa.timestamp("ns", "UTC"),
            "width": pa.int64(),
            "height": pa.int64(),
            "taken": pa.timestamp("s", "UTC"),
            "latitude": pa.float64(),
            "longitude": pa.float64(),
            "camera": pa.string(),
            "vector": pa.list_(pa.float32(), shards.row.embed_dim),
        }
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(ids), _STEP):
            entries = catalog.entries(ids[start : start + _STEP].tolist())
            pooled = shards.pooled(positions[start : start + _STEP])  # (M, D)
            facts = [entry.content.facts for entry in entries if entry.content]
            columns = [
                pa.array([entry.id for entry in entries], pa.int64()),
                pa.array([milvus_text(entry.path) for entry in entries]),
                pa.array([entry.size for entry in entries], pa.int64()),
                pa.array([entry.mtime_ns for entry in entries], pa.timestamp("ns", "UTC")),
                *(
                    pa.array([getattr(fact, name) for fact in facts], schema.field(name).type)
                    for name in ("width", "height", "taken", "latitude", "longitude", "camera")
                ),
                pa.FixedSizeListArray.from_arrays(pa.array(pooled.ravel()), pooled.shape[1]),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    return len(ids)


def write_npy(index: ImageIndex, path: Path) -> int:
    """Write the pooled vectors (M, D) float32, and the paths in their order beside them.

    The paths go to ``FILE.paths.txt``, ended by NUL bytes since names may hold newlines.

    Raises:
        OSError: a file cannot be written.
    """
    ids, pooled = index.pooled()
    with path.open("wb") as file:
        np.save(file, pooled)
    records = index.records(ids.tolist())
    names = "".join(f"{record.path}\0" for record in records)
    path.with_name(f"{path.name}.paths.txt").write_bytes(names.encode("utf-8", "surrogateescape"))
    return len(ids)
