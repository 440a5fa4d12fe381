"""Sets that ask whether word order and attributes are understood, in their published formats.

    sugarcrepe  ``add_att.json`` … ``swap_obj.json``: id -> filename, caption, negative_caption
                (Hsieh et al., arXiv 2306.14610); images of COCO val2017
    winoground  ``examples.jsonl``: two images and two captions of the same words
                (Thrush et al., arXiv 2204.03162)
    aro         ``visual_genome_relation.json``, ``visual_genome_attribution.json``: a box of an
                image, its true_caption and false_caption (Yuksekgonul et al., arXiv 2210.01936)

The right answer must score strictly higher: a model that gives everything the same score gets 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..core.errors import InputError
from ..core.types import Grid, PatchBatch
from .statistics import Clusters, Difference, Estimate

if TYPE_CHECKING:
    from ..indexing.encoder import Encoder
    from ..rerank.scorers import Scorer

TRIALS_AT_ONCE = 32
FULL_SIZE = 1 << 30  # no picture has a longer side
LEAST_OF_A_KIND = {"attribution": 25}  # ARO leaves pairs of attributes with fewer trials out


class View(NamedTuple):
    """An image, or a box of one."""

    path: Path
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels


@dataclass(frozen=True, slots=True)
class Trial:
    """One question: caption i belongs to image i; captions beyond the images are wrong."""

    subset: str
    views: tuple[View, ...]
    captions: tuple[str, ...]
    kind: str = ""  # ARO: the relation, or the pair of attributes


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often one scorer was right in one subset."""

    subset: str  # of the set, or "all"
    kind: str  # within the subset; empty for all kinds together
    measure: str  # "accuracy", ARO's "macro", or Winoground's "text", "image", "group"
    trials: int
    scorer: str
    estimate: Estimate
    difference: Difference | None  # from coarse; None for it


@dataclass(frozen=True, slots=True)
class Task:
    """The trials of a set, and those that could not be used."""

    name: str
    trials: tuple[Trial, ...]
    missing: tuple[str, ...]  # images that are not there


def read_task(name: str, data: Path, images: Path | None, limit: int | None, seed: int) -> Task:
    """Read a set.

    Args:
        name: "sugarcrepe", "winoground" or "aro".
        data: the published JSON file, or the folder that holds it.
        images: where the images lie; by default ``images`` beside the JSON.
        limit: draw at most so many trials at random.
        seed: of the draw.

    Raises:
        InputError: the files are not there or not in the published format.
    """
    files, read = _READERS[name]
    found = [data] if data.is_file() else [data / each for each in files if (data / each).exists()]
    if not found:
        raise InputError(
            f"{data} holds none of {', '.join(files)}", f"give --data FOLDER of {name}"
        )
    root = images or found[0].parent / "images"
    try:
        trials = [trial for file in found for trial in read(file, root)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{found[0]} is not in the format of {name}: {error!r}", "give the file as published"
        ) from error
    there = {view.path: view.path.is_file() for trial in trials for view in trial.views}
    usable = [trial for trial in trials if all(there[view.path] for view in trial.views)]
    missing = tuple(str(path) for path, exists in there.items() if not exists)
    if not usable:
        raise InputError(f"no image of {name} is in {root}", "name their folder with --images")
    if limit is not None and limit < len(usable):
        kept = np.random.default_rng(seed).choice(len(usable), limit, replace=False)
        usable = [usable[at] for at in sorted(kept)]
    return Task(name, tuple(usable), missing)


def _sugarcrepe(file: Path, images: Path) -> Iterator[Trial]:
    for row in json.loads(file.read_text(encoding="utf-8")).values():
        captions = row["caption"], row["negative_caption"]
        yield Trial(file.stem, (View(images / row["filename"]),), captions)


def _winoground(file: Path, images: Path) -> Iterator[Trial]:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            views = tuple(View(_picture(images, row[f"image_{i}"])) for i in (0, 1))
            yield Trial(row["collapsed_tag"], views, (row["caption_0"], row["caption_1"]))


def _picture(images: Path, name: str) -> Path:
    """Winoground names its images without the suffix."""
    return images / name if Path(name).suffix else images / f"{name}.png"


def _aro(file: Path, images: Path) -> Iterator[Trial]:
    for row in json.loads(file.read_text(encoding="utf-8")):
        left, top = row["bbox_x"], row["bbox_y"]
        box = left, top, left + row["bbox_w"], top + row["bbox_h"]
        kind = row.get("relation_name") or "_".join(row["attributes"])
        subset = file.stem.removeprefix("visual_genome_")
        captions = row["true_caption"], row["false_caption"]
        yield Trial(subset, (View(images / row["image_path"], box),), captions, kind)


Columns = dict[str, np.ndarray]
Reader = Callable[[Path, Path], Iterator[Trial]]
_READERS: dict[str, tuple[list[str], Reader]] = {
    "sugarcrepe": (
        [
            f"{kind}.json"
            for kind in (
                "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att",
                "swap_obj",
            )
        ],
        _sugarcrepe,
    ),
    "winoground": (["examples.jsonl"], _winoground),
    "aro": (["visual_genome_relation.json", "visual_genome_attribution.json"], _aro),
}  # fmt: skip


def run_task(
    task: Task,
    encoder: Encoder,
    scorers: Sequence[Scorer],
    seed: int,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Accuracy]:
    """Score all trials with the coarse stage and each scorer.

    Images are encoded as they are needed and their patches used as they come, not as int8.

    Returns:
        Each measure of each scorer, for each subset, for ARO's kinds in it, then for all trials.

    Raises:
        InputError: an image cannot be read.
    """
    names = ["coarse", *(scorer.name for scorer in scorers)]
    right: dict[str, list[dict[str, bool]]] = {name: [] for name in names}
    for start in range(0, len(task.trials), TRIALS_AT_ONCE):
        trials = task.trials[start : start + TRIALS_AT_ONCE]
        for name, scores in zip(names, _score(trials, encoder, scorers), strict=True):
            right[name] += [_judge(each) for each in scores]
        on_progress(f"score {task.name}", len(trials), len(task.trials))
    return list(_summarise(task, right, seed))


def _score(
    trials: Sequence[Trial], encoder: Encoder, scorers: Sequence[Scorer]
) -> list[list[np.ndarray]]:
    """Score every caption of each trial with every image of it.

    Returns:
        A list for the coarse stage and one for each scorer: per trial (captions, images).
    """
    views = list(dict.fromkeys(view for trial in trials for view in trial.views))
    place = {view: row for row, view in enumerate(views)}
    pictures = encoder.encode_images(np.stack([_pixels(view, encoder) for view in views]))
    text = encoder.encode_texts([caption for trial in trials for caption in trial.captions])
    width = max(len(trial.views) for trial in trials)
    rows = torch.tensor(
        [
            [place[view] for view in trial.views] + [-1] * (width - len(trial.views))
            for trial in trials
            for _ in trial.captions
        ]
    )  # (Q, N)
    pooled = pictures.pooled.cpu()  # (M, D)
    cosines = text.pooled.cpu() @ pooled.T  # (Q, M)
    coarse = cosines.gather(1, rows.clamp_min(0)).masked_fill(rows < 0, -torch.inf)  # (Q, N)
    patches = PatchBatch(pictures.patches.cpu(), None, Grid(*pictures.grid), pooled=pooled)
    tables = [coarse]
    tables += [scorer.score(text, patches, rows, coarse).rank.cpu() for scorer in scorers]
    ends = np.cumsum([len(trial.captions) for trial in trials])[:-1]
    return [
        [
            part[:, : len(trial.views)]
            for part, trial in zip(np.split(table.numpy(), ends), trials, strict=True)
        ]
        for table in tables
    ]


def _pixels(view: View, encoder: Encoder) -> np.ndarray:
    """Decode an image, or the box of it, for the model, (H, W, 3) uint8.

    Raises:
        InputError: it cannot be read: figures would count that against the model.
    """
    from ..indexing.images import UndecodableImage, decode, open_thumbnail

    try:
        if view.box is None:
            return decode(view.path, encoder.spec.input_spec).pixels
        box = BytesIO()
        open_thumbnail(view.path, FULL_SIZE).crop(view.box).save(box, "BMP")
        return decode(box.getvalue(), encoder.spec.input_spec).pixels
    except (UndecodableImage, OSError) as error:
        raise InputError(
            f"cannot read {view.path}: {error}", "Mend the picture, or leave its trials out."
        ) from error


def _judge(scores: np.ndarray) -> dict[str, bool]:
    """Compare the (captions, images) scores of a trial, strictly."""
    own = np.diagonal(scores)  # (images,)
    others = scores.astype(float)
    others[np.arange(len(own)), np.arange(len(own))] = -np.inf
    text = bool((own > others.max(axis=0)).all())  # each image prefers its caption
    if len(own) == 1:
        return {"accuracy": text}
    image = bool((own > others[: len(own)].max(axis=1)).all())  # each caption its image
    return {"text": text, "image": image, "group": text and image}


def _summarise(
    task: Task, right: dict[str, list[dict[str, bool]]], seed: int
) -> Iterator[Accuracy]:
    subsets = np.array([trial.subset for trial in task.trials])
    kinds = np.array([trial.kind for trial in task.trials])
    images = [str(trial.views[0].path) for trial in task.trials]
    clusters = np.unique(images, return_inverse=True)[1]
    columns = {
        name: {
            measure: np.array([float(each[measure]) for each in judged]) for measure in judged[0]
        }
        for name, judged in right.items()
    }

    def summarise(subset: str, kind: str, rows: np.ndarray, weights: Columns) -> Iterator[Accuracy]:
        drawn = Clusters(clusters[rows], seed)
        first: dict[str, np.ndarray] = {}
        for name, values in columns.items():
            chosen = {measure: column[rows] for measure, column in values.items()}
            chosen |= {measure: chosen["accuracy"] * weight for measure, weight in weights.items()}
            first = first or chosen
            differences = drawn.differences(first, chosen) if chosen is not first else {}
            for measure, estimate in drawn.estimates(chosen).items():
                yield Accuracy(
                    subset, kind, measure, len(rows), name, estimate, differences.get(measure)
                )

    for subset in dict.fromkeys(subsets.tolist()):
        rows = np.flatnonzero(subsets == subset)
        names, kind_of, counts = np.unique(kinds[rows], return_inverse=True, return_counts=True)
        if not names.any():
            yield from summarise(subset, "", rows, {})
            continue
        # The mean over kinds is that over trials with each weighing 1 / (trials of its kind).
        enough = counts >= LEAST_OF_A_KIND.get(subset, 1)
        weights: Columns = {}
        if enough.any():  # else there is no mean over kinds, as with few trials drawn
            share = np.where(enough, len(rows) / (enough.sum() * counts), 0.0)
            weights["macro"] = share[kind_of]
        yield from summarise(subset, "", rows, weights)
        for at in np.flatnonzero(enough):
            yield from summarise(subset, str(names[at]), rows[kind_of == at], {})
    yield from summarise("all", "", np.arange(len(subsets)), {})
