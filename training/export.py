"""Write a trained encoder as an ordinary open_clip folder (config, tokenizer, fp16 safetensors).

WordPieces that no ASCII text can produce and the [unused] ones leave the vocabulary, positions
beyond 64 leave the table; nothing else is changed.

    python training/export.py WORK/a/ema.pt indexing/bundled
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import torch
from backbone import NAME, SIZE, load_lite2
from safetensors.torch import save_file
from texts import FOLDER, MAX_TOKENS
from train import Dual

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def prune(tokenizer: dict) -> tuple[dict, list[int]]:
    """A smaller tokenizer.json and, for each new id, the old one."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    kept = list(SPECIAL)
    kept += [
        t for t, _ in sorted(vocab.items(), key=lambda kv: kv[1])
        if t.isascii() and t not in SPECIAL and not re.fullmatch(r"\[unused\d+\]", t)
    ]  # fmt: skip
    new = {t: i for i, t in enumerate(kept)}
    out = json.loads(json.dumps(tokenizer))
    out["model"]["vocab"] = new
    for token in out["added_tokens"]:
        token["id"] = new[token["content"]]
    for name, value in out["post_processor"]["special_tokens"].items():
        value["ids"] = [new[name]]
    out["padding"] = None
    out["truncation"] = None
    return out, [vocab[t] for t in kept]


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("checkpoint", type=Path)
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    model = Dual()
    state = torch.load(args.checkpoint, weights_only=True, map_location="cpu")
    missing, _ = model.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith("head.")}, strict=False
    )
    assert not missing, missing
    tokenizer, old_ids = prune(json.loads((FOLDER / "tokenizer.json").read_text()))

    trunk = load_lite2()
    model.back.write_to(trunk)
    tensors = {
        f"visual.trunk.{k}": v
        for k, v in trunk.state_dict().items()
        if not k.startswith("classifier") and not k.endswith("num_batches_tracked")
    }
    tensors["visual.head.proj.weight"] = model.img_proj.weight.detach()
    bert = {f"text.transformer.{k}": v for k, v in model.bert.state_dict().items()}
    word = "text.transformer.embeddings.word_embeddings.weight"
    place = "text.transformer.embeddings.position_embeddings.weight"
    bert[word] = bert[word][old_ids]
    bert[place] = bert[place][:MAX_TOKENS]
    tensors |= {k: v for k, v in bert.items() if v.is_floating_point()}
    tensors["text.proj.weight"] = model.txt_proj.weight.detach()
    tensors["logit_scale"] = model.log_scale.detach()
    tensors = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()
    }
    assert all(v.isfinite().all() for v in tensors.values())

    (args.out / "text").mkdir(parents=True, exist_ok=True)
    weights = args.out / "open_clip_model.safetensors"
    save_file(tensors, weights)
    config = json.loads((FOLDER / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    config |= {
        "vocab_size": len(old_ids), "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": tokenizer["model"]["vocab"]["[PAD]"],
    }  # fmt: skip
    config.pop("transformers_version", None)
    clip = {
        "model_cfg": {
            "embed_dim": model.img_proj.out_features,
            "vision_cfg": {
                "timm_model_name": NAME, "timm_model_pretrained": False, "timm_pool": "avg",
                "timm_proj": "linear", "image_size": SIZE,
            },
            "text_cfg": {
                "hf_model_name": "text", "hf_tokenizer_name": "text", "hf_model_pretrained": False,
                "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler",
                "context_length": MAX_TOKENS, "vocab_size": len(old_ids),
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }  # fmt: skip
    tok_config = {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": MAX_TOKENS,
        "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }  # fmt: skip

    def write(name: str, values: dict, indent: int | None = 2) -> None:
        text = json.dumps(values, indent=indent, ensure_ascii=False)
        (args.out / name).write_text(text + "\n", encoding="utf-8")

    write("open_clip_config.json", clip)
    write("text/config.json", config)
    write("tokenizer.json", tokenizer, None)
    write("tokenizer_config.json", tok_config)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    print(f"{weights.stat().st_size / 1e6:.1f} MB, {len(old_ids)} word pieces, sha256 {digest}")


if __name__ == "__main__":
    main()
