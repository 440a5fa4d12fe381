"""The report's figures, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO, StringIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .evaluate import Direction

# Okabe and Ito's colours, told apart also by the colour-blind.
COLOURS = ("#56606b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
BETTER, WORSE, SAME = "#0072b2", "#d55e00", "#9aa3ab"
STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b949e",
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.hashsalt": "mmsearch",  # the same evaluation draws the same bytes
}


def recall_curves(direction: Direction, label: str) -> str:
    """Draw hit@k over k for every row, with intervals where they were measured, as SVG."""
    ks = np.arange(1, direction.depth + 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.3, 3.4), layout="constrained")
        axes = figure.subplots()
        if len(direction.rows) > 1:
            ceiling = 100 * direction.ceiling.value
            axes.axhline(ceiling, color="#8b949e", linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"ceiling: {label}@{direction.candidates} of the candidates",
                (1, ceiling),
                (2, -3),
                textcoords="offset points",
                va="top",
                fontsize=7.5,
                color="#56606b",
            )
        for row, colour in zip(direction.rows, _cycle(len(direction.rows)), strict=True):
            curve = 100 * (row.ranking.first[:, None] <= ks).mean(axis=0)  # (depth,)
            axes.plot(ks, curve, color=colour, linewidth=1.8, label=row.scorer)
            for name, each in row.estimates.items():
                if name.startswith("hit@") and int(name[4:]) <= direction.depth:
                    spread = [[each.value - each.low], [each.high - each.value]]
                    axes.errorbar(
                        int(name[4:]),
                        100 * each.value,
                        100 * np.array(spread),
                        color=colour,
                        marker="o",
                        markersize=3.5,
                        capsize=2.5,
                        linewidth=1,
                    )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
        axes.set(xlabel="k", ylabel=f"{label}@k (%)", ylim=(0, 102))
        axes.legend(loc="lower right")
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def rank_changes(direction: Direction) -> str:
    """Scatter the first hit's rank before against after the last row, as a PNG's data URI."""
    before, after = direction.rows[0].ranking.first, direction.rows[-1].ranking.first
    within = before <= direction.candidates
    before, after = before[within], after[within]
    rng = np.random.default_rng(0)
    shift = np.exp(rng.uniform(-0.07, 0.07, (2, len(before))))  # equal ranks must not hide others
    with rc_context(STYLE):
        figure = Figure(figsize=(4.3, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, colour, chosen in (
            ("better", BETTER, after < before),
            ("worse", WORSE, after > before),
            ("same", SAME, after == before),
        ):
            axes.scatter(
                before[chosen] * shift[0, chosen],
                after[chosen] * shift[1, chosen],
                s=6,
                alpha=0.35,
                linewidths=0,
                color=colour,
                label=f"{name}: {int(chosen.sum()):,}",
            )
        limits = 0.85, 1.2 * direction.candidates
        axes.plot(limits, limits, color="#8b949e", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
        axes.set(xlabel="rank of the first hit, coarse")
        axes.set(ylabel=f"rank of the first hit, {direction.rows[-1].scorer}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
        legend = axes.legend(loc="upper left", markerscale=2.2, handletextpad=0.2, fontsize=8)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=180)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _cycle(count: int) -> list[str]:
    return [COLOURS[at % len(COLOURS)] for at in range(count)]
