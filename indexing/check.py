"""Do catalog, shards and Milvus agree? And if not, make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core.errors import BadIndex
from .index import ImageIndex

_STEP = 1000  # rows looked at in one go


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    message: str
    harmless: bool = False  # the next run of `mmsearch index` completes it by itself


def check(index: ImageIndex, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Compare the three, reading every row of the shards.

    Args:
        index: an open index.
        progress: told (rows done, rows in all).

    Raises:
        StorageError: Milvus cannot be reached.
    """
    tell = progress or (lambda done, total: None)
    findings: list[Finding] = []
    catalog, shards, vectors = index.parts
    if wrong := catalog.integrity():
        findings.append(Finding(f"the catalog is damaged: {wrong}"))
    hashes, _ = damaged_contents(index, tell)
    if hashes:
        findings.append(Finding(f"{len(hashes)} pictures have damaged or missing features"))
    shard, row = catalog.end()
    tail = {
        number: length - (row if number == shard else 0)
        for number, length in shards.lengths().items()
        if number >= shard
    }
    if extra := sum(max(0, length) for length in tail.values()):
        findings.append(
            Finding(f"{extra} rows of the shards belong to a run that was cut off", harmless=True)
        )
    unfinished = index.stats().unfinished
    try:
        there = vectors.ids()
    except BadIndex as error:
        findings.append(Finding(error.message))
        return findings
    live, positions = catalog.live()
    lacking, orphans = np.setdiff1d(live, there), np.setdiff1d(there, live)
    if len(lacking):
        findings.append(Finding(f"{len(lacking)} pictures are missing from Milvus", unfinished))
    if len(orphans):
        findings.append(Finding(f"{len(orphans)} vectors in Milvus belong to no file", unfinished))
    if different := differing(index, live, positions):
        findings.append(Finding(f"{len(different)} vectors in Milvus are not those of the shards"))
    return findings


def repair(index: ImageIndex, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Mend what ``check`` finds, from the shards and without the model.

    Pictures whose features are damaged are forgotten; the next run embeds them again.

    Returns:
        What was done, a sentence each.

    Raises:
        BadIndex: the catalog is damaged.
        IndexBusy: another process writes to the index.
        StorageError: Milvus cannot be reached.
    """
    tell = progress or (lambda done, total: None)
    index.hold()
    done: list[str] = []
    catalog, _, vectors = index.parts
    if wrong := catalog.integrity():
        raise BadIndex(
            f"the catalog is damaged: {wrong}",
            "It cannot be mended. Rebuild: mmsearch index --rebuild PATH...",
        )
    hashes, _ = damaged_contents(index, tell)
    index.mark_unfinished()
    if hashes:
        catalog.forget_contents(hashes)
        done.append(
            f"forgot {len(hashes)} pictures with damaged features: run `mmsearch index` again"
        )
    try:
        vectors.ids()
    except BadIndex:
        index.reset_vectors()
        done.append("made the Milvus collection anew")
    put, taken = index.reconcile()
    if put:
        done.append(f"put {put} pictures into Milvus")
    if taken:
        done.append(f"took {taken} vectors without a file out of Milvus")
    if different := differing(index, *catalog.live()):
        index.push(different)
        vectors.flush()
        done.append(f"replaced {len(different)} wrong vectors in Milvus")
    index.mark_finished()
    return done


def damaged_contents(
    index: ImageIndex, tell: Callable[[int, int], None]
) -> tuple[list[bytes], np.ndarray]:
    """Return the hashes and the positions (M, 2) of contents whose rows are damaged."""
    catalog, shards, _ = index.parts
    hashes, positions = catalog.all_positions()
    bad: list[int] = []
    for start in range(0, len(hashes), _STEP):
        damaged = shards.damaged(positions[start : start + _STEP])
        bad += (start + np.flatnonzero(damaged)).tolist()
        tell(min(start + _STEP, len(hashes)), len(hashes))
    return [hashes[at] for at in bad], positions[bad]


def differing(index: ImageIndex, live: np.ndarray, positions: np.ndarray) -> list[int]:
    """Return the ids whose vector in Milvus is not the one in the shards."""
    _, shards, vectors = index.parts
    found: list[int] = []
    sound = ~shards.damaged(positions)
    live, positions = live[sound], positions[sound]
    for start in range(0, len(live), _STEP):
        ids = live[start : start + _STEP].tolist()
        stored = vectors.vectors(ids)
        pooled = shards.pooled(positions[start : start + _STEP])
        found += [
            number
            for number, vector in zip(ids, pooled, strict=True)
            if number in stored and not np.allclose(stored[number], vector, atol=1e-3)
        ]
    return found
