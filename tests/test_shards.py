"""Shards: what is stored is what comes back, and what is torn is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmsearch.core.errors import BadIndex, StorageError
from mmsearch.core.types import Grid
from mmsearch.indexing import shards as module
from mmsearch.indexing.shards import PATCH_CODES, LocalStorage, RowFormat, Shards, quantise


def make(folder: Path, codes: str = "int8") -> Shards:
    folder.mkdir(exist_ok=True)
    return Shards(LocalStorage(folder), RowFormat(8, 5, Grid(2, 3), codes))


def features(count: int, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    random = np.random.default_rng(seed)
    pooled = random.standard_normal((count, 8)).astype(np.float32)
    scale = 10.0 ** random.integers(-1, 3, (count, 6, 1))
    return pooled, torch.from_numpy((random.standard_normal((count, 6, 5)) * scale).astype("f4"))


def places(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, np.int64)


@pytest.mark.parametrize("codes", PATCH_CODES)
def test_round_trip(tmp_path, codes):
    shards = make(tmp_path, codes)
    pooled, patches = features(7)
    patches[3, 2] = 0  # a patch of nothing stays nothing
    assert shards.append((0, 0), pooled, *quantise(patches, shards.row)) == (0, 0)
    assert shards.append((0, 7), pooled[:2], *quantise(patches[:2], shards.row)) == (0, 7)
    order = places((0, 8), (0, 3), (0, 3), (0, 0))
    expected = patches[[1, 3, 3, 0]]
    batch = shards.patches(order)
    error = (batch.values() - expected).abs()
    largest = expected.abs().amax(-1, keepdim=True)
    bound = {"int8": 0.51 / 127, "int4": 0.51 / 7, "fp16": 1e-3}[codes] * largest + 1e-7
    assert (error <= bound).all()
    assert batch.codes.dtype == (torch.float16 if codes == "fp16" else torch.int8)
    np.testing.assert_array_equal(shards.pooled(order), pooled[[1, 3, 3, 0]])
    assert not shards.damaged(places(*((0, row) for row in range(9)))).any()


def test_a_reader_of_ten_lines(tmp_path):
    """As docs/format.md shows it."""
    shards = make(tmp_path)
    pooled, patches = features(3)
    codes, scales = quantise(patches, shards.row)
    shards.append((0, 0), pooled, codes, scales)
    record = np.dtype([("scales", "<f2", (6,)), ("codes", "i1", (6, 5)), ("checksum", "<u8")])
    rows = np.memmap(tmp_path / "000000.patches", record, "r")
    values = rows[2]["codes"] * rows[2]["scales"].astype(np.float32)[:, None]
    np.testing.assert_array_equal(values, shards.patches(places((0, 2))).values()[0].numpy())
    stored = np.memmap(tmp_path / "000000.pooled", "<f4", "r").reshape(-1, 8)
    np.testing.assert_array_equal(stored, pooled)


def test_a_full_shard_is_followed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    shards = make(tmp_path)
    pooled, patches = features(4)
    assert shards.append((0, 0), pooled, *quantise(patches, shards.row)) == (0, 0)
    assert shards.append((0, 4), pooled, *quantise(patches, shards.row)) == (1, 0)
    assert shards.numbers() == [0, 1]
    assert shards.lengths() == {0: 4, 1: 4}
    np.testing.assert_array_equal(shards.pooled(places((1, 1), (0, 2))), pooled[[1, 2]])


def test_a_torn_tail_is_overwritten(tmp_path):
    shards = make(tmp_path)
    pooled, patches = features(4)
    shards.append((0, 0), pooled, *quantise(patches, shards.row))
    path = tmp_path / "000000.patches"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    fresh = make(tmp_path)
    assert fresh.damaged(places((0, 2), (0, 3))).tolist() == [False, True]
    assert fresh.lengths() == {0: 3}
    with pytest.raises(BadIndex, match="lacks rows"):
        fresh.patches(places((0, 3)))
    fresh.append((0, 3), pooled[3:], *quantise(patches[3:], fresh.row))
    assert path.read_bytes() == whole


def test_flipped_bits_are_noticed(tmp_path):
    shards = make(tmp_path)
    pooled, patches = features(4)
    shards.append((0, 0), pooled, *quantise(patches, shards.row))
    for name, at in (("000000.patches", 90), ("000000.pooled", 70)):
        content = bytearray((tmp_path / name).read_bytes())
        content[at] ^= 4
        (tmp_path / name).write_bytes(content)
    everything = places(*((0, row) for row in range(4)))
    assert make(tmp_path).damaged(everything).tolist() == [False, True, True, False]


def test_storage_that_fails(tmp_path):
    shards = make(tmp_path)
    pooled, patches = features(1)
    with pytest.raises(BadIndex, match="shorter"):
        shards.append((0, 5), pooled, *quantise(patches, shards.row))
    (tmp_path / "000000.pooled").unlink()
    (tmp_path / "000000.pooled").mkdir()
    with pytest.raises(StorageError, match=r"000000\.pooled"):
        shards.append((0, 0), pooled, *quantise(patches, shards.row))
