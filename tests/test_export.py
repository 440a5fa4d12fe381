"""Exports hold what the index holds."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
from mmsearch.indexing.export import write_npy, write_parquet
from mmsearch.indexing.index import ImageIndex

from .test_index import SPEC, StandIn, make_pictures


def test_exports(tmp_path):
    make_pictures(tmp_path / "photos", 7)
    with ImageIndex.create(tmp_path / "index", SPEC) as index:
        index.add([tmp_path / "photos"], StandIn())
        ids, pooled = index.pooled()
        assert write_parquet(index, tmp_path / "x.parquet") == 7
        assert write_npy(index, tmp_path / "x.npy") == 7
        records = index.records(ids.tolist())
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["id"].to_pylist() == ids.tolist()
    assert table["path"].to_pylist() == [record.path for record in records]
    assert table["width"].to_pylist() == [record.width for record in records]
    assert table["taken"].null_count == 7
    vectors = np.stack(table["vector"].combine_chunks().to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(vectors, pooled)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), pooled)
    names = (tmp_path / "x.npy.paths.txt").read_bytes().split(b"\0")[:-1]
    assert names == [record.path.encode() for record in records]
