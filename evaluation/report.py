"""The HTML report: one file that needs nothing else, to read, to send and to print."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from ..indexing.images import UndecodableImage, open_thumbnail, source_of
from .datasets import CaptionSet
from .evaluate import Direction
from .figures import rank_changes, recall_curves
from .gallery import Gallery
from .results import Document
from .statistics import Difference, Estimate

SHOWN = 20  # gains, losses and misses each
FIRST = 5  # answers shown for a miss
THUMBNAIL = 160  # pixels of the longer side; shown at half of that

TITLES = {"t2i": "Text to image", "i2t": "Image to text"}


@dataclass(frozen=True, slots=True)
class Item:
    """A text or a picture to show."""

    text: str = ""
    picture: str = ""  # data URI
    right: bool = False  # it answers the query


@dataclass(frozen=True, slots=True)
class Case:
    """One query worth looking at."""

    query: Item
    answer: Item  # the first relevant document
    before: int  # rank in the coarse list
    after: int  # rank in the last row's
    coarse: list[Item]  # first answers of the coarse list
    final: list[Item]  # first answers of the last row's


def write_report(
    path: Path,
    document: Document,
    captions: CaptionSet,
    gallery: Gallery,
    directions: list[Direction],
) -> None:
    """Render an evaluation.

    Args:
        path: the file to write.
        document: the evaluation as JSON has it.
        captions: the texts.
        gallery: the pictures.
        directions: the rankings.
    """
    pictures = _Thumbnails(gallery.paths)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": figure, "interval": interval, "change": change, "p": p_value}
    template = environment.from_string(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    )
    sections = [_section(direction, captions, pictures) for direction in directions]
    path.write_text(template.render(document=document, sections=sections), encoding="utf-8")


def hit_label(direction: Direction) -> str:
    """Name hit@k: it is recall@k where a query has one answer, and not where it has several."""
    return "R" if direction.single else "hit"


def measures(direction: Direction) -> dict[str, str]:
    """Return which measures to show and how to call them."""
    names = {name: name for name in direction.rows[0].estimates}
    shown = {name: f"{hit_label(direction)}{name[3:]}" for name in names if name[:4] == "hit@"}
    if not direction.single:
        shown |= {name: f"R{name[6:]}" for name in names if name.startswith("recall@")}
    shown |= {"mrr": "MRR", "ndcg@10": "nDCG@10"}
    if not direction.single:
        shown["map"] = "mAP"
    return shown | {"median_rank": "MedR"}


def figure(value: float, name: str) -> str:
    """Write a figure: shares in percent, ranks as they are."""
    return f"{value:,.0f}" if name == "median_rank" else f"{100 * value:.1f}"


def interval(estimate: Estimate | Difference, name: str, sign: str = "") -> str:
    """Write a 95% interval."""
    if name == "median_rank":
        return f"{estimate.low:,.0f}–{estimate.high:,.0f}"
    ends = f"{100 * estimate.low:{sign}.1f}", f"{100 * estimate.high:{sign}.1f}"
    return (", " if sign else "–").join(ends)


def change(difference: Difference) -> str:
    """Write a difference in points, with its sign."""
    return f"{100 * difference.value:+.1f}"


def p_value(p: float) -> str:
    """Write p as papers do."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


class _Thumbnails:
    """Small pictures as data URIs, each made once."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._made: dict[int, str] = {}

    def __getitem__(self, row: int) -> str:
        if row not in self._made:
            try:
                image = open_thumbnail(source_of(self._paths[row]), THUMBNAIL)
            except (UndecodableImage, OSError):
                return ""  # gone since it was embedded: the page shows its name alone
            file = BytesIO()
            image.save(file, "JPEG", quality=82)
            self._made[row] = "data:image/jpeg;base64," + b64encode(file.getvalue()).decode()
        return self._made[row]


def _section(direction: Direction, captions: CaptionSet, pictures: _Thumbnails) -> dict[str, Any]:
    """Collect what the template shows of one direction."""
    label = hit_label(direction)
    reranked = len(direction.rows) > 1
    before, after = direction.rows[0].ranking.first, direction.rows[-1].ranking.first
    moved = before - after  # (Q,) above zero is a gain
    lists = {
        "gains": np.lexsort((after, -moved))[: min(SHOWN, int((moved > 0).sum()))],
        "losses": np.lexsort((before, moved))[: min(SHOWN, int((moved < 0).sum()))],
        "misses": np.argsort(-after, kind="stable")[: min(SHOWN, int((after > 1).sum()))],
    }
    return {
        "direction": direction,
        "title": TITLES[direction.name],
        "label": label,
        "measures": measures(direction),
        "reranked": reranked,
        "curves": Markup(recall_curves(direction, label)),
        "changes": rank_changes(direction) if reranked else "",
        "cases": {
            name: [_case(direction, int(query), captions, pictures) for query in queries]
            for name, queries in lists.items()
        },
    }


def _case(direction: Direction, query: int, captions: CaptionSet, pictures: _Thumbnails) -> Case:
    def text(row: int, right: bool = False) -> Item:
        return Item(captions.captions[row].text, right=right)

    def picture(row: int, right: bool = False) -> Item:
        return Item(direction_name(row), pictures[row], right)

    def direction_name(row: int) -> str:
        names = direction.documents if direction.name == "t2i" else captions.names
        return Path(names[row]).name

    asked, answered = (text, picture) if direction.name == "t2i" else (picture, text)
    first, last = direction.rows[0].ranking, direction.rows[-1].ranking
    _, relevant, grades = direction.relevance.within(query, query + 1)
    listed = last.order[query][last.grades[query] > 0]
    answer = int(listed[0] if len(listed) else relevant[grades.argmax()])
    return Case(
        asked(int(direction.sources[query])),
        answered(answer, True),
        int(first.first[query]),
        int(last.first[query]),
        *(
            [
                answered(int(row), bool(grade))
                for row, grade in zip(
                    ranking.order[query, :FIRST], ranking.grades[query, :FIRST], strict=True
                )
            ]
            for ranking in (first, last)
        ),
    )
