"""List the drawings of Debian's openclipart-png (public domain) that have a telling title.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png*.deb clipart
    python training/clipart.py clipart/usr/share/openclipart/png OUT.csv

Writes path, split, title, text columns; titles, not pictures, are split, so that a held-out
title was never trained on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import re
from pathlib import Path

from PIL import Image

SKIP = (
    "shapes", "computer/icons", "computer/buttons", "games/cards", "special", "/led",
    "stickmen", "smilies", "callouts", "flowchart", "jigsaw", "folders", "map_symbols/aiga",
)  # fmt: skip
BORING = re.compile(
    r"clip ?art|part of|icon|collection|gramastar|symbol signs|various|untitled|drawing\d|"
    r"^new |inkscape|\bsvg\b|\bpng\b|logo|theme|converted|\blpc?\b|cartes",
    re.I,
)
FLAGS_KEPT = 200


def clean(title: str) -> str:
    """Lower case, words only, no author or serial number."""
    title = re.sub(r"<[^>]*>", " ", html.unescape(title))
    title = re.sub(r"\bby .*|#.*", " ", title, flags=re.I)
    title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", title.replace("_", " "))
    title = re.sub(r"\bRPG map elements\b|\bremix\b|\b\d+\b|\bv\d\b", " ", title, flags=re.I)
    title = re.sub(r"[^A-Za-z' -]+", " ", title)
    return re.sub(r"\s+", " ", title).strip(" -'").lower()


def from_name(path: Path) -> str:
    """A title from a file name such as `red_flower_jon_phil_01.png`: its first words."""
    words = re.sub(r"\d+", " ", path.stem.replace("-", "_")).replace("_", " ").split()
    return " ".join(words[:2]).lower()


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("root", type=Path)
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    rows, flags, per_title = [], 0, {}
    for path in sorted(args.root.rglob("*.png")):
        where = path.relative_to(args.root).as_posix()
        if any(s in where for s in SKIP):
            continue
        if path.stat().st_size > 1_000_000:
            continue
        with Image.open(path) as img:
            if (
                img.width * img.height > 8_000_000
                or min(img.size) < 48
                or max(img.size) > 4 * min(img.size)
            ):
                continue
            meta = {k: str(v) for k, v in img.info.items() if isinstance(v, str)}
        raw = meta.get("Title", "")
        title = clean(raw) if raw and not BORING.search(raw) else ""
        if not 2 < len(title) < 60:
            title = clean(from_name(path))
        if not 2 < len(title) < 60:
            continue
        kind = path.parent.relative_to(args.root).as_posix().split("/")[-1].replace("_", " ")
        if "/flags" in where:
            flags += 1
            if flags % 3 or flags > 3 * FLAGS_KEPT:
                continue
            title = title if "flag" in title else f"flag of {title}"
        per_title[title] = per_title.get(title, 0) + 1
        if per_title[title] > 12:
            continue
        text = clean(meta.get("Description", ""))
        text = text if 8 < len(text) < 90 and not BORING.search(text) and text != title else ""
        held = int(hashlib.sha256(title.encode()).hexdigest(), 16) % 8 == 0
        rows.append((str(path.resolve()), "val" if held else "train", title, kind, text))
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "split", "title", "kind", "text"))
        writer.writerows(rows)
    print(f"{len(rows)} drawings, {sum(r[1] == 'val' for r in rows)} held out")


if __name__ == "__main__":
    main()
