"""What training leaves behind for people: a card, a plot, and the head where queries find it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import CONFIG, WEIGHTS
from .querybank import FILE as BANK

if TYPE_CHECKING:
    from .train import Outcome, TrainOptions


def write_card(folder: Path, outcome: Outcome, options: TrainOptions, captions: str) -> None:
    """Write README.md: what the head is, what it was trained on, and its figures."""
    card, figures, config = outcome.card, outcome.card.figures, outcome.head.config
    verdict = "beats the coarse order" if outcome.beats_coarse else "does not beat the coarse order"
    rows = "\n".join(
        f"| {k} | {figures[f'r{k}_coarse']:.2f} | {figures[f'r{k}_bank']:.2f} | "
        f"{figures[f'r{k}']:.2f} | "
        f"{figures[f'r{k}'] - figures[f'r{k}_coarse']:+.2f} |"
        for k in (1, 5, 10)
    )
    settings = "\n".join(f"- {name}: {value}" for name, value in vars(options).items())
    (folder / "README.md").write_text(
        f"""# {card.name}: a {config.kind} head for mmsearch

Trained on {captions}. Fits the encoder whose weights have sha256 `{card.encoder_weights_hash}`
({card.patch_kind} patches, {config.grid.height} x {config.grid.width}) and no other.

Text to image over {figures["pictures"]:.0f} validation pictures, {figures["queries"]:.0f} captions,
{options.candidates} candidates a caption:

| recall at | coarse, % | coarse less popularity, % | reranked, % | change |
|---|---|---|---|---|
{rows}

Paired over pictures, recall at 1: p = {figures["p"]:.4f}. The head {verdict}.
The fusion weight of each half of the pictures was fitted on the other half. The epoch was chosen
on these pictures, so the figures are slightly optimistic: measure on pictures not used here, with
`mmsearch eval`.

Score: `{card.fusion.scale:.2f} * (cosine - {card.fusion.popularity_weight:.2f} * popularity)
+ {card.fusion.weight:.2f} * rank`.
Probability: `sigmoid({card.calibration.slope:.3f} * score {card.calibration.bias:+.3f})`, fitted on
all validation candidates, matches and others at even odds.

## Options

{settings}
""",
        encoding="utf-8",
    )


def plot_history(folder: Path, outcome: Outcome) -> None:
    """Draw curve.png: loss and recall at 1 by epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = outcome.history
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in history], marker="o")
    left.set(xlabel="epoch", ylabel="training loss")
    right.plot(epochs, [row["r1"] for row in history], marker="o", label="reranked")
    right.plot(epochs, [row["r1_coarse"] for row in history], linestyle="--", label="coarse")
    right.set(xlabel="epoch", ylabel="recall@1 on val, %")
    right.legend()
    figure.savefig(folder / "curve.png", dpi=120)


def install(folder: Path, heads: Path, name: str) -> Path:
    """Copy a trained head to ``<index>/heads/<name>``, replacing what was there; return it."""
    target = heads / name
    target.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG, BANK):  # the config goes first and comes last: never a mixed head
        (target / file).unlink(missing_ok=True)
    for file in (WEIGHTS, BANK, "README.md", CONFIG):
        if (folder / file).exists():
            shutil.copy2(folder / file, target / file)
    return target
