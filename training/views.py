"""Precompute the frozen half of the image tower for several augmented views of each picture.

Stages 0-4 of EfficientNet-Lite2 stay frozen during training, so their output (14 x 14 x 120)
is computed once per view and memory-mapped. View 0 is the exact evaluation preprocessing;
the others are random resized crops, mirrored half of the time, with mild colour jitter.

    python training/views.py pictures.csv OUT --views 10 --part 0/2

`pictures.csv` has a header and the columns `path` and `split`; pictures whose split is
not "train" get view 0 only. Several processes may fill one OUT, each its `--part k/n`; a killed
one goes on after the last view that was done.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from backbone import SIZE, load_lite2, stages_front
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

SHAPE = (14, 14, 120)


def read_rgb(path: Path) -> Image.Image:
    """Decode to RGB; transparency is laid on white."""
    img = Image.open(path)
    if img.mode in ("RGBA", "LA", "P", "PA"):
        rgba = img.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return img.convert("RGB")


def eval_view(img: Image.Image) -> torch.Tensor:
    """Squash to the model's size and scale to [-1, 1]."""
    img = img.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return F.pil_to_tensor(img).float().div(127.5).sub(1)  # (3, S, S)


def random_view(img: Image.Image, rng: random.Random) -> torch.Tensor:
    """One augmented view, scaled to [-1, 1]."""
    torch.manual_seed(rng.getrandbits(31))
    top, left, h, w = v2.RandomResizedCrop.get_params(img, scale=(0.55, 1.0), ratio=(0.75, 1.333))
    img = img.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    x = F.pil_to_tensor(img)  # (3, S, S)
    if rng.random() < 0.5:
        x = F.horizontal_flip(x)
    x = F.adjust_brightness(x, rng.uniform(0.75, 1.25))
    x = F.adjust_contrast(x, rng.uniform(0.75, 1.25))
    x = F.adjust_saturation(x, rng.uniform(0.75, 1.25))
    return x.float().div(127.5).sub(1)


def open_store(out: Path, views: int, pictures: int, create: bool) -> np.ndarray:
    """The (views, pictures, 14, 14, 120) memory map of bfloat16 bit patterns (as uint16)."""
    mode = "r+" if (out / "views.u16").exists() else "w+"
    if not create:
        mode = "r"
    return np.memmap(out / "views.u16", np.uint16, mode, shape=(views, pictures, *SHAPE))


@torch.inference_mode()
def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("pictures", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--views", type=int, default=10)
    ap.add_argument("--part", default="0/1")
    ap.add_argument("--batch", type=int, default=64)
    args = ap.parse_args()
    part, parts = (int(x) for x in args.part.split("/"))
    torch.set_num_threads(1)

    rows = list(csv.DictReader(args.pictures.open()))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "views.json").write_text(json.dumps({"views": args.views, "pictures": len(rows)}))
    store = open_store(args.out, args.views, len(rows), create=True)
    model = load_lite2().bfloat16().to(memory_format=torch.channels_last)

    start, done = time.time(), 0
    for view in range(args.views):
        if (args.out / f"done.{view}.{part}").exists():
            continue
        rng = random.Random(1000 * view + part)
        mine = [
            i for i in range(part, len(rows), parts) if view == 0 or rows[i]["split"] == "train"
        ]
        for at in range(0, len(mine), args.batch):
            ids = mine[at : at + args.batch]
            pics = [read_rgb(Path(rows[i]["path"])) for i in ids]
            xs = [eval_view(p) if view == 0 else random_view(p, rng) for p in pics]
            x = torch.stack(xs).bfloat16().contiguous(memory_format=torch.channels_last)
            y = stages_front(model, x)  # (B, 120, 14, 14)
            y = y.permute(0, 2, 3, 1).contiguous()  # (B, 14, 14, 120)
            store[view, ids] = y.view(torch.uint16).numpy()
            done += len(ids)
        (args.out / f"done.{view}.{part}").touch()
        print(f"view {view} part {part}: {done / (time.time() - start):.1f} views/s", flush=True)


if __name__ == "__main__":
    main()
