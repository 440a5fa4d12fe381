"""Composed scenes: things of a colour, a size and a place over photographs, and captions of them.

A scene shows two or three things. Each group holds the eight pictures in which two of its things
have swapped colours, sizes and places, or not. All eight captions use the same words, so only
binding an attribute to its thing tells the pictures apart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import skimage.data
from PIL import Image, ImageDraw, ImageFilter

SIDE = 224
COLOURS = {
    "red": (214, 32, 40), "green": (40, 160, 60), "blue": (36, 84, 200), "yellow": (245, 210, 40),
}  # fmt: skip
SIZES = {"small": (46, 54), "big": (86, 96)}  # pixels
Value = TypeVar("Value")
THINGS = ("ball", "box", "star", "cross")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SWAPS = ("colours", "sizes", "places")
GROUP = 2 ** len(SWAPS)  # scene n of a group has swapped SWAPS[i] where bit i of n is set


@dataclass(frozen=True)
class Thing:
    """One thing drawn in a scene."""

    name: str
    colour: str
    size: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.name}"


@dataclass(frozen=True)
class Scene:
    """One picture and what it shows."""

    group: int
    caption: str
    things: tuple[Thing, ...]  # two side by side (or one above the other), then perhaps a third
    backdrop: tuple[str, int]  # photograph, seed of the crop


def compose(groups: int, seed: int) -> list[Scene]:
    """Make up scenes, GROUP in a row for each group."""
    rng = random.Random(seed)
    scenes = []
    for group in range(groups):
        count = rng.choice([2, 3])
        names, colours = rng.sample(THINGS, count), rng.sample(sorted(COLOURS), count)
        sizes = [*rng.sample(sorted(SIZES), 2), rng.choice(sorted(SIZES))][:count]
        across = rng.random() < 0.5
        spots = _spots(rng, across, count)
        order = rng.sample(range(count), count)  # which thing is at which spot; 0 and 1 may swap
        widths = {size: rng.randint(*SIZES[size]) for size in sorted(SIZES)}
        backdrop = (rng.choice(PHOTOGRAPHS), rng.randrange(10**6))
        start = rng.choice([0, 1])
        for swaps in range(GROUP):
            colour, size, place = (
                _swapped(values) if swaps >> bit & 1 else values
                for bit, values in enumerate((colours, sizes, list(range(count))))
            )
            things = []
            for spot, thing in zip(spots, (place[at] for at in order), strict=True):
                box = _box(spot, widths[size[thing]])
                things.append(Thing(names[thing], colour[thing], size[thing], box))
            caption = _say(things, across, start)
            scenes.append(Scene(group, caption, tuple(things), backdrop))
    return scenes


def draw(scene: Scene) -> Image.Image:
    """Draw a scene over its photograph, 224 x 224."""
    name, seed = scene.backdrop
    rng = random.Random(seed)
    photograph = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    side = rng.randint(120, min(photograph.size))
    left, top = (rng.randint(0, size - side) for size in photograph.size)
    picture = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    picture = picture.filter(ImageFilter.GaussianBlur(2))
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        _draw_thing(pen, thing)
    return picture


def write(scenes: list[Scene], folder: Path, split: str = "") -> Path:
    """Write pictures and captions.csv (image, caption, split); return the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,caption,split"]
    for at, scene in enumerate(scenes):
        name = f"{at:05}.png"
        draw(scene).save(folder / name)
        lines.append(f'{name},"{scene.caption}",{split}')
    table = folder / "captions.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def _swapped(values: list[Value]) -> list[Value]:
    """Swap what the first two things have."""
    return [values[1], values[0], *values[2:]]


def _spots(rng: random.Random, across: bool, count: int) -> list[tuple[int, int]]:
    """Centres of two spots side by side (or one above the other) and of one below (or right)."""

    def near(place: int) -> int:
        return place + rng.randint(-6, 6)

    low, middle, high = 56, SIDE // 2, SIDE - 56
    # Two things may lie anywhere beside their axis; three leave the further half to the third.
    beside = [near(low) if count == 3 else rng.randint(low, high) for _ in range(2)]
    spots = [(near(low), beside[0]), (near(high), beside[1]), (near(middle), near(high))]
    return [spot if across else spot[::-1] for spot in spots[:count]]


def _box(spot: tuple[int, int], width: int) -> tuple[int, int, int, int]:
    (x, y), half = spot, width // 2
    return (x - half, y - half, x + half, y + half)


def _say(things: list[Thing], across: bool, start: int) -> str:
    """Word a scene, starting from either of the two things that lie along its axis."""
    words = ("left of", "right of") if across else ("above", "below")
    said = f"{things[start]} {words[start]} {things[1 - start]}"
    if len(things) == 2:
        return said
    return f"{said}, {'above' if across else 'left of'} {things[2]}"


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    left, top, right, bottom = thing.box
    fill, line = COLOURS[thing.colour], (60, 60, 60)
    width, middle = right - left, (left + right) // 2
    third = width // 3
    if thing.name == "ball":
        pen.ellipse(thing.box, fill, line, 2)
    elif thing.name == "box":
        pen.rectangle(thing.box, fill, line, 2)
    elif thing.name == "cross":
        pen.rectangle((left + third, top, right - third, bottom), fill)
        pen.rectangle((left, top + third, right, bottom - third), fill)
    else:  # star
        centre, outer = (middle, (top + bottom) // 2), width / 2
        pen.regular_polygon((*centre, outer), 3, 0, fill)
        pen.regular_polygon((*centre, outer), 3, 60, fill)
