"""What is searched: the images of a caption set, out of an index that has embedded them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import InputError
from ..core.settings import cache_dir
from ..core.types import PatchBatch
from ..rerank.rerank import read_picture
from .datasets import CaptionSet
from .formats import Problem

if TYPE_CHECKING:
    from ..indexing.index import ImageIndex


@dataclass(frozen=True, slots=True)
class Gallery:
    """M images: those of the captions first, in their order, then perhaps others."""

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    ids: np.ndarray  # (M,) int64, in the index
    vectors: np.ndarray  # (M, D) float32, L2-normalised
    fetch: Callable[[np.ndarray], PatchBatch]  # rows of the gallery -> their patches

    def pictures(self, rows: Sequence[int]) -> list[np.ndarray | None]:
        """Read images for a reranker that looks at them, (H, W, 3) uint8 each.

        Raises:
            InputError: one cannot be read: figures would count that against the reranker.
        """
        return [self._picture(self.paths[row]) for row in rows]

    def _picture(self, path: Path) -> np.ndarray:
        try:
            return read_picture(path)
        except (InputError, OSError) as error:
            raise InputError(
                f"cannot read {path}, which the reranker must look at: {error}",
                "Put it back, or leave its captions out.",
            ) from error


def cache_index_dir(
    captions: CaptionSet, model: str, pretrained: str | None, precision: str
) -> Path:
    """Where the embedded images of a caption set are kept when no index is named.

    The same images with the same model come to the same place, whichever captions are asked.
    """
    root = captions.source if captions.source.is_dir() else captions.source.parent
    folder = captions.images[0].parent
    key = "\0".join([str(root), str(folder), model, pretrained or "", precision])
    return cache_dir() / "eval" / f"{folder.name}-{sha256(key.encode()).hexdigest()[:12]}"


def missing_images(index: ImageIndex, images: Sequence[Path]) -> list[Path]:
    """Return the files to embed so that the index has all of `images`.

    For a picture inside a tar that is the tar, which is embedded as a whole.
    """
    absent = [path for path in images if index.id_of(path) is None]
    return list(dict.fromkeys(file_of(path) for path in absent))


def file_of(image: Path) -> Path:
    """Return the file that holds an image: itself, or its tar."""
    archive, bang, _ = str(image).partition(".tar!")
    return Path(f"{archive}.tar") if bang else image


def open_gallery(
    index: ImageIndex, captions: CaptionSet, whole_index: bool = False, strict: bool = False
) -> tuple[CaptionSet, Gallery]:
    """Take the images of a caption set out of an index.

    Args:
        index: has been given all images before.
        captions: which images; captions of one that could not be embedded are left out.
        whole_index: add every other image of the index, so that there is more to confuse.
        strict: raise where a caption would be left out.

    Raises:
        InputError: no caption is left; `strict`, and one would be left out.
    """
    found = [index.id_of(path) for path in captions.images]
    captions = _without_unreadable(captions, found, index, strict)
    own = [each for each in found if each is not None]
    names, paths = list(captions.names), list(captions.images)
    stored, pooled = index.pooled()  # (K,), (K, D)
    if whole_index:
        others = sorted(set(stored.tolist()) - set(own))
        extra = [record.path for record in index.records(others)]
        own, names, paths = own + others, names + extra, paths + [Path(path) for path in extra]
    ids = np.array(own, dtype=np.int64)
    order = np.argsort(stored)
    rows = order[np.searchsorted(stored, ids, sorter=order)]  # (M,)
    return captions, Gallery(
        tuple(names),
        tuple(paths),
        ids,
        np.ascontiguousarray(pooled[rows]),
        lambda wanted: index.patches(ids[wanted].tolist()),
    )


def _without_unreadable(
    captions: CaptionSet, found: list[int | None], index: ImageIndex, strict: bool
) -> CaptionSet:
    """Leave out the images that could not be embedded, and the captions they alone answer."""
    bad = {row for row, each in enumerate(found) if each is None}
    if not bad:
        return captions
    reasons = {failure.path: failure.reason for failure in index.failures()}
    kept = [row for row in range(len(found)) if row not in bad]
    moved = {old: new for new, old in enumerate(kept)}
    left, problems = [], list(captions.problems)
    for caption in captions.captions:
        grades = tuple((moved[row], grade) for row, grade in caption.grades if row in moved)
        if grades:
            image = max(grades, key=lambda pair: pair[1])[0]
            left.append(replace(caption, image=image, grades=grades))
        else:
            path = captions.images[caption.image]
            detail = f"{path}: {reasons.get(str(path), 'not in the index')}"
            problems.append(Problem(f"caption {caption.id}", "unreadable image", detail))
    if strict or not left:
        first = captions.images[min(bad)]
        raise InputError(
            f"{len(bad)} images could not be embedded; the first, {first}: "
            f"{reasons.get(str(first), 'not in the index')}",
            "mend them, or leave out --strict to skip their captions",
        )
    return replace(
        captions,
        images=tuple(captions.images[row] for row in kept),
        names=tuple(captions.names[row] for row in kept),
        captions=tuple(left),
        problems=tuple(problems),
    )
