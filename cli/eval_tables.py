"""How ``mmsearch eval`` prints its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from ..evaluation.compositional import Accuracy
    from ..evaluation.evaluate import Direction
    from ..evaluation.results import Document


def direction_table(direction: Direction) -> Table:
    """One row a system, then the reranked rows' differences from the coarse one."""
    from ..evaluation.report import (
        TITLES,
        change,
        figure,
        hit_label,
        interval,
        measures,
        p_value,
    )  # fmt: skip

    label = hit_label(direction)
    # What else --json and the report have would not fit into 80 columns.
    left_out = () if direction.single else ("recall@", "mrr")
    shown = {key: name for key, name in measures(direction).items() if not key.startswith(left_out)}
    kind = "images" if direction.name == "t2i" else "captions"
    table = Table(
        title=f"{TITLES[direction.name]}: {len(direction.queries):,} queries over "
        f"{len(direction.documents):,} {kind}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    if len(direction.rows) > 1:
        table.caption = (
            f"{label}@{direction.candidates} of the candidates, the ceiling of any reranker: "
            f"{figure(direction.ceiling.value, 'hit')} ({interval(direction.ceiling, 'hit')})"
        )
        table.caption_justify = "left"
    table.add_column("%")
    for name in shown.values():
        table.add_column(name, justify="right")
    for row in direction.rows:
        table.add_row(
            row.scorer,
            *(
                f"{figure(row.estimates[name].value, name)}\n"
                f"[dim]{interval(row.estimates[name], name)}[/]"
                for name in shown
            ),
        )
    for row in direction.rows[1:]:
        table.add_section()
        cells = []
        for name in shown:
            if name not in row.differences:
                cells.append("")
                continue
            each = row.differences[name]
            colour = "green" if each.low > 0 else "red" if each.high < 0 else "default"
            small = f"{interval(each, name, '+')}\n{p_value(each.p)}".replace(" ", "")
            cells.append(f"[{colour}]{change(each)}[/]\n[dim]{small}[/]")
        table.add_row(f"{row.scorer}\n− coarse", *cells)
    return table


def latency_line(latency: dict[str, dict[str, float]], directions: Sequence[Direction]) -> str:
    """What one query costs alone, and how many a second all together."""
    stages = ", ".join(
        f"{stage} {each['p50']:.1f} ms (p95 {each['p95']:.1f})" for stage, each in latency.items()
    )
    rates = ", ".join(
        f"{each.name} {row.scorer} {len(each.queries) / row.seconds:,.0f}/s"
        for each in directions
        for row in each.rows
    )
    return f"[dim]One query alone:[/] {stages}\n[dim]All together:[/] {rates}"


def accuracy_table(task: str, rows: Sequence[Accuracy]) -> Table:
    """One line for each measure of a subset: each scorer's accuracy, and the differences."""
    from ..evaluation.report import change, figure, interval, p_value

    scorers = list(dict.fromkeys(row.scorer for row in rows))
    table = Table(
        title=f"{task}, accuracy", title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    table.add_column("subset")
    table.add_column("measure")
    table.add_column("trials", justify="right")
    for name in scorers:
        table.add_column(f"{name} %", justify="right")
    for name in scorers[1:]:
        table.add_column(f"{name} − coarse", justify="right")
    lines: dict[tuple[str, str], list[Accuracy]] = {}
    for row in rows:
        if not row.kind:
            lines.setdefault((row.subset, row.measure), []).append(row)
    for (subset, measure), line in lines.items():
        if subset == "all":
            table.add_section()
        cells = [
            f"{figure(row.estimate.value, measure)} [dim]({interval(row.estimate, measure)})[/]"
            for row in line
        ]
        cells += [
            f"{change(row.difference)} [dim]{p_value(row.difference.p)}[/]"
            for row in line
            if row.difference
        ]
        table.add_row(subset, measure, f"{line[0].trials:,}", *cells)
    return table


COMPARED = {"hit@1": "hit@1", "hit@10": "hit@10", "mrr": "MRR", "median_rank": "MedR"}


def comparison_table(name: str, files: Sequence[Path], documents: Sequence[Document]) -> Table:
    """The runs of one direction side by side, hit@1 of each tested against the first run."""
    from ..evaluation.report import figure
    from ..evaluation.results import changes

    table = Table(
        title=f"{name}: hit@1 tested against {files[0].name}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    table.add_column("run", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for label in COMPARED.values():
        table.add_column(label, justify="right")
    table.add_column("change", justify="right")
    table.add_column("p", justify="right")
    table.add_column("queries", justify="right")
    for file, document in zip(files, documents, strict=True):
        if name not in document["directions"]:
            continue
        tests = {
            each.scorer: each
            for each in changes(documents[0], document)
            if each.direction == name and document is not documents[0]
        }
        direction = document["directions"][name]
        for row in direction["rows"]:
            cells = [
                figure(row["metrics"][each]["value"], each) if each in row["metrics"] else "–"
                for each in COMPARED
            ]
            tested = ["–", "–", f"{direction['queries']:,}"]
            if test := tests.get(row["scorer"]):
                tested = [
                    f"{100 * test.difference.value:+.1f}",
                    f"{test.difference.p:.3f}",
                    f"{test.shared:,}",
                ]
            table.add_row(file.name, row["scorer"], *cells, *tested)
    return table
