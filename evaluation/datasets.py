"""A set of captions and the images they describe: what an evaluation or a training run reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from .formats import Entry, Problem, is_text, recognise
from .trec import read_qrels


@dataclass(frozen=True, slots=True)
class Caption:
    """One query, and the images that answer it."""

    id: str  # unique in its set: the file's own, else "IMAGE#0", "IMAGE#1", ...
    text: str
    image: int  # row in CaptionSet.images; with graded judgements the best one
    grades: tuple[tuple[int, int], ...]  # (image, grade > 0); one image of grade 1 if not judged
    split: str | None = None


@dataclass(frozen=True, slots=True)
class CaptionSet:
    """Captions over a gallery of images."""

    source: Path
    format: str
    images: tuple[Path, ...]  # absolute; "archive.tar!member" for a picture inside a tar
    names: tuple[str, ...]  # one an image, as the caption file writes it
    captions: tuple[Caption, ...]
    problems: tuple[Problem, ...]  # rows that were left out

    def skipped(self) -> dict[str, int]:
        """How many rows were left out, by kind."""
        return dict(Counter(problem.kind for problem in self.problems))


def read_captions(
    path: Path,
    images_dir: Path | None = None,
    split: str | None = None,
    strict: bool = False,
    qrels: Path | None = None,
) -> CaptionSet:
    """Read captions in any of the formats of `formats.recognise`.

    Args:
        path: the caption file, or a folder of metadata files or WebDataset tars.
        images_dir: where the images lie; by default beside the caption file, or in ``images``
            or ``Images`` there.
        split: keep these splits only; several separated by commas.
        strict: raise on the first problem instead of leaving the row out.
        qrels: TREC judgements of (caption id, image name); they replace "a caption's own image
            is relevant with grade 1". A caption without a relevant image is left out.

    Raises:
        InputError: not readable, no caption left, a split that is not there, or, when `strict`,
            any row left out.
    """
    name, rows = recognise(path)
    judgements = read_qrels(qrels) if qrels else None
    beside = path if path.is_dir() else path.parent
    roots = [images_dir] if images_dir else [beside, beside / "images", beside / "Images"]
    builder = _Builder([root.absolute() for root in roots], judgements)
    wanted = set(split.split(",")) if split else None
    seen: set[str] = set()
    for row in rows:
        if isinstance(row, Problem):
            builder.problems.append(row)
            continue
        if row.split:
            seen.add(row.split)
        if wanted is None or row.split in wanted:
            builder.add(row)
    if wanted and (absent := wanted - seen):
        raise InputError(
            f"{path} has no split {', '.join(sorted(absent))!r}",
            f"its splits are: {', '.join(sorted(seen))}" if seen else "its rows name no split",
        )
    if strict and builder.problems:
        raise InputError(
            f"{path}, {builder.problems[0]} ({len(builder.problems)} such rows)",
            "mend them, or leave out --strict to skip them",
        )
    if not builder.captions:
        first = f"; the first, {builder.problems[0]}" if builder.problems else ""
        raise InputError(
            f"{path}: no caption can be used: {len(builder.problems)} rows left out{first}",
            "name the folder that holds the images with --images",
        )
    return CaptionSet(
        path.absolute(),
        name,
        tuple(builder.images),
        tuple(builder.names),
        tuple(builder.captions),
        tuple(builder.problems),
    )


class _Builder:
    """Gathers captions, looking each image up once."""

    def __init__(
        self, roots: list[Path], judgements: Mapping[str, Mapping[str, int]] | None
    ) -> None:
        self.roots = roots
        self.judgements = judgements
        self.images: list[Path] = []
        self.captions: list[Caption] = []
        self.problems: list[Problem] = []
        self.names: list[str] = []
        self.rows: dict[str, int] = {}  # image name -> row in self.images
        self.paths: dict[Path, int] = {}  # the same by file: two names may mean one
        self.missing: set[str] = set()
        self.turns: Counter[str | None] = Counter()  # captions seen of an image
        self.texts: set[tuple[str | None, str]] = set()
        self.ids: set[str] = set()

    def add(self, entry: Entry) -> None:
        """Take an entry in, or note why not."""
        text = entry.text.strip()
        key = entry.id or f"{entry.image}#{self.turns[entry.image]}"
        self.turns[entry.image] += 1
        if not is_text(f"{entry.image}{text}"):
            self._leave_out(entry, "encoding", "neither UTF-8 nor UTF-16 with a byte order mark")
        elif not text:
            self._leave_out(entry, "empty caption", str(entry.image))
        elif (entry.image, text) in self.texts:
            self._leave_out(entry, "duplicate", f"{entry.image} has this caption already")
        elif key in self.ids:
            self._leave_out(entry, "duplicate", f"the id {key} is taken")
        elif grades := self._grades(entry, key):
            self.texts.add((entry.image, text))
            self.ids.add(key)
            best = max(grades, key=lambda pair: pair[1])[0]
            self.captions.append(Caption(key, text, best, grades, entry.split))

    def _leave_out(self, entry: Entry, kind: str, detail: str) -> None:
        self.problems.append(Problem(entry.place, kind, detail))

    def _grades(self, entry: Entry, key: str) -> tuple[tuple[int, int], ...]:
        """The images that answer this caption; empty after noting why there is none."""
        if self.judgements is not None:
            judged = self.judgements.get(key, {})
            if entry.image is not None:
                self._row(entry.image)  # it belongs to the gallery whether judged relevant or not
            found = [(self._row(name), grade) for name, grade in judged.items() if grade > 0]
            grades = tuple((row, grade) for row, grade in found if row is not None)
            if not grades:
                self._leave_out(entry, "unjudged", f"no relevant image is known for {key}")
            return grades
        if not (entry.image and entry.image.strip()):
            self._leave_out(entry, "malformed", "names no image")
            return ()
        row = self._row(entry.image)
        if row is None:
            self._leave_out(entry, "missing image", f"{entry.image} is not in {self.roots[0]}")
            return ()
        return ((row, 1),)

    def _row(self, name: str) -> int | None:
        """The row of an image in the gallery, added if new; None if there is no such file."""
        if name in self.rows:
            return self.rows[name]
        if name in self.missing:
            return None
        path = next((path for path in self._places(name) if _there(path)), None)
        if path is None:
            self.missing.add(name)
            return None
        self.rows[name] = self.paths.setdefault(path, len(self.images))
        if self.rows[name] == len(self.images):
            self.images.append(path)
            self.names.append(name)
        return self.rows[name]

    def _places(self, name: str) -> list[Path]:
        """Where an image may lie: under a root, with or without the folder its name carries."""
        short = Path(name).name
        return [root / each for root in self.roots for each in dict.fromkeys((name, short))]


def _there(path: Path) -> bool:
    """Whether a file exists, or the tar it is a member of."""
    archive, bang, _ = str(path).rpartition(".tar!")
    # Path.is_file would raise at a caption that stands where a name should: it is too long.
    return os.path.isfile(f"{archive}.tar" if bang else path)  # noqa: PTH113
