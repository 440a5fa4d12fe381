"""``mmsearch eval``: figures for retrieval and reranking, a report, a gate.

``eval_app`` is a group whose default command evaluates, so that both
``mmsearch eval captions.csv`` and ``mmsearch eval compare a.json b.json`` work.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID
from typer.core import TyperGroup

from ..core.errors import GateFailed, StorageError, UsageError
from .eval_tables import accuracy_table, comparison_table, direction_table, latency_line
from .opening import index_dir, milvus_token
from .options import DeviceOption, IndexOption, MilvusOption, QuietOption, WaitOption
from .output import progress, say, stdout, warn

if TYPE_CHECKING:
    from ..evaluation.datasets import CaptionSet
    from ..evaluation.results import Document
    from ..indexing.encoder import EncoderSpec
    from ..indexing.index import ImageIndex
    from ..indexing.index import Plan as AddPlan
    from ..rerank.scorers import Scorer

LATENCY_QUERIES = 50  # asked one by one to time the stages
PROBLEMS_SHOWN = 5

EXAMPLES = """
Examples:

    mmsearch eval captions.csv --images photos --split val

    mmsearch eval dataset_flickr30k.json --images flickr30k-images --split test --direction both

    mmsearch eval captions.csv --scorer cross --scorer late --json new.json --report report.html

    mmsearch eval captions.csv --baseline old.json --max-drop 0.5      # exits 3 when it fell

    mmsearch eval --task sugarcrepe --data sugarcrepe/data --images coco/val2017

    mmsearch eval compare old.json new.json

Exit codes: 0 done, 3 the gate failed, 4 captions or images cannot be used, 5 no such index
or one of another model, 8 a report cannot be written.
"""


class _DefaultCommand(TyperGroup):
    """A group that runs ``run`` when the first argument names none of its commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == "run" else name), command, rest  # "Usage: mmsearch eval [OPTIONS]"


eval_app = typer.Typer(cls=_DefaultCommand, rich_markup_mode="markdown", help="Measure retrieval.")


class Wanted(str, Enum):
    """Which way to search."""

    t2i = "t2i"
    i2t = "i2t"
    both = "both"


class Searched(str, Enum):
    """What the captions' images are searched among."""

    captions = "captions"
    everything = "everything"


class TaskName(str, Enum):
    """Compositional sets that can be read."""

    sugarcrepe = "sugarcrepe"
    winoground = "winoground"
    aro = "aro"


@eval_app.command(epilog=EXAMPLES, hidden=True)
def run(
    ctx: typer.Context,
    captions: Annotated[
        Path | None,
        typer.Argument(
            metavar="CAPTIONS",
            help="CSV, TSV, JSONL, Flickr8k, Karpathy or COCO file, WebDataset tar or folder.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="DIR", show_default="beside CAPTIONS", help="The pictures."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="Only this split (or a,b).")
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option("--qrels", metavar="FILE", help="Graded relevance, TREC format.")
    ] = None,
    direction: Annotated[
        Wanted, typer.Option("--direction", help="Text to image, image to text, or both.")
    ] = Wanted.t2i,
    candidates: Annotated[
        int,
        typer.Option("--candidates", min=0, help="Handed to the rerankers; 0: coarse stage only."),
    ] = 100,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            metavar="NAME",
            show_default="cross where a trained head fits",
            help="A reranker (repeatable); the coarse stage is always the first row.",
        ),
    ] = None,
    k: Annotated[str, typer.Option("--k", metavar="K,K,…", help="Cut-offs.")] = "1,5,10",
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Draw so many queries; what is searched stays whole."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of draws and resampling.")] = 0,
    gallery: Annotated[
        Searched,
        typer.Option("--gallery", help="Search the captions' images, or everything in the index."),
    ] = Searched.captions,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on the first row that cannot be used.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write figures and settings.")
    ] = None,
    trec: Annotated[
        Path | None, typer.Option("--trec", metavar="DIR", help="Write TREC run and qrels files.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write an HTML report.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE", help="An older --json file to hold against."),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option(
            "--max-drop",
            min=0,
            help="Points of recall@1 that may be lost; exits 3 beyond, if p < 0.05.",
        ),
    ] = 0.0,
    task: Annotated[
        TaskName | None, typer.Option("--task", help="A compositional set instead of CAPTIONS.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="The --task's files.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="For images not in an index: as in `mmsearch index`.")
    ] = "auto",
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", metavar="TAG|FILE", help="Weights of --model.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option("--precision", help="For embedding: auto (what is fast), fp32, bf16 or fp16."),
    ] = "auto",
    index: IndexOption = None,
    milvus: MilvusOption = None,
    device: DeviceOption = "auto",
    wait: WaitOption = 0.0,
    quiet: QuietOption = False,
) -> None:
    """Measure retrieval on captions: coarse stage and rerankers on the same candidates.

    Every caption is a query, its image the answer. Images that no index holds yet are embedded
    first: into --index if it is given, else into a cache that the next run reuses.

    `mmsearch eval compare A.json B.json` sets runs side by side.
    """
    if pretrained is not None and model == "auto":
        raise UsageError(
            "--pretrained without --model", "Name the model too: --model NAME --pretrained TAG."
        )
    named = index if ctx.get_parameter_source("index").name == "COMMANDLINE" else None  # type: ignore[union-attr]
    if task is not None:
        if data is None:
            raise UsageError("--task needs --data", "Give the folder of the published files.")
        _run_task(
            task.value, data, images, scorer, limit, seed, json_file, model, pretrained, precision,
            named, device, quiet,
        )  # fmt: skip
        return
    if captions is None:
        raise UsageError("no captions given", "Run: mmsearch eval CAPTIONS --images DIR")

    from ..evaluation.datasets import read_captions
    from ..evaluation.evaluate import DIRECTIONS, Plan, evaluate
    from ..evaluation.gallery import open_gallery
    from ..evaluation.latency import measure_latency
    from ..evaluation.results import read_json, to_document, write_json, write_trec
    from ..indexing.encoder import load_text_encoder

    plan = Plan(
        directions=DIRECTIONS if direction is Wanted.both else (direction.value,),
        candidates=candidates,
        ks=_cutoffs(k),
        limit=limit,
        seed=seed,
    )
    old = read_json(baseline) if baseline else None
    _check_outputs(json_file, report, folder=trec)
    read = read_captions(captions, images, split, strict, qrels)
    opened = _open_index(
        read, named, index, milvus, model, pretrained, precision, wait, device, quiet
    )
    with opened, progress(quiet=quiet) as display:
        read, pictures = open_gallery(opened, read, gallery is Searched.everything, strict)
        _tell_problems(read)
        encoder = load_text_encoder(opened.manifest.encoder, device)
        heads = opened.path / "heads"
        scorers = (
            _load_scorers(scorer, opened.manifest.encoder, device, heads) if candidates else []
        )
        results = evaluate(read, pictures, encoder, scorers, plan, _tracker(display))
        asked = [each.text for each in read.captions[:: max(1, len(read.captions) // 50)]]
        latency = measure_latency(opened, encoder, scorers, asked[:LATENCY_QUERIES], candidates)
        document = to_document(
            read, results, plan, _describe(opened), split, latency, ["mmsearch", *sys.argv[1:]]
        )
        with _writing():
            if json_file:
                write_json(json_file, document)
            if trec:
                write_trec(trec, results)
            if report:
                from ..evaluation.report import write_report

                write_report(report, document, read, pictures, results)
    for each in results:
        stdout.print(direction_table(each))
    stdout.print(latency_line(latency, results), soft_wrap=True)
    for written in filter(None, (json_file, trec, report)):
        say(f"wrote {written}", quiet=quiet)
    if old is not None:
        _gate(old, document, max_drop, seed, quiet)


@eval_app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="A.json B.json …", help="From --json.")],
) -> None:
    """Print evaluations side by side, each tested against the first."""
    from ..evaluation.results import read_json

    documents = [read_json(file) for file in files]
    for name in dict.fromkeys(name for each in documents for name in each["directions"]):
        stdout.print(comparison_table(name, files, documents))


def _cutoffs(text: str) -> tuple[int, ...]:
    try:
        ks = tuple(sorted({int(each) for each in text.split(",")}))
    except ValueError:
        ks = ()
    if not ks or ks[0] < 1:
        raise UsageError(f"--k {text!r} is no list of cut-offs", "Write --k 1,5,10.")
    return ks


def _check_outputs(*files: Path | None, folder: Path | None = None) -> None:
    """Make the folders of what will be written now, and see that it can be, not in an hour.

    Raises:
        UsageError: a folder is named where a file should be.
        StorageError: something cannot be written.
    """
    with _writing():
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        for file in filter(None, files):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise UsageError(f"{file} is a folder", "Name a file, perhaps one in it.")
            if not os.access(file if file.exists() else file.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or 'the results'}: {error.strerror or error}",
            "Name a place that can be written to, or make room.",
        ) from error


def _open_index(
    captions: CaptionSet,
    named: Path | None,
    default: Path | None,
    milvus: str | None,
    model: str,
    pretrained: str | None,
    precision: str,
    wait: float,
    device: str,
    quiet: bool,
) -> ImageIndex:
    """Open the index that holds the captions' images, embedding those that it lacks.

    An index named with --index is used and added to. Without one, the user's own index serves if
    it has all the images already; else they go into the cache, never into the user's own.

    Raises:
        BadIndex: the index named was made with another model than --model.
    """
    from ..evaluation.gallery import cache_index_dir, missing_images
    from ..indexing.encoder import encoder_for, load_encoder, refuse_other_model
    from ..indexing.index import Events, ImageIndex
    from ..indexing.manifest import Manifest

    def open_at(folder: Path) -> ImageIndex:
        return ImageIndex.open(folder, milvus_uri=milvus, milvus_token=milvus_token(), wait=wait)

    own = index_dir(default)
    if (
        named is None
        and (model, precision) == ("auto", "auto")
        and (own / "manifest.json").exists()
    ):
        opened = open_at(own)
        if not missing_images(opened, captions.images):
            say(f"using the index in {own}, which has all the images", quiet=quiet)
            return opened
        opened.close()
    folder = (
        named.expanduser() if named else cache_index_dir(captions, model, pretrained, precision)
    )
    loaded = []
    if (folder / "manifest.json").exists():
        if named and model != "auto":
            refuse_other_model(Manifest.read(folder).encoder, model, pretrained)
        opened = open_at(folder)
    else:
        loaded.append(load_encoder(model, pretrained, device=device, precision=precision))
        opened = ImageIndex.create(
            folder, loaded[0].spec, milvus_uri=milvus, milvus_token=milvus_token(), wait=wait
        )
    missing = missing_images(opened, captions.images)
    with progress(quiet=quiet) as display:
        bar = display.add_task("embed images", total=None)

        def planned(plan: AddPlan) -> None:
            display.update(bar, total=plan.to_do)
            if plan.to_do:
                say(f"embedding {plan.to_do:,} images into {folder}", quiet=quiet)

        if missing:
            opened.add(
                missing,
                lambda: (
                    loaded[0] if loaded else encoder_for(opened.manifest.encoder, device, precision)
                ),
                on_event=Events(
                    planned=planned, advanced=lambda files: display.advance(bar, files)
                ),
            )
        else:
            say(f"using the index in {folder}", quiet=quiet)
    return opened


def _load_scorers(
    names: Sequence[str] | None, encoder: EncoderSpec, device: str, heads: Path | None
) -> list[Scorer]:
    """Load the rerankers asked for, or the head that fits; the coarse stage is none of them."""
    from ..rerank.scorers import default_scorer_name, load_scorer

    wanted = names or [default_scorer_name(encoder, heads)]
    return [
        load_scorer(name, encoder, device=device, folder=heads)
        for name in dict.fromkeys(wanted)
        if name != "coarse"
    ]


def _tracker(display: Progress) -> Callable[[str, int, int], None]:
    """Return a function that shows stages as bars: (stage, steps done just now, steps in all)."""
    bars: dict[str, TaskID] = {}

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = display.add_task(stage, total=total)
        display.advance(bars[stage], done)

    return advance


def _tell_problems(captions: CaptionSet) -> None:
    """Name the first rows left out, and count them all by kind."""
    for problem in captions.problems[:PROBLEMS_SHOWN]:
        warn(f"{captions.source.name}, {problem}")
    if captions.problems:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in captions.skipped().items())
        warn(f"{len(captions.problems):,} rows left out: {counts}")


def _describe(index: ImageIndex) -> Document:
    """What a reader must know of the index to get the same figures."""
    return {
        "path": str(index.path),
        "images": len(index),
        "encoder": index.manifest.encoder.to_dict(),
        "patch_codes": index.manifest.patch_codes,
        "patch_pool": index.manifest.patch_pool,
    }


def _gate(old: Document, new: Document, max_drop: float, seed: int, quiet: bool) -> None:
    """Fail if recall@1 of any system both runs have fell by more than it may.

    Raises:
        UsageError: the runs share no system or no query.
        GateFailed: it fell.
    """
    from ..evaluation.report import p_value
    from ..evaluation.results import changes, failures

    found = changes(old, new, seed=seed)
    if not found:
        raise UsageError(
            "the baseline shares no system or no query with this run",
            "Give a baseline of the same captions, direction and scorer.",
        )
    lines = [
        f"{each.direction} {each.scorer}: recall@1 {100 * each.difference.value:+.1f} points "
        f"({p_value(each.difference.p)}, {each.shared:,} queries)"
        for each in (failures(found, max_drop) or found)
    ]
    if failures(found, max_drop):
        raise GateFailed(
            f"worse than the baseline by more than {max_drop:g} points: {'; '.join(lines)}",
            "See which queries fell with --report, or accept it with a new baseline.",
        )
    say(f"gate passed: {'; '.join(lines)}", quiet=quiet)


def _run_task(
    name: str,
    data: Path,
    images: Path | None,
    scorers: list[str] | None,
    limit: int | None,
    seed: int,
    json_file: Path | None,
    model: str,
    pretrained: str | None,
    precision: str,
    index: Path | None,
    device: str,
    quiet: bool,
) -> None:
    """Evaluate a compositional set with a model, or with that of the index named.

    Raises:
        BadIndex: the index named was made with another model than --model.
    """
    from ..evaluation.compositional import read_task, run_task
    from ..evaluation.results import task_document, write_json
    from ..indexing.encoder import encoder_for, load_encoder, refuse_other_model
    from ..indexing.manifest import Manifest

    _check_outputs(json_file)
    task = read_task(name, data, images, limit, seed)
    if task.missing:
        warn(f"{len(task.missing):,} images are not there; the first, {task.missing[0]}")
    if index:
        spec = Manifest.read(index).encoder
        if model != "auto":
            refuse_other_model(spec, model, pretrained)
        encoder = encoder_for(spec, device, precision)
    else:
        encoder = load_encoder(model, pretrained, device=device, precision=precision)
    loaded = _load_scorers(scorers, encoder.spec, device, index / "heads" if index else None)
    with progress(quiet=quiet) as display:
        rows = run_task(task, encoder, loaded, seed, _tracker(display))
    stdout.print(accuracy_table(name, rows))
    if json_file:
        document = task_document(
            task, [asdict(row) for row in rows], encoder.spec.to_dict(), seed,
            ["mmsearch", *sys.argv[1:]],
        )  # fmt: skip
        with _writing():
            write_json(json_file, document)
        say(f"wrote {json_file}", quiet=quiet)
