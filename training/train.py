"""Train the bundled dual encoder.

Losses of a step (see README.md for the weights):
  itc      symmetric InfoNCE (CLIP, arXiv 2103.00020) over Flickr8k pictures and drawings, two
           sentences a picture, soft targets from the frozen sentence encoder's view of how
           alike the pictures' captions are
  proto    ImageNet class prototypes against class names, in feature space
  distil   the frozen ImageNet classifier's opinion of each real picture, told in class names
  relation the frozen sentence encoder's similarities between texts, words included
           (relational knowledge distillation, arXiv 1904.05068)
Weights are averaged (EMA) and the average is what is evaluated and saved.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import torch
from backbone import FoldedBack, load_lite2
from init import recall
from store import Views
from texts import (
    drop_words,
    encode_states,
    imagenet_names,
    imagenet_text,
    load_minilm,
    load_tokenizer,
    mean_pool,
    plain_words,
    read_clipart,
    read_flickr,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F


class Dual(nn.Module):
    """The trainable part of the encoder."""

    def __init__(self, dim: int = 320) -> None:
        super().__init__()
        self.back = FoldedBack(load_lite2())
        self.img_proj = nn.Linear(1280, dim, bias=False)
        self.bert = load_minilm()
        self.bert.embeddings.requires_grad_(False)
        self.txt_proj = nn.Linear(384, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def image(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 14, 14, 120) -> unit vectors (B, D), patches (B, 49, D)."""
        patches = self.img_proj(self.back(x))  # (B, 49, D)
        return F.normalize(patches.float().mean(1), dim=-1), patches

    def text(self, ids: list[list[int]], chunk: int = 96) -> tuple[torch.Tensor, list]:
        """Sentences -> unit vectors (N, D) and the chunks of token states."""
        chunks = encode_states(self.bert, ids, chunk)
        rows = torch.cat([c[0] for c in chunks])
        pool = torch.cat([mean_pool(s.float(), m) for _, s, m in chunks])  # (N, 384)
        out = F.normalize(self.txt_proj(pool).float(), dim=-1)  # (N, D)
        return out[rows.argsort()], chunks


def soft_nce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against row-normalised targets (N, M)."""
    return -(target * logits.log_softmax(1)).sum(1).mean()


def groups(model: Dual, args: argparse.Namespace) -> list[dict]:
    """Parameter groups: layer-wise decay in the text tower, no weight decay on vectors."""
    out: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith("back"):
            lr = args.lr_back
        elif name.startswith("bert.encoder.layer."):
            lr = args.lr_text * args.layer_decay ** (5 - int(name.split(".")[3]))
        elif name == "log_scale":
            lr = 1e-3
        elif name.startswith("head"):
            lr = args.lr_head
        else:
            lr = args.lr_proj
        decay = args.decay if p.ndim > 1 and not name.endswith("_b") else 0.0
        out.setdefault((lr, decay), []).append(p)
    return [{"params": v, "lr": k[0], "base": k[0], "weight_decay": k[1]} for k, v in out.items()]


class Ema:
    """Exponential moving average of the trainable weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.pairs = [
            (a, b)
            for a, b in zip(self.model.parameters(), model.parameters(), strict=True)
            if b.requires_grad
        ]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """One step; short memory at first."""
        self.steps += 1
        d = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_([a for a, _ in self.pairs], [b for _, b in self.pairs], 1 - d)


class Data:
    """Everything a step draws from."""

    def __init__(self, captions: Path, work: Path, seed: int, without: int | None = None) -> None:
        self.rng = random.Random(seed)
        self.without = without  # the half (see ``half_of``) of the photographs never drawn
        self.tok = load_tokenizer()
        self.init = torch.load(work / "init.pt", weights_only=True)
        self.fl = read_flickr(captions, work / "flickr.csv")
        self.cl = read_clipart(work / "clipart.csv")
        self.fl_views, self.cl_views = Views(work / "fl"), Views(work / "cl")
        self.names = imagenet_names()
        self.words = plain_words(self.tok)
        self.offset = {}
        for key, pics in (("fl", self.fl), ("cl", self.cl)):
            ends = torch.tensor([0, *[len(t) for t in pics.texts]]).cumsum(0)
            self.offset[key] = ends.tolist()
        self.fl_ids = [[self.tok.encode(t).ids for t in ts] for ts in self.fl.texts]
        self.queue: dict[str, list[int]] = {"fl": [], "cl": []}

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of sentences."""
        return [e.ids for e in self.tok.encode_batch(texts)]

    def draw(self, key: str, n: int) -> list[int]:
        """The next n training pictures of a source, reshuffled each epoch."""
        q = self.queue[key]
        while len(q) < n:
            more = (self.fl if key == "fl" else self.cl).where("train")
            if key == "fl":
                more = [picture for picture in more if half_of(picture) != self.without]
            self.rng.shuffle(more)
            q += more
        out, self.queue[key] = q[:n], q[n:]
        return out


def half_of(picture: int) -> int:
    """Return 0 or 1: the half of the photographs that a picture is in, for cross-fitting."""
    return picture % 2


@torch.inference_mode()
def evaluate(model: Dual, data: Data) -> dict[str, list[float]]:
    """Text to image on Flickr8k val and on held-out drawings (by title)."""
    model.eval()
    out = {}
    with torch.autocast("cpu", torch.bfloat16):
        for key, pics, views in (("fl", data.fl, data.fl_views), ("cl", data.cl, data.cl_views)):
            val = pics.where("val")
            img = torch.cat(
                [model.image(views.get([0] * len(b), b))[0] for b in
                 (val[i : i + 128] for i in range(0, len(val), 128))]
            )  # fmt: skip
            if key == "fl":
                ids = [i for p in val for i in data.fl_ids[p]]
                truth = torch.tensor([n for n, p in enumerate(val) for _ in data.fl_ids[p]])
                txt = model.text(ids, 256)[0]
                with torch.autocast("cpu", enabled=False):  # bfloat16 similarities tie
                    out["flickr"] = recall(img, txt, truth)
                    sim = img @ txt.T  # (N, 5N)
                mine = truth == torch.arange(len(val))[:, None]  # (N, T)
                place = (sim > sim.masked_fill(~mine, -9).amax(1, keepdim=True)).sum(1)
                out["flickr_i2t"] = [
                    round(100 * (place < k).float().mean().item(), 2) for k in (1, 5, 10)
                ]
            else:
                first = {t: i for i, t in reversed(list(enumerate(pics.group[v] for v in val)))}
                txt = model.text(data.ids(list(first)), 256)[0]
                with torch.autocast("cpu", enabled=False):
                    sim = txt @ img.T
                mine = torch.tensor([[pics.group[v] == t for v in val] for t in first])
                best = sim.masked_fill(~mine, -9).max(1).values[:, None]
                place = ((sim > best) & ~mine).sum(1)
                out["clipart"] = [
                    round(100 * (place < k).float().mean().item(), 2) for k in (1, 5, 10)
                ]
    return out


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("captions", type=Path)
    ap.add_argument("work", type=Path)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--steps", type=int, default=500)
    ap.add_argument("--warmup", type=int, default=30)
    ap.add_argument("--batch", type=int, default=192)
    ap.add_argument("--drawings", type=int, default=32)
    ap.add_argument("--classes", type=int, default=64)
    ap.add_argument("--plain-words", type=int, default=48)
    ap.add_argument("--lr-back", type=float, default=6e-5)
    ap.add_argument("--lr-text", type=float, default=1e-4)
    ap.add_argument("--lr-proj", type=float, default=4e-4)
    ap.add_argument("--layer-decay", type=float, default=0.8)
    ap.add_argument("--decay", type=float, default=0.05)
    ap.add_argument("--ema", type=float, default=0.99)
    ap.add_argument("--soft", type=float, default=0.2)
    ap.add_argument("--soft-temperature", type=float, default=0.08)
    ap.add_argument("--w-proto", type=float, default=0.2)
    ap.add_argument("--w-distil", type=float, default=0.2)
    ap.add_argument("--w-relation", type=float, default=0.3)
    ap.add_argument("--word-drop", type=float, default=0.1)
    ap.add_argument("--eval-every", type=int, default=60)
    ap.add_argument("--floor", type=float, default=0.02, help="final learning rate, relative")
    ap.add_argument("--without", type=int, choices=(0, 1), help="half of the photographs to spare")
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "metrics.jsonl").open("a")

    data = Data(args.captions, args.work, args.seed, args.without)
    model = Dual()
    with torch.no_grad():
        model.img_proj.weight.copy_(data.init["w_img"])
        model.txt_proj.weight.copy_(data.init["w_text"])
    ema = Ema(model, args.ema)
    optim = torch.optim.AdamW(groups(model, args), betas=(0.9, 0.98), fused=True)
    rng = data.rng
    print(json.dumps({"step": 0, **evaluate(ema.model, data)}), flush=True)

    start, spent = time.time(), {}
    for step in range(1, args.steps + 1):
        rate = min(step / args.warmup, 1.0)
        done = max(step - args.warmup, 0) / max(args.steps - args.warmup, 1)
        rate *= args.floor + (1 - args.floor) * 0.5 * (1 + math.cos(math.pi * done))
        for g in optim.param_groups:
            g["lr"] = g["base"] * rate
        model.train()

        loss, parts = batch_loss(model, data, rng, args)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optim.param_groups for p in g["params"]], 2.0)
        optim.step()
        with torch.no_grad():
            model.log_scale.clamp_(max=math.log(60.0))
        ema.update()
        for k, v in parts.items():
            spent[k] = spent.get(k, 0.0) * 0.9 + 0.1 * v
        if step % 20 == 0:
            row = {k: round(v / (1 - 0.9**step), 3) for k, v in spent.items()}
            print(json.dumps({"step": step, "s": round(time.time() - start), **row}), flush=True)
        if step % args.eval_every == 0 or step == args.steps:
            row = {"step": step, "s": round(time.time() - start), **evaluate(ema.model, data)}
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            torch.save(ema.model.state_dict(), args.out / "ema.pt.part")
            (args.out / "ema.pt.part").rename(args.out / "ema.pt")


def batch_loss(
    model: Dual, data: Data, rng: random.Random, args: argparse.Namespace
) -> tuple[torch.Tensor, dict[str, float]]:
    """All losses of one step."""
    init = data.init
    fl, cl = data.draw("fl", args.batch), data.draw("cl", args.drawings)
    fl_views, cl_views = data.fl_views.ready(), data.cl_views.ready()
    x = torch.cat([
        data.fl_views.get([rng.randrange(fl_views) for _ in fl], fl),
        data.cl_views.get([rng.randrange(cl_views) for _ in cl], cl),
    ])  # fmt: skip  # (B, 14, 14, 120)

    ids, teacher, owner = [], [], []
    for n, p in enumerate(fl):
        for k in rng.sample(range(len(data.fl_ids[p])), 2):
            ids.append(drop_words(data.fl_ids[p][k], rng, args.word_drop * rng.random() * 2))
            teacher.append(init["fl.text"][data.offset["fl"][p] + k])
            owner.append(n)
    picked = [rng.randrange(len(data.cl.texts[p])) for p in cl]
    ids += data.ids([data.cl.texts[p][k] for p, k in zip(cl, picked, strict=True)])
    teacher += [init["cl.text"][data.offset["cl"][p] + k] for p, k in zip(cl, picked, strict=True)]
    owner += [len(fl) + n for n in range(len(cl))]
    pairs = len(ids)
    own = torch.tensor(owner)  # (T,)

    logits0 = torch.cat([init["fl.logits"][fl], init["cl.logits"][cl]])  # (B, 1000)
    likely = logits0.softmax(1).amax(0).topk(args.classes // 2).indices.tolist()
    rest = [c for c in range(1000) if c not in set(likely)]
    classes = likely + rng.sample(rest, args.classes - len(likely))
    ids += data.ids([imagenet_text(data.names[c], rng) for c in classes])
    teacher += list(init["class.text"][classes])
    words = rng.sample(range(len(data.words)), args.plain_words)
    ids += data.ids([data.words[w] for w in words])
    teacher += list(init["word.text"][words])

    with torch.autocast("cpu", torch.bfloat16):
        img, _ = model.image(x)
        txt, _ = model.text(ids)
        proto = init["class.feat"][classes]  # (C, 1280)
        noise = torch.cat([init["fl.feat"][fl]])[torch.randint(len(fl), (len(classes),))]
        proto = proto + 0.3 * (noise - init["fl.feat"][:2000].mean(0))
        proto_img = F.normalize(model.img_proj(proto).float(), dim=-1)  # (C, D)
    scale = model.log_scale.exp()
    names = txt[pairs : pairs + len(classes)]  # (C, D)

    logits = scale * img @ txt[:pairs].T  # (B, T)
    group = [data.fl.group[p] for p in fl] + [data.cl.group[p] for p in cl]
    same = torch.tensor([[a == b for b in group] for a in group])  # (B, B)
    mean = torch.cat([init["fl.mean"][fl], init["cl.mean"][cl]])  # (B, 384)
    alike = (mean @ mean.T / args.soft_temperature).softmax(1)  # (B, B)
    hard = same.float() / same.float().sum(1, keepdim=True)
    target = (1 - args.soft) * hard + args.soft * alike  # (B, B)
    to_text = target[:, own] / torch.bincount(own)[own]  # (B, T), rows sum to 1
    to_image = target[own]  # (T, B)
    itc = 0.5 * (soft_nce(logits, to_text) + soft_nce(logits.T, to_image))

    pl = scale * proto_img @ names.T  # (C, C)
    eye = torch.eye(len(classes))
    proto_loss = 0.5 * (soft_nce(pl, eye) + soft_nce(pl.T, eye))

    opinion = logits0[:, classes].softmax(1)  # (B, C)
    mass = logits0.softmax(1)[:, classes].sum(1)  # how much of the opinion these classes hold
    sure = (mass * opinion.amax(1)).detach()  # (B,)
    kl = -(opinion * (scale * img @ names.T).log_softmax(1)).sum(1)
    kl = kl + (opinion * opinion.clamp(min=1e-8).log()).sum(1)
    distil = (sure * kl).sum() / sure.sum()

    t = torch.stack(teacher)  # (T + C + W, 384)
    off = torch.eye(len(t), dtype=torch.bool)
    want = (20 * t @ t.T).masked_fill(off, -1e4).softmax(1)
    have = (20 * txt @ txt.T).masked_fill(off, -1e4).log_softmax(1)
    relation = (want * (want.clamp(min=1e-9).log() - have)).sum(1).mean()

    loss = itc + args.w_proto * proto_loss + args.w_distil * distil + args.w_relation * relation
    hit = (logits.T.argmax(1) == own).float().mean().item()
    return loss, {
        "itc": itc.item(), "proto": proto_loss.item(), "distil": distil.item(),
        "relation": relation.item(), "hit": hit, "scale": scale.item(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
