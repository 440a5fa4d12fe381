"""Average the weights of runs that share a start (model soup, arXiv 2203.05482) and measure.

python training/average.py captions.csv WORK WORK/a/ema.pt WORK/b/ema.pt --out WORK/soup.pt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from train import Data, Dual, evaluate


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("captions", type=Path)
    ap.add_argument("work", type=Path)
    ap.add_argument("runs", type=Path, nargs="+")
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    torch.set_num_threads(2)
    data, model = Data(args.captions, args.work, 0), Dual()
    states = [torch.load(p, weights_only=True) for p in args.runs]
    mean = {
        k: torch.stack([s[k].float() for s in states]).mean(0).to(v.dtype)
        for k, v in states[0].items()
    }
    torch.save(mean, args.out)
    for name, state in [*zip(args.runs, states, strict=True), ("average", mean)]:
        model.load_state_dict(state)
        print(
            json.dumps({"run": Path(name).parent.name or str(name), **evaluate(model, data)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
