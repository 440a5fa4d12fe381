"""Real photographs for the tests and the demo, from packages that ship them.

scikit-image and scikit-learn carry photographs in the public domain or under free licences
(each names its sources in its own documentation), matplotlib a portrait by the U.S. Navy. They are
copied from the installed packages, so that this repository need not carry them again.

    python tests/photos.py FOLDER
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

# name in the demo -> (package, file inside it)
PHOTOGRAPHS = {
    "astronaut.png": ("skimage", "data/astronaut.png"),
    "brick-wall.png": ("skimage", "data/brick.png"),
    "cameraman.png": ("skimage", "data/camera.png"),
    "cat.png": ("skimage", "data/chelsea.png"),
    "cell.png": ("skimage", "data/cell.png"),
    "clock.png": ("skimage", "data/clock_motion.png"),
    "coffee.png": ("skimage", "data/coffee.png"),
    "coins.png": ("skimage", "data/coins.png"),
    "flower.jpg": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies.jpg": ("skimage", "data/hubble_deep_field.jpg"),
    "grass.png": ("skimage", "data/grass.png"),
    "gravel.png": ("skimage", "data/gravel.png"),
    "handwriting.png": ("skimage", "data/text.png"),
    "moon.png": ("skimage", "data/moon.png"),
    "motorcycle-1.png": ("skimage", "data/motorcycle_left.png"),
    "motorcycle-2.png": ("skimage", "data/motorcycle_right.png"),
    "officer.jpg": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "printed-page.png": ("skimage", "data/page.png"),
    "retina.jpg": ("skimage", "data/retina.jpg"),
    "rocket.jpg": ("skimage", "data/rocket.jpg"),
    "temple.jpg": ("sklearn", "datasets/images/china.jpg"),
    "tissue.png": ("skimage", "data/ihc.png"),
}


def photograph(name: str) -> Path:
    """Return where the photograph called ``name`` lies in its package."""
    package, file = PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package}, which ships {name}, is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def copy_photographs(folder: Path) -> list[Path]:
    """Copy all photographs into ``folder`` and return where they lie."""
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(photograph(name), folder / name)) for name in PHOTOGRAPHS]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/photos.py FOLDER")
    print(f"{len(copy_photographs(Path(sys.argv[1])))} photographs in {sys.argv[1]}")
