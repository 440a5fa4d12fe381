"""Turn the shipped encoder back into a checkpoint, to train a head without training an encoder.

The inverse of export.py, up to fp16: word and position embeddings were frozen, so the rows that
export.py dropped come from the published MiniLM.

    python training/restore.py indexing/bundled WORK/a/ema.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from backbone import FoldedBack, load_lite2
from safetensors.torch import load_file
from train import Dual


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("checkpoint", type=Path)
    args = ap.parse_args()
    tensors = {
        k: v.float() if v.is_floating_point() else v
        for k, v in load_file(args.model / "open_clip_model.safetensors").items()
    }

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    trunk = load_lite2()
    trunk.load_state_dict(part("visual.trunk."), strict=False)
    model = Dual()
    model.back = FoldedBack(trunk)
    bert = {k: v for k, v in part("text.transformer.").items() if not k.startswith("embeddings.")}
    model.bert.load_state_dict(bert, strict=False)
    with torch.no_grad():
        model.img_proj.weight.copy_(tensors["visual.head.proj.weight"])
        model.txt_proj.weight.copy_(tensors["text.proj.weight"])
        model.log_scale.copy_(tensors["logit_scale"])
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.checkpoint)


if __name__ == "__main__":
    main()
