"""Closed-form start: both projections before a single gradient step.

Text: the 320 leading directions of the frozen sentence embeddings. Picture: ridge regression
from pooled ImageNet features to the text vectors of captions, titles and class names. A class
is shown to the regression as the feature its classifier row would call typical: under a
linear-discriminant reading, row = inverse covariance x (class mean - mean), so
class mean = mean + covariance x row.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from backbone import FoldedBack, load_lite2
from store import Views
from texts import (
    imagenet_names,
    imagenet_text,
    load_minilm,
    load_tokenizer,
    plain_words,
    read_clipart,
    read_flickr,
    teacher_embed,
)  # fmt: skip
from torch.nn import functional as F

DIM = 320


@torch.inference_mode()
def pooled(back: FoldedBack, views: Views, ids: list[int]) -> torch.Tensor:
    """Frozen pooled features (N, 1280) of the evaluation view."""
    out = []
    with torch.autocast("cpu", torch.bfloat16):
        for at in range(0, len(ids), 128):
            x = views.get([0] * len(ids[at : at + 128]), ids[at : at + 128])
            out.append(back(x).float().mean(1))  # (B, 1280)
    return torch.cat(out)


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("captions", type=Path)
    ap.add_argument("work", type=Path, help="holds flickr.csv, clipart.csv, fl/, cl/")
    args = ap.parse_args()
    work = args.work
    rng = random.Random(0)
    tok = load_tokenizer()
    bert = load_minilm().eval()

    def embed(texts: list[str]) -> torch.Tensor:
        return teacher_embed(bert, [e.ids for e in tok.encode_batch(texts)])

    out: dict[str, torch.Tensor] = {}
    model = load_lite2()
    back = FoldedBack(model)
    sources = {
        "fl": read_flickr(args.captions, work / "flickr.csv"),
        "cl": read_clipart(work / "clipart.csv"),
    }
    for name, pics in sources.items():
        flat = [t for texts in pics.texts for t in texts]
        vecs = embed(flat).split([len(t) for t in pics.texts])
        out[f"{name}.text"] = torch.cat(vecs)  # (all texts, 384)
        out[f"{name}.mean"] = F.normalize(torch.stack([v.mean(0) for v in vecs]), dim=-1)
        out[f"{name}.feat"] = pooled(back, Views(work / name), list(range(len(pics.path))))
        out[f"{name}.logits"] = out[f"{name}.feat"] @ model.classifier.weight.T.detach()
        out[f"{name}.logits"] += model.classifier.bias.detach()
        print(name, {k: tuple(v.shape) for k, v in out.items() if k.startswith(name)}, flush=True)
    names = imagenet_names()
    out["class.text"] = F.normalize(
        torch.stack([embed([imagenet_text(n, rng) for _ in range(4)]).mean(0) for n in names]),
        dim=-1,
    )  # (1000, 384)
    words = plain_words(tok)
    out["word.text"] = embed(words)  # (W, 384)

    feats = torch.cat([out["fl.feat"], out["cl.feat"]])  # (N, 1280)
    mean = feats.mean(0)
    cov = (feats - mean).T @ (feats - mean) / len(feats)  # (1280, 1280)
    rows = model.classifier.weight.detach()  # (1000, 1280)
    rows = rows - rows.mean(0)
    step = rows @ cov  # (1000, 1280)
    typical = (feats - mean).norm(dim=1).median()
    protos = (mean + step * (typical / step.norm(dim=1, keepdim=True))).clamp(min=0)
    out["class.feat"] = protos
    logits = protos @ model.classifier.weight.T.detach() + model.classifier.bias.detach()
    print(
        "prototypes classified as themselves",
        (logits.argmax(1) == torch.arange(1000)).float().mean(),
    )
    sure = out["fl.logits"].softmax(1).max(1)
    pick = (sure.values > 0.8).nonzero()[:, 0]
    real = F.normalize(out["fl.feat"][pick] - mean, dim=1)
    for kind, p in (("covariance", protos - mean), ("raw row", rows)):
        sim = real @ F.normalize(p, dim=1).T
        hit = (sim.argmax(1) == sure.indices[pick]).float().mean()
        own = sim[torch.arange(len(pick)), sure.indices[pick]].mean()
        print(f"{kind}: {len(pick)} sure pictures, own class nearest {hit:.3f}, cosine {own:.3f}")

    train = {n: torch.tensor(p.where("train")) for n, p in sources.items()}
    text = torch.cat([out["fl.mean"], out["cl.mean"], out["class.text"]])
    _, _, v = torch.linalg.svd(text, full_matrices=False)
    w_text = v[:DIM]  # (320, 384)
    x = torch.cat([out["fl.feat"][train["fl"]], out["cl.feat"][train["cl"]], protos])
    y = torch.cat([out["fl.mean"][train["fl"]], out["cl.mean"][train["cl"]], out["class.text"]])
    weight = torch.cat(
        [torch.ones(len(train["fl"])), torch.ones(len(train["cl"])), torch.ones(1000)]
    )
    y = y @ w_text.T  # (N, 320)
    xw = x * weight[:, None]
    gram = xw.T @ x
    for lam in (1e-2, 1e-1, 1.0):
        ridge = gram + lam * gram.diagonal().mean() * torch.eye(len(gram))
        w_img = torch.linalg.solve(ridge, xw.T @ y).T  # (320, 1280)
        val = sources["fl"].where("val")
        img = F.normalize(out["fl.feat"][val] @ w_img.T, dim=1)
        many = [len(t) for t in sources["fl"].texts]
        caps = torch.cat([c for i, c in enumerate(out["fl.text"].split(many)) if i in set(val)])
        truth = torch.arange(len(val)).repeat_interleave(torch.tensor([many[i] for i in val]))
        rank = recall(img, F.normalize(caps @ w_text.T, dim=1), truth)
        print(f"ridge {lam}: val text to image {rank}", flush=True)
        if lam == 1e-1:
            out["w_img"], out["w_text"] = w_img, w_text
    torch.save(out, work / "init.pt")


def recall(img: torch.Tensor, txt: torch.Tensor, truth: torch.Tensor) -> tuple[float, ...]:
    """R@1, 5, 10 in percent, text to image."""
    sim = txt @ img.T
    own = sim[torch.arange(len(txt)), truth][:, None]
    place = (sim > own).sum(1)
    return tuple(round(100 * (place < k).float().mean().item(), 2) for k in (1, 5, 10))


if __name__ == "__main__":
    main()
