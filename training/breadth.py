"""Breadth: photographs from elsewhere, looked for among Flickr8k val and held-out drawings.

    MMSEARCH_FLICKR8K=... python training/breadth.py WORK/clipart.csv

The photographs are those that the scikit-image and scikit-learn wheels carry; drawings are the
openclipart titles that no training step saw. Prints the rank of each photograph for its query
in the joint gallery, and R@k of held-out titles among the drawings.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from evaluate import encode_val
from mmsearch.indexing.encoder import load_encoder
from PIL import Image
from views import read_rgb

QUERIES = {
    "skimage/data/astronaut.png": "an astronaut in an orange space suit",
    "skimage/data/chelsea.png": "a cat",
    "skimage/data/coffee.png": "a cup of coffee on a saucer",
    "skimage/data/rocket.jpg": "a rocket launch",
    "skimage/data/coins.png": "old coins",
    "skimage/data/camera.png": "a photographer with a camera on a tripod",
    "skimage/data/brick.png": "a brick wall",
    "skimage/data/motorcycle_left.png": "a motorcycle",
    "sklearn/datasets/images/china.jpg": "a Chinese temple",
    "sklearn/datasets/images/flower.jpg": "a pink flower",
}


def find(name: str) -> Path:
    """The file inside an installed package."""
    package, rest = name.split("/", 1)
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / rest


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("clipart", type=Path)
    args = ap.parse_args()
    encoder = load_encoder("bundled", device="cpu", precision="fp32")

    def pictures(paths: list[Path]) -> torch.Tensor:
        """Unit vectors (N, D)."""
        out = []
        for at in range(0, len(paths), 50):
            size = encoder.spec.input_size[::-1]
            pixels = [
                np.asarray(read_rgb(p).resize(size, Image.Resampling.BICUBIC))
                for p in paths[at : at + 50]
            ]
            out.append(encoder.encode_images(np.stack(pixels)).pooled)
        return torch.cat(out)

    queries = {find(k): v for k, v in QUERIES.items() if find(k).exists()}
    photos = pictures(list(queries))  # (K, D)
    rows = [r for r in csv.DictReader(args.clipart.open()) if r["split"] == "val"]
    drawings = pictures([Path(r["path"]) for r in rows])  # (N, D)
    flickr = encode_val(Path(os.environ["MMSEARCH_FLICKR8K"])).pooled
    gallery = torch.cat([photos, drawings, flickr])  # (K + N + 1000, D)
    text = encoder.encode_texts(list(queries.values())).pooled
    sim = text @ gallery.T
    for n, (path, query) in enumerate(queries.items()):
        print(
            f"{query!r}: rank {int((sim[n] > sim[n, n]).sum()) + 1} of {len(gallery)} ({path.name})"
        )
    titles = sorted({r["title"] for r in rows})
    sim = encoder.encode_texts(titles).pooled @ drawings.T  # (T, N)
    mine = torch.tensor([[r["title"] == t for r in rows] for t in titles])  # (T, N)
    best = sim.masked_fill(~mine, -9).amax(1, keepdim=True)
    place = ((sim > best) & ~mine).sum(1)
    out = {f"r{k}": round(100 * (place < k).float().mean().item(), 2) for k in (1, 5, 10)}
    print(json.dumps({"held-out titles": len(titles), "drawings": len(rows), **out}))


if __name__ == "__main__":
    main()
