"""Two photographed things pasted into known boxes over a texture, for the pointing game."""

from __future__ import annotations

import random
from typing import NamedTuple

from PIL import Image

from .photos import photograph

SIDE = 224
# what it is called -> (photograph, the part of it that shows the thing: left, top, right, bottom)
PHOTOGRAPHED = {
    "cat": ("cat.png", (70, 0, 370, 300)),
    "cup of coffee": ("coffee.png", (130, 20, 490, 380)),
    "flower": ("flower.jpg", (120, 0, 547, 427)),
    "motorcycle": ("motorcycle-1.png", (60, 0, 690, 497)),
    "officer": ("officer.jpg", (0, 0, 512, 512)),
    "temple": ("temple.jpg", (100, 0, 527, 427)),
    "woman": ("astronaut.png", (60, 0, 400, 340)),
}
TEXTURES = ("brick-wall.png", "grass.png", "gravel.png")


class Pasted(NamedTuple):
    """One thing and where it is."""

    name: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Collage(NamedTuple):
    """A picture of 224 x 224 with two things in it."""

    picture: Image.Image
    things: tuple[Pasted, Pasted]


def make_collages(count: int, seed: int) -> list[Collage]:
    """Paste two different things of 80 to 104 pixels side by side or one above the other."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        picture = _open(rng.choice(TEXTURES)).resize((SIDE, SIDE))
        across = rng.random() < 0.5
        pasted = []
        for name, low in zip(rng.sample(sorted(PHOTOGRAPHED), 2), (0, SIDE // 2), strict=True):
            size = rng.randint(80, 104)
            along = low + rng.randint(0, SIDE // 2 - size)
            beside = rng.randint(0, SIDE - size)
            left, top = (along, beside) if across else (beside, along)
            file, part = PHOTOGRAPHED[name]
            picture.paste(_open(file).crop(part).resize((size, size)), (left, top))
            pasted.append(Pasted(name, (left, top, left + size, top + size)))
        made.append(Collage(picture, (pasted[0], pasted[1])))
    return made


def _open(name: str) -> Image.Image:
    return Image.open(photograph(name)).convert("RGB")
