"""Composed scenes: coloured things in known places over photographs, and captions that name them.

Each group holds the four pictures of two things in two colours at two places: who has which colour
and who stands where. Their captions use the same words, so only binding a colour or a place to its
thing tells them apart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import skimage.data
from PIL import Image, ImageDraw, ImageFilter

SIDE = 224
COLOURS = {
    "red": (214, 32, 40), "green": (40, 160, 60), "blue": (36, 84, 200), "yellow": (245, 210, 40),
}  # fmt: skip
THINGS = ("ball", "box", "star", "cross")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


@dataclass(frozen=True)
class Thing:
    """One thing drawn in a scene."""

    name: str
    colour: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Scene:
    """One picture and what it shows."""

    group: int
    caption: str
    things: tuple[Thing, Thing]
    backdrop: tuple[str, int]  # photograph, seed of the crop


def compose(groups: int, seed: int) -> list[Scene]:
    """Make up scenes, four in a row for each group."""
    rng = random.Random(seed)
    scenes = []
    for group in range(groups):
        names = rng.sample(THINGS, 2)
        colours = rng.sample(sorted(COLOURS), 2)
        across = rng.random() < 0.5
        spots = _spots(rng, across)
        backdrop = (rng.choice(PHOTOGRAPHS), rng.randrange(10**6))
        relation = rng.choice([0, 1])
        for swap_colours in (False, True):
            for swap_places in (False, True):
                first, second = spots[::-1] if swap_places else spots
                a, b = colours[::-1] if swap_colours else colours
                things = (Thing(names[0], a, first), Thing(names[1], b, second))
                scenes.append(Scene(group, _say(things, across, relation), things, backdrop))
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
        lines.append(f"{name},{scene.caption},{split}")
    table = folder / "captions.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def _spots(rng: random.Random, across: bool) -> list[tuple[int, int, int, int]]:
    """Two boxes side by side, or one above the other."""
    spots = []
    for low, high in ((4, 12), (116, 124)):
        size = rng.randint(84, 96)
        along, beside = rng.randint(low, high), rng.randint(20, SIDE - size - 20)
        x, y = (along, beside) if across else (beside, along)
        spots.append((x, y, x + size, y + size))
    return spots


def _say(things: tuple[Thing, Thing], across: bool, relation: int) -> str:
    """Word a scene, starting from either thing."""
    a, b = things[::-1] if relation else things
    before = (a.box[0] < b.box[0]) if across else (a.box[1] < b.box[1])
    words = ("left of", "right of") if across else ("above", "below")
    return f"a {a.colour} {a.name} {words[0] if before else words[1]} a {b.colour} {b.name}"


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
