"""``mmsearch index``: bring an index up to date with folders of pictures."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import InputError, UsageError
from .opening import index_dir, milvus_token, open_index
from .options import (
    DeviceOption,
    IndexOption,
    MilvusOption,
    QuietOption,
    VerboseOption,
    WaitOption,
)
from .output import print_line, progress, say, warn

if TYPE_CHECKING:
    from ..core.types import Grid
    from ..indexing.encoder import Encoder, EncoderSpec
    from ..indexing.index import Events, ImageIndex, IndexReport, Plan
    from ..indexing.manifest import Manifest

EXAMPLES = """
Examples:

    mmsearch index ~/Pictures

    mmsearch index ~/Pictures --dry-run               # what would be done

    mmsearch index ~/Pictures --exclude raw/ --exclude '*.gif'

    mmsearch index ~/Pictures --model ViT-B-32 --pretrained laion2b_s34b_b79k

    mmsearch index ~/Pictures --patch-pool cluster:16 # fewer vectors a picture: smaller on disk

    mmsearch index shards/*.tar                       # pictures in WebDataset archives

    mmsearch index ~/Pictures --milvus http://milvus:19530 --index ~/team-index

    mmsearch index /nfs/pictures --ray auto --milvus http://milvus:19530 --index /srv/index

Run it again whenever pictures came, changed or went: only those are read. Hidden files, @eaDir and
what a .mmsearchignore file names (in gitignore's syntax) are left out. Interrupt it at any time;
the next run goes on where it was.

Exit codes: 0 done (pictures that cannot be read are counted, see `mmsearch status --failed`),
2 wrong command line, 4 no such file or no pictures, 5 index made with another model, 6 index in
use, 7 model cannot be loaded, 8 disk full or Milvus not reached, 130 interrupted.
"""
_NAMED_FAILURES = 10  # named on the screen, unless --verbose; all are remembered


def index(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Folders, pictures and .tar archives.", show_default=False
        ),
    ],
    index: IndexOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            show_default="the index's, or auto for a new one",
            help="auto, bundled, an open_clip name, hf-hub:ORG/NAME or local-dir:FOLDER.",
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            "--pretrained", metavar="TAG|FILE", help="Its weights. See `mmsearch models`."
        ),
    ] = None,
    patch_kind: Annotated[
        str | None,
        typer.Option(
            "--patch-kind",
            show_default="aligned",
            help="Patch features: aligned or penultimate (new index).",
        ),
    ] = None,
    patch_codes: Annotated[
        str | None,
        typer.Option(
            "--patch-codes",
            show_default="int8",
            help="How they are stored: int8, int4 or fp16 (new index).",
        ),
    ] = None,
    patch_pool: Annotated[
        str | None,
        typer.Option(
            "--patch-pool",
            metavar="1|2|cluster:N",
            show_default="1",
            help="How many are stored: 1 all, 2 the mean of each 2 x 2, cluster:N the means of N "
            "clusters of a picture's own (new index).",
        ),
    ] = None,
    tiles: Annotated[
        str | None,
        typer.Option(
            "--tiles",
            metavar="1x1|2x2|3x3",
            show_default="1x1",
            help="Finer patches from a larger view, encoded tile by tile (new index): 2x2 makes "
            "4 times the patches (and bytes) in 5 passes of the model, 3x3 makes 9 times in 10. "
            "2x2 with --patch-pool 2 keeps what they add to reranking, in no more bytes.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Take only these (gitignore syntax)."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Leave these alone (gitignore syntax)."),
    ] = None,
    keep_missing: Annotated[
        bool, typer.Option("--keep-missing", help="Keep pictures whose files are gone.")
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Start over: clear the index away first. What no option says stays as it was.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Say what would be done and do nothing.")
    ] = False,
    device: DeviceOption = "auto",
    precision: Annotated[
        str,
        typer.Option("--precision", help="auto (what the hardware does fast), fp32, bf16 or fp16."),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, show_default="suits the device", help="Pictures a step."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            show_default="one a core",
            help="Threads that decode; models with --ray.",
        ),
    ] = None,
    milvus: MilvusOption = None,
    index_type: Annotated[
        str | None,
        typer.Option(
            "--index-type",
            show_default="HNSW",
            help="Milvus index (new index): HNSW, FLAT, IVF_SQ8, ...",
        ),
    ] = None,
    index_params: Annotated[
        str | None,
        typer.Option(
            "--index-params",
            metavar="JSON",
            show_default="good ones",
            help="""How Milvus is to build it (new index), as '{"M": 32}'.""",
        ),
    ] = None,
    partition_by: Annotated[
        str | None,
        typer.Option(
            "--partition-by",
            show_default="none",
            help="folder: keep vectors by folder, for --in on a server; or none (new index).",
        ),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            "--shards",
            metavar="URL",
            show_default="in the index folder",
            help="Where patch features lie: s3://bucket/x, any fsspec URL, a folder (new index).",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            show_default="no",
            help="Embed on a Ray cluster: auto, ray://HOST:10001, or local (needs mmsearch[ray]).",
        ),
    ] = None,
    wait: WaitOption = 0.0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make pictures searchable, or bring the index up to date with them."""
    from ..indexing.index import ImageIndex, place_of_shards, read_plan
    from ..indexing.manifest import Manifest
    from ..indexing.pooling import check_pool
    from ..indexing.shards import PATCH_CODES

    if patch_codes not in (None, *PATCH_CODES):
        raise UsageError(
            f"unknown --patch-codes {patch_codes!r}", f"Use one of {', '.join(PATCH_CODES)}."
        )
    if patch_pool is not None:
        check_pool(patch_pool)
    asked: dict[str, Any] = {  # what an index is made with, as create and its manifest name it
        "patch_codes": patch_codes,
        "patch_pool": patch_pool,
        "index_type": index_type,
        "index_params": read_index_params(index_params),
        "partition_by": None if partition_by is None else read_partition_by(partition_by),
        "shards": None if shards is None else place_of_shards(shards),
    }
    encoding: dict[str, Any] = {
        "patch_kind": patch_kind,
        "tiles": None if tiles is None else read_tiles(tiles),
    }
    folder = index_dir(index)
    rules = {"include": include or (), "exclude": exclude or ()}
    exists = (folder / "manifest.json").exists()
    if dry_run:
        plan = read_plan(folder, paths, **rules, rebuild=rebuild)
        print_line(_describe_plan(plan, exists and not rebuild, keep_missing))
        return
    if not exists or rebuild:
        _refuse_nothing(read_plan(folder, paths, **rules, rebuild=rebuild), paths)
        if exists and (old := _readable_manifest(folder)) is not None:
            if model is None:
                model, pretrained = old.encoder.model, old.encoder.pretrained
            if index_type not in (None, old.index_type):  # other parameters than its own
                old = replace(old, index_params=None)
            milvus = milvus or old.milvus_uri
            asked, encoding = _unless_asked(asked, old), _unless_asked(encoding, old.encoder)
        encoder, why = _new_encoder(model, pretrained, device, precision, _given(encoding))
        say(why, quiet=quiet)
        opened = ImageIndex.create(
            folder,
            encoder.spec,
            milvus_uri=milvus,
            milvus_token=milvus_token(),
            rebuild=rebuild,
            wait=wait,
            **_given(asked),
        )
        held = [encoder]  # handed over once, so that its memory is free when Milvus builds
        del encoder
        load = held.pop
    else:
        made = Manifest.read(folder)
        _refuse_other(asked, made)
        _refuse_other(encoding, made.encoder)
        opened = open_index(index, milvus, wait)
        load = _loader(opened, model, pretrained, device, precision)
    with opened, _stopping(quiet) as stop, _showing(quiet, verbose) as events:
        report = opened.add(
            paths,
            load,
            **rules,
            keep_missing=keep_missing,
            batch_size=batch_size,
            workers=workers,
            cluster=None if ray is None else _cluster(ray, workers, device, precision),
            stop=stop,
            on_event=events,
        )
    for path, reason in report.problems:
        warn(f"{path}: {reason}")
    if not quiet:
        print_line(describe(report))
    if report.interrupted:
        say(f"interrupted with {report.left:,} files to go; the same command goes on from here")
        raise typer.Exit(130)


def _cluster(address: str, workers: int | None, device: str, precision: str):
    from ..indexing.ray_embed import RayCluster

    return RayCluster(address, workers, device, precision)


def read_tiles(name: str) -> Grid:
    """Check --tiles."""
    from ..indexing.encoder import TILES

    if name not in TILES:
        raise UsageError(f"unknown --tiles {name!r}", f"Use one of {', '.join(TILES)}.")
    return TILES[name]


def read_partition_by(name: str) -> str:
    """Check --partition-by."""
    if name not in ("folder", "none"):
        raise UsageError(f"unknown --partition-by {name!r}", "Use folder or none.")
    return name


def read_index_params(text: str | None) -> dict[str, Any] | None:
    """Read --index-params."""
    import json

    if text is None:
        return None
    try:
        params = json.loads(text)
    except ValueError:
        params = None
    if not isinstance(params, dict):
        raise UsageError(
            f"--index-params {text!r} is no JSON object", """For instance '{"nlist": 4096}'."""
        )
    return params


def describe(report: IndexReport) -> str:
    """Put a run into one line."""
    seconds = report.seconds
    rate = (report.added + report.moved) / seconds if seconds > 0 else 0
    parts = [
        f"{report.added:,} added",
        f"{report.moved:,} moved" if report.moved else "",
        f"{report.unchanged:,} unchanged",
        f"{report.removed:,} removed",
        f"{report.failed:,} failed" + (" (mmsearch status --failed)" if report.failed else ""),
    ]
    line = ", ".join(part for part in parts if part) + f" in {_duration(seconds)}"
    return line + (f" ({rate:,.0f} pictures/s)" if report.added > 1 else "")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _describe_plan(plan: Plan, exists: bool, keep_missing: bool) -> str:
    if not exists:
        return f"would add {plan.added:,} pictures to a new index"
    gone = 0 if keep_missing else len(plan.missing)
    return (
        f"would read {plan.added:,} new, {plan.changed:,} changed and {plan.retried:,} failed "
        f"files, leave {plan.unchanged:,} as they are and remove {gone:,}"
    )


def _refuse_nothing(plan: Plan, paths: list[Path]) -> None:
    if not plan.to_do:
        for path, reason in plan.problems:
            warn(f"{path}: {reason}")
        raise InputError(
            f"no pictures in {', '.join(map(str, paths))}",
            "Name a folder with pictures; hidden files and those in .mmsearchignore do not count.",
        )


def _refuse_other(asked: dict[str, Any], made: Manifest | EncoderSpec) -> None:
    """Refuse to go on in another way than the index was made with."""
    from ..core.errors import BadIndex

    for name, value in asked.items():
        kept, option = getattr(made, name), "--" + name.replace("_", "-")
        if value not in (None, kept):
            how = f"without {option}" if kept is None else f"with {option} {kept}, not {value}"
            raise BadIndex(
                f"the index was made {how}",
                f"Leave {option} out, use another --index, or start over with --rebuild.",
            )


def _readable_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of an index to be rebuilt, None if it is damaged."""
    from ..core.errors import BadIndex
    from ..indexing.manifest import Manifest

    try:
        return Manifest.read(folder)
    except BadIndex:
        return None  # rebuilding is what helps against that


def _unless_asked(asked: dict[str, Any], made: Manifest | EncoderSpec) -> dict[str, Any]:
    """Take what is not asked for from what an index was made with."""
    return {name: getattr(made, name) if value is None else value for name, value in asked.items()}


def _given(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if value is not None}


def _new_encoder(
    model: str | None,
    pretrained: str | None,
    device: str,
    precision: str,
    encoding: dict[str, Any],
) -> tuple[Encoder, str]:
    """Load the model for a new index."""
    from ..indexing.encoder import load_encoder
    from ..indexing.models import resolve_auto

    why = f"model {model}" + (f" ({pretrained})" if pretrained else "")
    if model in (None, "auto"):
        model, pretrained, why = resolve_auto()
        why += "; choose another with --model, see `mmsearch models`"
    encoder = load_encoder(model, pretrained, device=device, precision=precision, **encoding)
    return encoder.drop_text(), why


def _loader(
    opened: ImageIndex, model: str | None, pretrained: str | None, device: str, precision: str
):
    """Return what loads the index's model once there is something to embed."""

    def load() -> Encoder:
        from ..indexing.encoder import encoder_for, load_encoder

        spec = opened.manifest.encoder
        if model is None:
            encoder = encoder_for(spec, device, precision)
        else:
            encoder = load_encoder(
                model,
                pretrained,
                device=device,
                precision=precision,
                patch_kind=spec.patch_kind,
                tiles=spec.tiles,
            )
        return encoder.drop_text()

    return load


@contextmanager
def _stopping(quiet: bool) -> Iterator[threading.Event]:
    """Let the first Ctrl-C end the run after the batches in flight; the second ends it at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set()
        say("stopping after the batches in flight; once more to stop at once", quiet=quiet)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _showing(quiet: bool, verbose: bool) -> Iterator[Events]:
    """Show progress, stages and failures as they come."""
    from ..indexing.index import Events

    with progress(quiet=quiet) as bar:
        task = bar.add_task("looking for pictures", total=None)
        failures = 0

        def planned(plan: Plan) -> None:
            bar.update(task, description="indexing", total=plan.to_do or None)

        def failed(path: str, reason: str) -> None:
            nonlocal failures
            failures += 1
            if verbose or failures <= _NAMED_FAILURES:
                warn(f"{path}: {reason}")
            elif failures == _NAMED_FAILURES + 1:
                say("more pictures fail; all are listed by mmsearch status --failed", quiet=quiet)

        def stage(text: str) -> None:
            bar.update(task, description=text)
            if verbose:
                say(text)

        yield Events(
            planned=planned,
            advanced=lambda files: bar.advance(task, files),
            failed=failed,
            stage=stage,
        )
