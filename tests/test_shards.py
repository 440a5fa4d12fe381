"""Shards: what is stored is what comes back, and what is torn is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmsearch.cli.app import app
from mmsearch.cli.output import report_error
from mmsearch.core.errors import BadIndex, StorageError, UsageError
from mmsearch.core.types import Grid
from mmsearch.indexing import shards as module
from mmsearch.indexing.index import ImageIndex
from mmsearch.indexing.manifest import Manifest
from mmsearch.indexing.pooling import check_pool, pool_patches
from mmsearch.indexing.shards import (
    PATCH_CODES,
    LocalStorage,
    RowFormat,
    Shards,
    quantise,
    stored_form,
)

from .photos import photograph
from .test_index import SPEC, StandIn, contents, make_pictures


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
    assert shards.append((0, 0), pooled, quantise(patches, shards.row)) == (0, 0)
    assert shards.append((0, 7), pooled[:2], quantise(patches[:2], shards.row)) == (0, 7)
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
    shards.append((0, 0), pooled, quantise(patches, shards.row))
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
    assert shards.append((0, 0), pooled, quantise(patches, shards.row)) == (0, 0)
    assert shards.append((0, 4), pooled, quantise(patches, shards.row)) == (1, 0)
    assert shards.numbers() == [0, 1]
    assert shards.lengths() == {0: 4, 1: 4}
    np.testing.assert_array_equal(shards.pooled(places((1, 1), (0, 2))), pooled[[1, 2]])


def test_a_torn_tail_is_overwritten(tmp_path):
    shards = make(tmp_path)
    pooled, patches = features(4)
    shards.append((0, 0), pooled, quantise(patches, shards.row))
    path = tmp_path / "000000.patches"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    fresh = make(tmp_path)
    assert fresh.damaged(places((0, 2), (0, 3))).tolist() == [False, True]
    assert fresh.lengths() == {0: 3}
    with pytest.raises(BadIndex, match="lacks rows"):
        fresh.patches(places((0, 3)))
    fresh.append((0, 3), pooled[3:], quantise(patches[3:], fresh.row))
    assert path.read_bytes() == whole


def test_flipped_bits_are_noticed(tmp_path):
    shards = make(tmp_path)
    pooled, patches = features(4)
    shards.append((0, 0), pooled, quantise(patches, shards.row))
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
        shards.append((0, 5), pooled, quantise(patches, shards.row))
    (tmp_path / "000000.pooled").unlink()
    (tmp_path / "000000.pooled").mkdir()
    with pytest.raises(StorageError, match=r"000000\.pooled"):
        shards.append((0, 0), pooled, quantise(patches, shards.row))


ODD = Grid(3, 5)  # rows and columns are odd


def store(
    folder: Path, patches: torch.Tensor, pool: str, codes: str = "int8", grid: Grid = ODD
) -> Shards:
    """Store patches (N, P, C) of a grid under pooled vectors of 8."""
    shards = Shards(LocalStorage(folder), RowFormat(8, patches.shape[-1], grid, codes, pool))
    pooled = np.ones((len(patches), 8), np.float32)
    shards.append((0, 0), pooled, quantise(patches, shards.row))
    return shards


def everything(count: int) -> np.ndarray:
    return places(*((0, row) for row in range(count)))


def near(values: torch.Tensor, expected: torch.Tensor, levels: int = 127) -> bool:
    """Whether values (N, P, C) are those expected, up to half a quantisation step."""
    bound = 0.51 / levels * expected.abs().amax(-1, keepdim=True) + 1e-6
    return bool(((values - expected).abs() <= bound).all())


def mean_of_cell(picture: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Average the patches (P, C) in the 2 x 2 cell of a patch, the slow way."""
    found = [
        picture[y * ODD.width + x]
        for y in range(ODD.height)
        for x in range(ODD.width)
        if (y // 2, x // 2) == (row // 2, column // 2)
    ]
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("codes", PATCH_CODES)
def test_pooling_by_cells_of_an_odd_grid(tmp_path, codes):
    patches = torch.randn(4, ODD.size, 7, generator=torch.Generator().manual_seed(1))
    expected = torch.stack(
        [
            torch.stack(
                [mean_of_cell(picture, *divmod(patch, ODD.width)) for patch in range(ODD.size)]
            )
            for picture in patches
        ]
    )
    shards = store(tmp_path, patches, "2", codes)
    batch = shards.patches(everything(4))
    assert batch.values().shape == (4, ODD.size, 7)
    assert near(batch.values(), expected, 7 if codes == "int4" else 127)
    assert shards.row.patches["codes"].shape[0] == 6, "2 x 3 cells"
    assert torch.equal(batch.values(), stored_form(patches, shards.row).values())


@pytest.mark.parametrize("pool", ["1", "2", "cluster:4"])
@pytest.mark.parametrize("grid", [Grid(4, 6), ODD])
def test_patches_that_share_a_cells_vector_are_said_to_be_alike(tmp_path, grid, pool):
    shards = store(tmp_path, torch.randn(2, grid.size, 7), pool, grid=grid)
    batch = shards.patches(everything(2))
    even = pool == "2" and grid == Grid(4, 6)
    assert batch.alike == (Grid(2, 3) if even else None)
    assert stored_form(torch.randn(2, grid.size, 7), shards.row).alike == batch.alike
    if even:
        cells = batch.one_per_cell().unflatten(1, (2, 3))  # (M, h, w, C)
        again = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)  # (M, P, C)
        assert torch.equal(again, batch.codes)


@pytest.mark.parametrize("codes", PATCH_CODES)
def test_pooling_by_clusters(tmp_path, codes):
    patches = torch.randn(4, ODD.size, 7, generator=torch.Generator().manual_seed(2))
    shards = store(tmp_path, patches, "cluster:4", codes)
    batch = shards.patches(everything(4))
    _, assignments = pool_patches(patches, "cluster:4", ODD)
    expected = torch.empty_like(patches)
    for image, picture in enumerate(patches):
        for cluster in assignments[image].unique():
            members = assignments[image] == cluster
            expected[image, members] = picture[members].mean(0)
    assert near(batch.values(), expected, 7 if codes == "int4" else 127)
    assert torch.equal(batch.values(), stored_form(patches, shards.row).values())
    alone, again = pool_patches(patches[2:3], "cluster:4", ODD)[1], quantise(patches, shards.row)
    assert torch.equal(alone[0], assignments[2]), "whatever else is in the batch"
    np.testing.assert_array_equal(again, quantise(patches, shards.row))


def test_clusters_keep_alike_together(tmp_path):
    """Patches in clear groups come back as the groups' means, whatever the lengths."""
    random = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(8, 8, generator=random))[0][:5]  # (5, C)
    groups = torch.randint(5, (6, ODD.size), generator=random)  # (N, P)
    lengths = 1 + 9 * torch.rand(6, ODD.size, 1, generator=random)  # (N, P, 1)
    noise = 0.05 * torch.randn(6, ODD.size, 8, generator=random)  # (N, P, C)
    _, assignments = pool_patches(directions[groups] * lengths + noise, "cluster:5", ODD)
    together = assignments.unsqueeze(1) == assignments.unsqueeze(2)  # (N, P, P)
    belong = groups.unsqueeze(1) == groups.unsqueeze(2)  # (N, P, P)
    present = torch.tensor([len(picture.unique()) == 5 for picture in groups])  # (N,)
    assert present.any()
    assert torch.equal(together[present], belong[present])


def test_pooling_that_loses_nothing(tmp_path):
    random = torch.Generator().manual_seed(4)
    patches = torch.randn(3, ODD.size, 7, generator=random)
    as_many = stored_form(patches, RowFormat(8, 7, ODD, pool=f"cluster:{ODD.size}"))
    assert near(as_many.values(), patches), "as many clusters as patches"
    few = patches[:, torch.randint(3, (ODD.size,), generator=random)]  # three kinds of patch
    few[2] = 0  # a picture of nothing
    (tmp_path / "few").mkdir()
    batch = store(tmp_path / "few", few, "cluster:6").patches(everything(3))
    assert near(batch.values(), few), "identical patches; clusters left empty"


def test_the_map_of_clusters_is_guarded(tmp_path):
    patches = torch.randn(2, ODD.size, 7, generator=torch.Generator().manual_seed(5))
    store(tmp_path, patches, "cluster:4")
    path = tmp_path / "000000.patches"
    content = bytearray(path.read_bytes())
    content[-9] = 200  # the last assignment of the last picture
    path.write_bytes(content)
    fresh = Shards(LocalStorage(tmp_path), RowFormat(8, 7, ODD, pool="cluster:4"))
    assert fresh.damaged(everything(2)).tolist() == [False, True]
    fresh.patches(everything(1))
    with pytest.raises(BadIndex, match="damaged"):
        fresh.patches(everything(2))


def test_poolings_that_are_none(tmp_path):
    check_pool("cluster:15", ODD)
    for pool in ("0", "3", "", "cluster", "cluster:1", "cluster:016", "cluster:16", "cluster:x"):
        with pytest.raises(UsageError) as caught:
            check_pool(pool, ODD)
        assert "1, 2 or cluster:N with N from 2 to 15" in caught.value.hint
    with pytest.raises(UsageError):
        check_pool("cluster:256")


@pytest.mark.parametrize("codes", PATCH_CODES)
def test_what_is_not_pooled_has_the_bytes_it_had(tmp_path, codes):
    row = RowFormat(8, 5, Grid(2, 3), codes)
    fields = [("codes", "<f2", (6, 5))]
    if codes != "fp16":
        width = ("i1", (6, 5)) if codes == "int8" else ("u1", (6, 3))
        fields = [("scales", "<f2", (6,)), ("codes", *width)]
    assert row.patches == np.dtype([*fields, ("checksum", "<u8")])


@pytest.mark.parametrize("pool", ["2", "cluster:3"])
def test_an_index_of_pooled_patches(tmp_path, pool):
    make_pictures(tmp_path / "photos", 5)
    with ImageIndex.create(tmp_path / "index", SPEC, patch_pool=pool) as index:
        index.add([tmp_path / "photos"], StandIn())
        before = contents(index)
    with ImageIndex.open(tmp_path / "index") as index:
        assert contents(index) == before
        assert index.manifest.patch_pool == pool
        size = (tmp_path / "index/shards/000000.patches").stat().st_size
        assert size == 5 * index.manifest.row_format.patches.itemsize
    manifest = tmp_path / "index" / "manifest.json"
    fields = json.loads(manifest.read_text())
    for wrong in ("cluster:9", 2):
        manifest.write_text(json.dumps(fields | {"patch_pool": wrong}))
        with pytest.raises(BadIndex, match="damaged"):
            Manifest.read(tmp_path / "index")
    del fields["patch_pool"]
    manifest.write_text(json.dumps(fields))
    assert Manifest.read(tmp_path / "index").patch_pool == "1"
    with pytest.raises(UsageError):
        ImageIndex.create(tmp_path / "index", SPEC, patch_pool="cluster:99", rebuild=True)
    assert manifest.exists(), "a refusal clears nothing away"


def test_pooled_patches_on_a_remote_store(tmp_path):
    make_pictures(tmp_path / "photos", 5)
    found = []
    for name, shards in (("local", None), ("remote", f"memory://{tmp_path.name}/pooled")):
        options = {"shards": shards, "patch_pool": "cluster:3"}
        with ImageIndex.create(tmp_path / name, SPEC, **options) as index:
            index.add([tmp_path / "photos"], StandIn())
            found.append(contents(index))
            assert not index.parts[1].damaged(everything(5)).any()
    assert found[0] == found[1]


def run(*words: object) -> int:
    try:
        return app([str(word) for word in words], standalone_mode=False) or 0
    except Exception as error:
        return report_error(error, debug=False)


def test_pooling_from_the_command_line(tmp_path, capfd):
    """Hits from a third of the bytes, with the head that was trained on all patches."""
    photos, folder = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for name in ("astronaut.png", "cat.png", "coffee.png", "moon.png", "rocket.jpg"):
        shutil.copy(photograph(name), photos / name)
    index = ("index", photos, "--index", folder, "--device", "cpu", "-q")
    assert run(*index, "--model", "bundled", "--patch-pool", "cluster:50") == 2
    assert "1, 2 or cluster:N with N from 2 to 49" in capfd.readouterr().err
    assert not folder.exists()
    assert run(*index, "--model", "bundled", "--patch-pool", "cluster:16") == 0
    assert run("status", "--index", folder) == 0
    assert "7 x 7 x 320, int8, pooled by cluster:16" in capfd.readouterr().out
    size = (folder / "shards/000000.patches").stat().st_size
    assert size == 5 * 5209, "15,786 bytes a picture without"
    query = ("query", "a cup of coffee", "--index", folder, "--device", "cpu")
    assert run(*query, "--scorer", "cross", "-k", "1", "--paths") == 0
    assert capfd.readouterr().out.strip().endswith("coffee.png")
    for option, value, code in (
        ("--patch-pool", "2", 5),
        ("--patch-pool", "1", 5),
        ("--patch-codes", "int4", 5),
        ("--patch-pool", "cluster:16", 0),
    ):
        assert run(*index, option, value) == code
    said = capfd.readouterr().err
    assert "the index was made with --patch-pool cluster:16, not 2" in said
    assert "the index was made with --patch-codes int8, not int4" in said
