"""Evaluations as JSON: everything to reproduce one, to set it beside others, to gate on it."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from .compositional import Task
from .datasets import CaptionSet
from .evaluate import Direction, Plan
from .statistics import Clusters, Difference
from .trec import write_qrels, write_run

SCHEMA = 1
PACKAGES = ("mmsearch", "torch", "numpy", "open_clip_torch", "timm", "pillow", "pymilvus")
LEVEL = 0.05  # p below which a drop counts

Document = dict[str, Any]


def to_document(
    captions: CaptionSet,
    directions: Sequence[Direction],
    plan: Plan,
    index: Document,
    split: str | None,
    latency: Document,
    command: Sequence[str],
) -> Document:
    """Put an evaluation into plain values for JSON.

    Args:
        captions: what was asked.
        directions: what came out.
        plan: how it was asked.
        index: where the images lay: "path", "images", "encoder", "patch_codes" and so on.
        split: of the captions.
        latency: from `measure_latency`.
        command: the command line.
    """
    source = captions.source
    return {
        "schema": SCHEMA,
        "kind": "retrieval",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": _versions(),
        "index": index,
        "captions": {
            "source": str(source),
            "sha256": sha256(source.read_bytes()).hexdigest() if source.is_file() else None,
            "format": captions.format,
            "split": split,
            "images": len(captions.images),
            "captions": len(captions.captions),
            "skipped": captions.skipped(),
            "problems": [str(problem) for problem in captions.problems[:100]],
        },
        "plan": asdict(plan) | {"depth": plan.depth},
        "latency_ms": latency,
        "directions": {each.name: _direction(each) for each in directions},
    }


def task_document(
    task: Task, rows: list[Document], encoder: Document, seed: int, command: Sequence[str]
) -> Document:
    """Put a compositional evaluation into plain values for JSON."""
    return {
        "schema": SCHEMA,
        "kind": "compositional",
        "task": task.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": _versions(),
        "encoder": encoder,
        "seed": seed,
        "trials": len(task.trials),
        "missing_images": len(task.missing),
        "rows": rows,
    }


def write_trec(folder: Path, directions: Sequence[Direction]) -> None:
    """Write ``DIRECTION.qrels`` and ``DIRECTION.SCORER.run`` for trec_eval and its kin."""
    folder.mkdir(parents=True, exist_ok=True)
    for direction in directions:
        relevance = direction.relevance
        with (folder / f"{direction.name}.qrels").open("w", encoding="utf-8") as file:
            write_qrels(
                file,
                (
                    (direction.queries[query], direction.documents[document], int(grade))
                    for query, document, grade in zip(
                        relevance.queries, relevance.documents, relevance.grades, strict=True
                    )
                ),
            )
        for row in direction.rows:
            tag = re.sub(r"[^\w.-]+", "-", row.scorer)
            with (folder / f"{direction.name}.{tag}.run").open("w", encoding="utf-8") as file:
                write_run(
                    file,
                    direction.queries,
                    direction.documents,
                    row.ranking.order,
                    row.ranking.scores,
                    tag,
                )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _direction(direction: Direction) -> Document:
    _, clusters = np.unique(direction.clusters, return_inverse=True)
    return {
        "queries": len(direction.queries),
        "documents": len(direction.documents),
        "relevant_per_query": float(direction.relevance.counts().mean()),
        "depth": direction.depth,
        "candidates": direction.candidates,
        "ceiling": asdict(direction.ceiling),
        "rows": [
            {
                "scorer": row.scorer,
                "metrics": {name: asdict(each) for name, each in row.estimates.items()},
                "difference": {name: asdict(each) for name, each in row.differences.items()},
                "seconds": row.seconds,
                "queries_per_second": len(direction.queries) / max(row.seconds, 1e-9),
                "first_relevant": row.ranking.first.tolist(),
            }
            for row in direction.rows
        ],
        "query_ids": direction.queries,
        "clusters": clusters.tolist(),
    }


def write_json(path: Path, document: Document) -> None:
    """Write a document; the parts that run long stay on one line each."""
    path.write_text(_pretty(document) + "\n", encoding="utf-8")


def _pretty(value: Any, indent: str = "") -> str:
    """Indent objects and lists of objects, but keep lists of numbers and names flat."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        inner = [
            f"{deeper}{json.dumps(key)}: {_pretty(each, deeper)}" for key, each in value.items()
        ]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        inner = [f"{deeper}{_pretty(each, deeper)}" for each in value]
        return "[\n" + ",\n".join(inner) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def read_json(path: Path) -> Document:
    """Read what `write_json` wrote.

    Raises:
        InputError: it is not there, not ours, or of a newer schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as an evaluation: {error}",
            "give a file that `mmsearch eval --json` wrote",
        ) from None
    if not isinstance(document, dict) or document.get("kind") != "retrieval":
        raise InputError(
            f"{path} is not a retrieval evaluation",
            "give a file that `mmsearch eval --json` wrote",
        )
    if document["schema"] > SCHEMA:
        raise InputError(
            f"{path} was written by a newer mmsearch (schema {document['schema']})",
            "upgrade mmsearch: pip install -U mmsearch",
        )
    return document


@dataclass(frozen=True, slots=True)
class Change:
    """How hit@1 of one system differs between two runs, on the queries they share."""

    direction: str
    scorer: str
    shared: int
    difference: Difference  # after - before, in [-1, 1]


def changes(before: Document, after: Document, k: int = 1, seed: int = 0) -> list[Change]:
    """Compare the systems that two evaluations have in common, query by query."""
    found = []
    for name in before["directions"].keys() & after["directions"].keys():
        old, new = before["directions"][name], after["directions"][name]
        place = {query: at for at, query in enumerate(old["query_ids"])}
        shared = [at for at, query in enumerate(new["query_ids"]) if query in place]
        if not shared:
            continue
        olds = [place[new["query_ids"][at]] for at in shared]
        clusters = Clusters(np.array(new["clusters"])[shared], seed)
        ranks = {row["scorer"]: np.array(row["first_relevant"]) for row in old["rows"]}
        for row in new["rows"]:
            if row["scorer"] in ranks:
                difference = clusters.differences(
                    {"hit": (ranks[row["scorer"]][olds] <= k).astype(float)},
                    {"hit": (np.array(row["first_relevant"])[shared] <= k).astype(float)},
                )["hit"]
                found.append(Change(name, row["scorer"], len(shared), difference))
    return found


def failures(found: Sequence[Change], max_drop: float) -> list[Change]:
    """Return the changes that fail a gate: down by more than `max_drop` points, p < 0.05."""
    return [
        each
        for each in found
        if -100 * each.difference.value > max_drop and each.difference.p < LEVEL
    ]
