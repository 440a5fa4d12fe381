"""Pictures of explanations: a PNG contact sheet, and an HTML page to hover over.

All words' maps share one scale, in multiples of even attention: 1 is what a word that looks
everywhere alike gives each patch. So a flat map looks flat, and two pictures can be compared.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .explain import Explanation

TILE, GAP, LABEL = 224, 10, 34
LEAST_SCALE = 3.0  # times even attention; keeps noise from filling the scale
# From black through purple and orange to yellow: dark to bright, also for colour-blind eyes.
_HEAT = np.array(
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float32
)


@dataclass(frozen=True)
class Shown:
    """A picture as the encoder saw it, and its explanation."""

    name: str
    pixels: np.ndarray  # (H, W, 3) uint8
    explanation: Explanation


def scales(shown: Sequence[Shown]) -> tuple[float, float]:
    """Return the largest attention (in multiples of even) and the largest contribution."""
    attention = max(float(each.explanation.maps.max()) * _cells(each) for each in shown)
    worth = max(float(np.abs(each.explanation.contributions).max()) for each in shown)
    return max(attention, LEAST_SCALE), max(worth, 1e-6)


def contact_sheet(
    shown: Sequence[Shown], text: str, scale: tuple[float, float] | None = None
) -> Image.Image:
    """Draw a row of tiles for each picture: itself, the whole query, worth, then each word.

    ``scale`` is that of ``scales``; give one to sheets that are to be compared.
    """
    attention, worth = scale or scales(shown)
    columns = max(3 + len(each.explanation.words) for each in shown)
    columns = min(columns, 8)
    rows = [_tiles(each, attention, worth) for each in shown]
    lines = sum(-(-len(tiles) // columns) for tiles in rows)
    size = (columns * (TILE + GAP) + GAP, lines * (TILE + LABEL + GAP) + 2 * LABEL + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    pen.text((GAP, GAP), text, "black", font)
    y = LABEL + GAP
    for tiles in rows:
        for at, (label, tile) in enumerate(tiles):
            if at and at % columns == 0:
                y += TILE + LABEL + GAP
            x = GAP + at % columns * (TILE + GAP)
            sheet.paste(tile, (x, y))
            pen.text((x + 2, y + TILE + 4), label, "black", small)
        y += TILE + LABEL + GAP
    note = (
        f"words: dark 0, bright {attention:.1f} x even attention; "
        f"worth: red raises the score, blue lowers it, full colour {worth:.3f}"
    )
    pen.text((GAP, y), note, (90, 90, 90), small)
    return sheet


def overlay(pixels: np.ndarray, cells: np.ndarray, limit: float) -> Image.Image:
    """Lay a map (h, w) of non-negative numbers over a picture; ``limit`` is full brightness."""
    strength = _spread(cells, pixels.shape) / limit  # (H, W)
    return Image.fromarray(_blend(pixels, heat(strength), 0.75))


def signed_overlay(pixels: np.ndarray, cells: np.ndarray, limit: float) -> Image.Image:
    """Lay contributions (h, w) over a grey picture: red raises the score, blue lowers it."""
    strength = np.clip(_spread(cells, pixels.shape) / limit, -1, 1)  # (H, W)
    colour = np.where(strength[..., None] > 0, (230, 30, 30), (30, 60, 230))  # (H, W, 3)
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)  # (H, W, 3)
    share = np.abs(strength)[..., None] * 0.85  # (H, W, 1)
    return Image.fromarray((grey * 0.8 * (1 - share) + colour * share).astype(np.uint8))


def heat(strength: np.ndarray) -> np.ndarray:
    """Colour numbers from 0 to 1: (...) -> (..., 3) uint8."""
    at = np.clip(strength, 0, 1) * (len(_HEAT) - 1)  # (...)
    low = np.minimum(at.astype(int), len(_HEAT) - 2)  # (...)
    share = (at - low)[..., None]  # (..., 1)
    return (_HEAT[low] * (1 - share) + _HEAT[low + 1] * share).astype(np.uint8)


def html_page(shown: Sequence[Shown], text: str) -> str:
    """Return one page that needs nothing else: hover over a word to see where it looks."""
    from jinja2 import Environment, PackageLoader

    attention, worth = scales(shown)
    environment = Environment(loader=PackageLoader("mmsearch.rerank", "."), autoescape=True)
    pictures = [
        {
            "name": each.name,
            "source": _data_uri(Image.fromarray(each.pixels)),
            "explanation": each.explanation,
            "layers": [
                ("whole query", "", _data_uri(overlay(each.pixels, _even(each), attention))),
                (
                    "worth of each patch",
                    "",
                    _data_uri(signed_overlay(each.pixels, each.explanation.contributions, worth)),
                ),
                *(
                    (word, f"{weight:.0%}", _data_uri(overlay(each.pixels, cells, attention)))
                    for word, weight, cells in zip(
                        each.explanation.words,
                        each.explanation.word_weights,
                        each.explanation.maps * _cells(each),
                        strict=True,
                    )
                ),
            ],
        }
        for each in shown
    ]
    template = environment.get_template("explain.html.j2")
    return template.render(text=text, pictures=pictures, attention=attention, worth=worth)


def write_sheet(
    path: Path, shown: Sequence[Shown], text: str, scale: tuple[float, float] | None = None
) -> None:
    """Save a contact sheet as PNG; ``scale`` as in ``contact_sheet``."""
    contact_sheet(shown, text, scale).save(path, format="PNG")


def _tiles(shown: Shown, attention: float, worth: float) -> list[tuple[str, Image.Image]]:
    explanation, pixels = shown.explanation, shown.pixels
    verdict = (
        f"score {explanation.score:.2f}"
        if explanation.probability is None
        else f"match {explanation.probability:.0%}"
    )
    tiles = [
        (f"{shown.name[:20]}  {verdict}", Image.fromarray(pixels)),
        ("whole query", overlay(pixels, _even(shown), attention)),
        ("worth of each patch", signed_overlay(pixels, explanation.contributions, worth)),
    ]
    for at, word in enumerate(explanation.words):
        label = f"{word[:22]}  {explanation.word_weights[at]:.0%}"
        tiles.append((label, overlay(pixels, explanation.maps[at] * _cells(shown), attention)))
    return [(label, tile.resize((TILE, TILE))) for label, tile in tiles]


def _even(shown: Shown) -> np.ndarray:
    """The whole query's map in multiples of even attention, (h, w)."""
    whole = shown.explanation.whole  # (h, w)
    return whole / max(float(whole.sum()), 1e-9) * whole.size


def _cells(shown: Shown) -> int:
    return shown.explanation.whole.size


def _spread(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Smooth a map over the pixels: (h, w) -> (H, W)."""
    image = Image.fromarray(cells.astype(np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _blend(pixels: np.ndarray, colour: np.ndarray, most: float) -> np.ndarray:
    """Mix colours into a picture, the more the brighter they are. (H, W, 3) uint8."""
    share = most * colour.max(axis=2, keepdims=True) / 255  # (H, W, 1)
    return (pixels * 0.6 * (1 - share) + colour * share).astype(np.uint8)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
