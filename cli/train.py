"""``mmsearch train``: train a scorer on your own captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import UsageError
from .opening import open_index
from .options import DeviceOption, IndexOption, MilvusOption, QuietOption, WaitOption
from .output import progress, say, stdout, warn

if TYPE_CHECKING:
    from ..rerank.train import EpochDone, Event

KINDS = ("cross", "co", "shared")
RESERVED = (".", "..", "coarse", "late", "itm")  # no folder's own name, or another scorer's
EXAMPLES = """
Examples:

    mmsearch train captions.csv                       # its pictures must be in the index

    mmsearch train captions.json --images photos/ --scorer cross --epochs 20

    mmsearch train captions.csv --resume              # go on where a run was broken off

    mmsearch query "red car" --scorer cross

The head is installed into the index if it beats the coarse order on held-out pictures.
"""


def train(
    captions: Annotated[
        Path, typer.Argument(metavar="CAPTIONS", help="Captions in any format that eval reads.")
    ],
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Where the captioned pictures lie."),
    ] = None,
    scorer: Annotated[
        str, typer.Option("--scorer", metavar="KIND", help="cross, co or shared.")
    ] = "cross",
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What to call it; the kind by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            show_default="training/NAME in the index",
            help="The result folder: weights, card, metrics, plot, checkpoint.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="At most this many.")] = 12,
    group: Annotated[
        int, typer.Option("--group", min=2, help="Pictures judged together, near each other.")
    ] = 16,
    pool: Annotated[
        tuple[int, int],
        typer.Option(
            "--pool",
            metavar="FIRST LAST",
            help="Nearest pictures that a group is drawn from, in the first and last epoch: the "
            "fewer, the harder the negatives.",
        ),
    ] = (96, 32),
    width: Annotated[int, typer.Option("--width", min=8, help="Width of the head.")] = 256,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Attention heads.")] = 4,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Blocks.")] = 2,
    self_attention: Annotated[
        bool,
        typer.Option(
            "--self-attention/--no-self-attention",
            help="Let the words of a cross head look at each other in each block.",
        ),
    ] = True,
    align: Annotated[
        bool,
        typer.Option(
            "--align/--no-align",
            help="Start a cross head from the encoder's contrastive space, where the patches lie "
            "in it.",
        ),
    ] = True,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0)] = 5e-4,
    match_weight: Annotated[
        float,
        typer.Option("--match-weight", min=0, help="Weight of the match loss; 0 leaves it out."),
    ] = 0.5,
    text_negatives: Annotated[
        bool,
        typer.Option(
            "--text-negatives/--no-text-negatives",
            help="Captions made wrong by rule.",
        ),
    ] = True,
    coarse_in_loss: Annotated[
        bool | None,
        typer.Option(
            "--coarse-in-loss/--no-coarse-in-loss",
            show_default="unless the encoder has seen the pictures",
            help="Add the cosine to the term that is trained.",
        ),
    ] = None,
    val_share: Annotated[
        float,
        typer.Option(
            "--val-share",
            min=0.01,
            max=0.5,
            help="Share of the pictures to validate on, if the captions name no split.",
        ),
    ] = 0.1,
    candidates: Annotated[
        int, typer.Option("--candidates", min=2, help="Candidates reranked in validation.")
    ] = 50,
    patience: Annotated[
        int, typer.Option("--patience", min=1, help="Epochs without gain before stopping.")
    ] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same head.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the result folder's checkpoint.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Install even if it does not beat the coarse order.")
    ] = False,
    index: IndexOption = None,
    milvus: MilvusOption = None,
    device: DeviceOption = "auto",
    wait: WaitOption = 0.0,
    quiet: QuietOption = False,
) -> None:
    """Train a scorer on captions of pictures in the index."""
    if scorer not in KINDS:
        raise UsageError(f"cannot train a scorer of kind {scorer!r}", f"Use {', '.join(KINDS)}.")
    if width % heads:
        raise UsageError(f"--width {width} is not a multiple of --heads {heads}")
    called = name or scorer
    _check_name(called)
    from ..core.device import choose_device
    from ..evaluation.datasets import read_captions
    from ..indexing.encoder import load_text_encoder
    from ..rerank.dataset import Captioned, build_training_set
    from ..rerank.outcome import install, plot_history, write_card
    from ..rerank.train import TrainOptions, train_head

    read = read_captions(captions, images)
    if read.problems:
        warn(f"{len(read.problems)} rows left out; the first, {read.problems[0]}")
    options = TrainOptions(
        kind=scorer,
        width=width,
        heads=heads,
        depth=depth,
        self_attention=self_attention,
        align=align,
        epochs=epochs,
        group=group,
        pool=pool[0],
        pool_end=pool[1],
        learning_rate=learning_rate,
        match_weight=match_weight,
        text_negatives=text_negatives,
        coarse_in_loss=coarse_in_loss,
        patience=patience,
        candidates=candidates,
        seed=seed,
    )
    where = choose_device(device)
    with open_index(index, milvus, wait) as opened:
        spec = opened.manifest.encoder
        with progress(quiet=quiet) as bar:
            task = bar.add_task("encoding captions", total=None)
            data = build_training_set(
                opened,
                [Captioned(read.images[c.image], c.text, c.split) for c in read.captions],
                load_text_encoder(spec, device),
                val_share=val_share,
                text_negatives=text_negatives,
                seed=seed,
                on_texts=lambda done, total: bar.update(task, completed=done, total=total),
            )
        heads_folder = opened.path / "heads"
        folder = out or opened.path / "training" / called
    say(
        f"training on {len(data.train):,} pictures, validating on {len(data.val):,}, on {where}",
        quiet=quiet,
    )
    with progress(quiet=quiet) as bar:
        outcome = train_head(
            data,
            spec,
            options,
            folder,
            name=called,
            device=where,
            resume=resume,
            on_event=_Show(bar, quiet),
        )
    write_card(folder, outcome, options, f"{captions.name} ({len(data.train):,} pictures)")
    plot_history(folder, outcome)
    figures = outcome.card.figures
    for k in (1, 5, 10):
        before, after = figures[f"r{k}_coarse"], figures[f"r{k}"]
        stdout.print(f"recall@{k:<3} {before:6.2f} -> {after:6.2f}  ({after - before:+.2f})")
    stdout.print(
        f"paired over {figures['pictures']:.0f} pictures, recall@1: p = {figures['p']:.4f}"
    )
    if outcome.beats_coarse or force:
        stdout.print(f"installed: {install(folder, heads_folder, called)}", soft_wrap=True)
    else:
        stdout.print("not installed: it does not beat the coarse order (--force installs it)")
    stdout.print(f"results in {folder}", soft_wrap=True)


def _check_name(name: str) -> None:
    """Refuse a name that is not one folder's, or that queries take for something else.

    Raises:
        UsageError: it is.
    """
    if name in RESERVED or any(each in name for each in "/\\:"):
        raise UsageError(
            f"{name!r} cannot be the name of a trained scorer",
            f"Use one without / \\ and : that is none of {', '.join(RESERVED)}.",
        )


class _Show:
    """Turns training events into a progress bar and one line an epoch."""

    def __init__(self, bar, quiet: bool) -> None:
        self.bar, self.quiet = bar, quiet
        self.task = bar.add_task("training", total=None)

    def __call__(self, event: Event) -> None:
        from ..rerank.train import StepDone

        if isinstance(event, StepDone):
            self.bar.update(
                self.task,
                description=f"epoch {event.epoch + 1}/{event.epochs}, loss {event.loss:.3f}",
                completed=event.epoch * event.steps + event.step,
                total=event.epochs * event.steps,
            )
        else:
            say(self.line(event), quiet=self.quiet)

    @staticmethod
    def line(event: EpochDone) -> str:
        """One epoch in one line."""
        mark = "  best so far" if event.best else ""
        return (
            f"epoch {event.epoch}/{event.epochs}  loss {event.loss:.3f}  recall@1 on val "
            f"{event.r1:.2f} (coarse {event.coarse_r1:.2f})  {event.seconds:.0f} s{mark}"
        )
