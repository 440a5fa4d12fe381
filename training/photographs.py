"""List Flickr8k's pictures: path and split, sorted by name.

python training/photographs.py FLICKR8K OUT.csv
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("root", type=Path, help="holds captions.csv and images/")
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    with (args.root / "captions.csv").open(newline="", encoding="utf-8") as file:
        split = {row["image"]: row["split"] for row in csv.DictReader(file)}
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "split"))
        for name in sorted(split):
            writer.writerow(((args.root / "images" / name).resolve(), split[name]))


if __name__ == "__main__":
    main()
