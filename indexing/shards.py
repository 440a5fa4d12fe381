"""What the encoder saw, on disk: pooled vectors and quantised patch features.

A shard is two flat files of fixed-size rows, memory-mapped to be read::

    000000.pooled    rows x D float32
    000000.patches   rows x record of scales (S float16), codes (S x C) and a checksum (uint64)

S is the number of vectors stored of a picture: its P patches, or fewer if they are pooled. Pooled
by clusters, a record also says which of them each patch became (P uint8). Whatever is stored, all
P patches are read: those that were pooled together come back as the same vector.

The checksum of a row covers its pooled vector and all else of its record. Rows are only ever
appended; the catalog says which of them count, so a torn tail is cut off by the next writer.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from ..core.errors import BadIndex, StorageError
from ..core.types import Grid, PatchBatch
from .pooling import cells, pool_patches, pooled_size, whole_cells

if TYPE_CHECKING:
    import torch

PATCH_CODES = ("int8", "int4", "fp16")
SHARD_BYTES = 1 << 28  # a shard is closed once its patches are larger than this
CHECKED_AT_ONCE = 256  # rows in memory while checksums are taken
_FILE = re.compile(r"\d{6}\.(pooled|patches)")
_LARGEST = {"int8": 127, "int4": 7}


@dataclass(frozen=True, slots=True)
class RowFormat:
    """The bytes of one image in a shard."""

    embed_dim: int  # D
    patch_dim: int  # C
    grid: Grid  # P patches
    codes: str = "int8"  # one of PATCH_CODES
    pool: str = "1"  # "1", "2" or "cluster:N"; see ``pooling``

    @property
    def clustered(self) -> bool:
        """Whether a row says which stored vector each patch became."""
        return self.pool not in ("1", "2")

    @property
    def alike(self) -> Grid | None:
        """The coarser grid whose cells hold one vector each; None unless pooled by whole cells."""
        return whole_cells(self.pool, self.grid)

    @property
    def pooled(self) -> np.dtype:
        """Row of a ``.pooled`` file."""
        return np.dtype(("<f4", (self.embed_dim,)))

    @property
    def patches(self) -> np.dtype:
        """Row of a ``.patches`` file."""
        vectors = pooled_size(self.pool, self.grid)  # S
        fields: list[tuple[str, str, tuple[int, ...]]] = []
        if self.codes == "fp16":
            fields.append(("codes", "<f2", (vectors, self.patch_dim)))
        else:
            width = self.patch_dim if self.codes == "int8" else (self.patch_dim + 1) // 2
            kind = "i1" if self.codes == "int8" else "u1"
            fields.append(("scales", "<f2", (vectors,)))
            fields.append(("codes", kind, (vectors, width)))
        if self.clustered:
            fields.append(("assignments", "u1", (self.grid.size,)))
        return np.dtype([*fields, ("checksum", "<u8")])


def quantise(patches: torch.Tensor, row: RowFormat) -> np.ndarray:
    """Pool patch features and bring them to their stored form, on the device they are on.

    Args:
        patches: (N, P, C) floating point.
        row: the format to bring them to.

    Returns:
        (N,) records of ``row.patches``, the checksums left at zero: codes (N, S, C), int4 packed
        two to a byte, scales (N, S) float16 but for fp16, and assignments (N, P) uint8 if there
        are clusters. A vector is codes * scale; the error is at most half a scale.
    """
    import torch

    records = np.zeros(len(patches), row.patches)
    vectors = patches  # (N, S, C)
    if row.pool != "1":
        vectors, assignments = pool_patches(patches, row.pool, row.grid)
        if row.clustered:
            records["assignments"] = assignments.cpu().numpy()
    if row.codes == "fp16":
        records["codes"] = vectors.to(torch.float16).cpu().numpy()
        return records
    largest = _LARGEST[row.codes]
    scales = vectors.abs().amax(-1) / largest  # (N, S)
    scales = scales.to(torch.float16)  # (N, S)
    divisor = scales.to(vectors.dtype)  # (N, S)
    divisor = divisor.masked_fill(divisor == 0, 1)  # (N, S)
    scaled = (vectors / divisor.unsqueeze(-1)).round_()  # (N, S, C)
    codes = scaled.clamp_(-largest, largest).to(torch.int8).cpu().numpy()  # (N, S, C)
    records["codes"] = _pack(codes) if row.codes == "int4" else codes
    records["scales"] = scales.cpu().numpy()
    return records


def stored_form(patches: torch.Tensor, row: RowFormat) -> PatchBatch:
    """Return patch features (N, P, C) as they would come back from the shards."""
    import torch

    records = quantise(patches, row)
    codes, scales = _expand({name: records[name] for name in row.patches.names or ()}, row)
    return PatchBatch(
        torch.from_numpy(codes),
        None if scales is None else torch.from_numpy(scales),
        row.grid,
        alike=row.alike,
    )


def _expand(
    stored: Mapping[str, np.ndarray], row: RowFormat
) -> tuple[np.ndarray, np.ndarray | None]:
    """Give each patch of the grid the vector it was stored as.

    Args:
        stored: columns of M records: "codes" (M, S, C), int4 packed, "scales" (M, S) and
            "assignments" (M, P) where the format has them.
        row: their format.

    Returns:
        Codes (M, P, C) and scales (M, P) or None.

    Raises:
        BadIndex: an assignment names a vector that does not exist.
    """
    codes, scales = stored["codes"], stored.get("scales")  # (M, S, C), (M, S)
    if row.codes == "int4":
        codes = _unpack(codes, row.patch_dim)  # (M, S, C)
    if row.pool != "1":
        vector = stored["assignments"] if row.clustered else cells(row.grid)  # (M, P) or (P,)
        if vector.max(initial=0) >= codes.shape[1]:
            raise BadIndex("patch features are damaged", "Run `mmsearch check --repair`.")
        image = np.arange(len(codes))[:, None]  # (M, 1)
        codes = codes[image, vector]  # (M, P, C)
        scales = None if scales is None else scales[image, vector]  # (M, P)
    return (
        np.ascontiguousarray(codes),
        None if scales is None else np.ascontiguousarray(scales),
    )


def _pack(codes: np.ndarray) -> np.ndarray:
    """Two codes from -7 to 7 in a byte, the first in the low half."""
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    halves = (codes + 8).astype(np.uint8)
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def _unpack(packed: np.ndarray, width: int) -> np.ndarray:
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    codes[..., 0::2] = (packed & 15).astype(np.int8) - 8
    codes[..., 1::2] = (packed >> 4).astype(np.int8) - 8
    return np.ascontiguousarray(codes[..., :width])


def _read_ahead(rows: Rows, wanted: np.ndarray) -> None:
    """Ask for all rows at once: the disk then reads side by side, not page fault by page fault."""
    mapped = rows.base if isinstance(rows, np.memmap) else None
    if not isinstance(rows, np.memmap) or not isinstance(mapped, mmap.mmap):
        return
    if not hasattr(mmap, "MADV_WILLNEED"):  # Windows
        return
    size = rows.strides[0]
    for start in (wanted * size).tolist():
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, start + size - page)


class Rows(Protocol):
    """The rows of a shard file: an array, or what reads them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any:
        """Return one row, or those of an array of row numbers."""
        ...


class Storage(Protocol):
    """Where shard files lie. Files grow by whole rows and are read by row."""

    def rows(self, name: str, kind: np.dtype) -> Rows:
        """Return all whole rows of a file, mapped rather than read; none if it is absent."""
        ...

    def append(self, name: str, at: int, rows: np.ndarray) -> None:
        """Write rows from row ``at`` on, cutting off what was there; durable on return."""
        ...

    def names(self) -> list[str]:
        """Return the names of all files."""
        ...


class LocalStorage:
    """Shards in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rows(self, name: str, kind: np.dtype) -> np.ndarray:
        """Map a file."""
        path = self._folder / name
        try:
            count = path.stat().st_size // kind.itemsize
        except FileNotFoundError:
            count = 0
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        if count == 0:
            return np.empty((0, *kind.shape), kind.base)
        return np.memmap(path, kind.base, "r", shape=(count, *kind.shape))

    def append(self, name: str, at: int, rows: np.ndarray) -> None:
        """Write rows and wait for the disk."""
        path = self._folder / name
        if at == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            path.touch()
            with path.open("r+b") as file:
                start = at * (rows.nbytes // len(rows))
                if file.seek(0, os.SEEK_END) < start:
                    raise BadIndex(
                        f"{path} is shorter than the catalog says",
                        "Run `mmsearch check --repair`.",
                    )
                file.truncate(start)
                file.seek(start)
                file.write(np.ascontiguousarray(rows).data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror}",
                "What was indexed before is kept; make room and run the same command again.",
            ) from error

    def names(self) -> list[str]:
        """List the folder."""
        return sorted(path.name for path in self._folder.glob("*.*"))

    def clear(self) -> None:
        """Delete all shard files."""
        for name in self.names():
            if _FILE.fullmatch(name):
                (self._folder / name).unlink()


class Shards:
    """All shards of an index.

    Args:
        storage: where the files lie.
        row: the format of a row, fixed for an index.
    """

    def __init__(self, storage: Storage, row: RowFormat) -> None:
        self._storage = storage
        self.row = row
        self._mapped: dict[str, Rows] = {}

    def append(
        self,
        position: tuple[int, int],
        pooled: np.ndarray,
        records: np.ndarray,
    ) -> tuple[int, int]:
        """Store N images from a position on, overwriting what a killed run left there.

        Args:
            position: (shard, row) after the last image that counts.
            pooled: (N, D) float32.
            records: (N,) as ``quantise`` gives them; their checksums are filled in.

        Returns:
            The (shard, row) of the first image; the others follow it.

        Raises:
            StorageError: the disk is full or the folder cannot be written to.
        """
        shard, row = position
        if row * self.row.patches.itemsize >= SHARD_BYTES:
            shard, row = shard + 1, 0
        pooled = np.ascontiguousarray(pooled, "<f4")
        records["checksum"] = [_checksum(*pair) for pair in zip(pooled, records, strict=True)]
        self._storage.append(f"{shard:06d}.pooled", row, pooled)
        self._storage.append(f"{shard:06d}.patches", row, records)
        return shard, row

    def pooled(self, positions: np.ndarray) -> np.ndarray:
        """Read pooled vectors.

        Args:
            positions: (M, 2) int64, shard and row of each image.

        Returns:
            (M, D) float32, in the order asked for.
        """
        result = np.empty((len(positions), self.row.embed_dim), np.float32)
        for shard, places in _by_shard(positions):
            result[places] = self._rows(f"{shard:06d}.pooled", self.row.pooled, positions, places)
        return result

    def patches(self, positions: np.ndarray, *, allow_missing: bool = False) -> PatchBatch:
        """Read the features of images, in the order asked for.

        Args:
            positions: (M, 2) int64, shard and row of each image.
            allow_missing: mark what cannot be read in ``PatchBatch.present`` instead of raising.

        Raises:
            BadIndex: rows are lacking. StorageError: they cannot be read.
        """
        import torch

        present = np.ones(len(positions), bool)

        kind = self.row.patches
        stored = {
            name: np.zeros((len(positions), *kind[name].shape), kind[name].base)
            for name in kind.names or ()
            if name != "checksum"
        }
        pooled = np.zeros((len(positions), self.row.embed_dim), np.float32)
        for shard, places in _by_shard(positions):
            files = ((f"{shard:06d}.pooled", self.row.pooled), (f"{shard:06d}.patches", kind))
            if allow_missing:
                there = places
                for name, layout in files:
                    there = self._readable(name, layout, positions, there)
                present[np.setdiff1d(places, there)] = False
                places = there
            vectors, rows = (self._rows(*file, positions, places) for file in files)
            pooled[places] = vectors
            for name, column in stored.items():
                column[places] = rows[name]
        codes, scales = _expand(stored, self.row)
        return PatchBatch(
            codes=torch.from_numpy(codes),  # (M, P, C)
            scales=None if scales is None else torch.from_numpy(scales),  # (M, P)
            grid=self.row.grid,
            present=None if present.all() else torch.from_numpy(present),  # (M,)
            pooled=torch.from_numpy(pooled),  # (M, D)
            alike=self.row.alike,
        )

    def _readable(
        self, name: str, kind: np.dtype, positions: np.ndarray, places: np.ndarray
    ) -> np.ndarray:
        """Return those of the places whose rows can be read."""
        try:
            self._rows(name, kind, positions, places)
        except StorageError:
            return places[:0]
        except BadIndex:
            if len(places) == 1:
                return places[:0]
            halves = np.array_split(places, 2)
            return np.concatenate([self._readable(name, kind, positions, half) for half in halves])
        return places

    def _rows(
        self, name: str, kind: np.dtype, positions: np.ndarray, places: np.ndarray
    ) -> np.ndarray:
        wanted = positions[places, 1]
        if not len(wanted):
            return np.empty((0, *kind.shape), kind.base)
        mapped = self._mapped.get(name)
        if mapped is None or wanted.max() >= len(mapped):
            mapped = self._mapped[name] = self._storage.rows(name, kind)
        if wanted.max() >= len(mapped):
            raise BadIndex(
                f"shard file {name} lacks rows that the catalog names",
                "Run `mmsearch check --repair`.",
            )
        _read_ahead(mapped, wanted)
        return mapped[wanted]

    def damaged(self, positions: np.ndarray) -> np.ndarray:
        """Return a (M,) bool array, True for rows that are absent or whose checksum is wrong."""
        bad = np.ones(len(positions), bool)
        for shard, places in _by_shard(positions):
            pooled = self._storage.rows(f"{shard:06d}.pooled", self.row.pooled)
            records = self._storage.rows(f"{shard:06d}.patches", self.row.patches)
            there = places[positions[places, 1] < min(len(pooled), len(records))]
            for some in np.split(there, range(CHECKED_AT_ONCE, len(there), CHECKED_AT_ONCE)):
                bad[some] = _mismatches(pooled, records, positions[some, 1])
        return bad

    def lengths(self) -> dict[int, int]:
        """Return how many whole rows each shard holds on disk."""
        return {
            shard: min(
                len(self._storage.rows(f"{shard:06d}.pooled", self.row.pooled)),
                len(self._storage.rows(f"{shard:06d}.patches", self.row.patches)),
            )
            for shard in self.numbers()
        }

    def numbers(self) -> Sequence[int]:
        """Return the numbers of the shards that exist."""
        stems = {name.split(".")[0] for name in self._storage.names()}
        return sorted(int(stem) for stem in stems if stem.isdecimal())


def _by_shard(positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Group (M, 2) positions: each shard with the indices that lie in it."""
    for shard in np.unique(positions[:, 0]):
        yield int(shard), np.flatnonzero(positions[:, 0] == shard)


def _mismatches(pooled: Rows, records: Rows, rows: np.ndarray) -> np.ndarray:
    """Say of which rows the checksum is wrong, or a part of the file gone, (M,) bool."""
    try:
        vectors, stored = pooled[rows], records[rows]  # together: a remote store is asked once
    except BadIndex:
        if len(rows) == 1:
            return np.ones(1, bool)
        halves = np.array_split(rows, 2)
        return np.concatenate([_mismatches(pooled, records, half) for half in halves])
    wrong = [
        _checksum(vector, record) != record["checksum"]
        for vector, record in zip(vectors, stored, strict=True)
    ]
    return np.array(wrong, bool)


def _checksum(pooled: np.ndarray, record: np.ndarray | np.void) -> int:
    digest = xxhash.xxh3_64(pooled.tobytes())
    digest.update(record.tobytes()[:-8])  # all but the checksum itself, which comes last
    return digest.intdigest()
