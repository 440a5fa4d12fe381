"""Train the cross-attention head on the frozen encoder's patches and token states.

Each step takes groups of look-alike pictures; within a group every caption meets every picture,
and the head must find the right one in both directions (listwise), as well as say match or not
(ALBEF's ITC/ITM pair of objectives, arXiv 2107.07651).

On pictures the encoder has learned by heart, its features and its cosine are far better than on
new ones, and a head trained beside that cosine learns nothing. So features can be cross-fitted
(``--halves``): each half of the photographs is seen through an encoder that was trained without it
(train.py --without), brought into the shipped encoder's space by a linear map, and the cosine takes
part in the loss. Without ``--halves`` it does not. How much it counts is fitted on val afterwards
(fit_head.py).

The head starts aligned: queries, keys and values all begin as the encoder's own projections, so
that its first rank term is already a token-to-patch similarity.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from pathlib import Path

import torch
from mmsearch.core.types import Grid
from mmsearch.rerank.alignment import align
from mmsearch.rerank.heads import CrossHead, HeadConfig
from texts import encode_states
from torch import nn
from torch.nn import functional as F
from train import Data, Dual, Ema, half_of

GROUP = 16


class Features:
    """Everything of the frozen encoder that the head reads, in bfloat16 in memory."""

    @torch.inference_mode()
    def __init__(self, model: Dual, data: Data, views: int) -> None:
        self.train, self.val = data.fl.where("train"), data.fl.where("val")
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            self.patches = torch.stack(
                [self._patches(model, data, v, self.train) for v in range(views)]
            )  # (V, N, 49, 320)
            self.val_patches = self._patches(model, data, 0, self.val)  # (M, 49, 320)
            self.states, self.pooled = self._texts(model, data, self.train)
            self.val_states, self.val_pooled = self._texts(model, data, self.val)

    @torch.inference_mode()
    def cross_fit(self, halves: list[Dual], data: Data) -> None:
        """See each half of the training pictures through the encoder trained without it."""
        for half, other in enumerate(halves):
            spared = [n for n, picture in enumerate(self.train) if half_of(picture) == half]
            common = [n for n, picture in enumerate(self.train) if half_of(picture) != half][:1000]
            other.eval()
            with torch.autocast("cpu", torch.bfloat16):
                theirs = self._patches(other, data, 0, [self.train[n] for n in common])
                states, _ = self._texts(other, data, [self.train[n] for n in common])
                to_patch = linear_map(theirs.flatten(0, 1), self.patches[0, common].flatten(0, 1))
                to_state = linear_map(
                    torch.cat([s for per in states for s in per]),
                    torch.cat([s for n in common for s in self.states[n]]),
                )  # (384, 384)
                pictures = [self.train[n] for n in spared]
                for view in range(len(self.patches)):
                    seen = self._patches(other, data, view, pictures)  # (n, 49, 320)
                    self.patches[view, spared] = seen @ to_patch.bfloat16()
                states, _ = self._texts(other, data, pictures)
            for n, per in zip(spared, states, strict=True):
                self.states[n] = [(s.float() @ to_state).bfloat16() for s in per]

    @staticmethod
    def _patches(model: Dual, data: Data, view: int, ids: list[int]) -> torch.Tensor:
        out = torch.empty(len(ids), 49, model.img_proj.out_features, dtype=torch.bfloat16)
        for at in range(0, len(ids), 128):
            some = ids[at : at + 128]
            out[at : at + 128] = model.image(data.fl_views.get([view] * len(some), some))[1]
        return out

    @staticmethod
    def _texts(model: Dual, data: Data, ids: list[int]) -> tuple[list, torch.Tensor]:
        """Per picture a list of (T, 384) states, and the unit mean of its captions (N, 320)."""
        flat = [c for i in ids for c in data.fl_ids[i]]
        states: list = [None] * len(flat)
        for rows, s, mask in encode_states(model.bert, flat, 256):
            for row, one, m in zip(rows.tolist(), s.bfloat16(), mask.sum(1).tolist(), strict=True):
                states[row] = one[:m].clone()
        per, at, mean = [], 0, []
        for i in ids:
            per.append(states[at : at + len(data.fl_ids[i])])
            at += len(per[-1])
            mean.append(torch.stack([s.float().mean(0) for s in per[-1]]))  # (captions, 384)
        pooled = [F.normalize(model.txt_proj(m).float(), dim=-1) for m in mean]
        return per, torch.stack([F.normalize(p.mean(0), dim=0) for p in pooled])


def linear_map(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Return the ridge regression (C, C) from one encoder's features (L, C) to another's (L, C)."""
    theirs, ours = theirs.float(), ours.float()
    gram = theirs.T @ theirs  # (C, C)
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    found = torch.linalg.solve(gram + ridge, theirs.T @ ours)  # (C, C)
    left = (theirs @ found - ours).pow(2).sum() / (ours - ours.mean(0)).pow(2).sum()
    print(f"mapped into the shipped space: {1 - left:.3f} of the variance", flush=True)
    return found


def stack_states(states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states of several captions: (B, T, 384) and mask (B, T)."""
    mask = torch.zeros(len(states), max(len(s) for s in states), dtype=torch.bool)
    for row, s in zip(mask, states, strict=True):
        row[: len(s)] = True
    return nn.utils.rnn.pad_sequence(states, batch_first=True).float(), mask


class Cosine(nn.Module):
    """The coarse score as it enters the loss, with a scale of its own."""

    def __init__(self, txt_proj: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("txt_proj", txt_proj)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, said: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Mean token states (M, 384) and mean patches (M, 320) -> scaled cosines (M, M)."""
        texts = F.normalize(said @ self.txt_proj.T, dim=-1)  # (M, 320)
        return self.log_scale.exp() * texts @ F.normalize(seen, dim=-1).T  # (M, M)


def group_loss(
    head: CrossHead, features: Features, ids: list[int], alike: torch.Tensor,
    rng: random.Random, args: argparse.Namespace, cosine: Cosine | None,
) -> tuple[torch.Tensor, float]:  # fmt: skip
    """Loss and hit rate of one group of look-alikes; ids index the training pictures."""
    length = len(rng.choice(features.states[rng.choice(ids)]))
    chosen, said = [], []
    for i in ids:  # captions of one length, so that little padding is computed
        near = sorted(features.states[i], key=lambda s: abs(len(s) - length) + 3 * rng.random())
        said.append(near[0].float().mean(0))  # (384,)
        s = near[0][:28]
        keep = torch.rand(len(s)) >= args.token_drop
        chosen.append(s[keep] if keep.sum() >= 3 else s)
    tokens, mask = stack_states(chosen)  # (M, T, 384), (M, T)
    tokens = F.dropout(tokens, args.input_dropout)
    views = torch.randint(len(features.patches), (len(ids),))
    patches = features.patches[views, torch.tensor(ids)].float()  # (M, 49, 320)
    coarse = 0.0 if cosine is None else cosine(torch.stack(said), patches.mean(1))  # (M, M)
    patches = F.normalize(patches, dim=-1)
    patches = patches + args.noise * torch.randn_like(patches) * patches.shape[-1] ** -0.5
    out = head.judge(tokens, mask, patches[None])  # (M, M): text x picture
    rank, match = out.rank.float() + coarse, out.match.float()
    eye = torch.eye(len(ids))
    soft = (1 - args.soft) * eye + args.soft * (alike / 0.08).softmax(1)
    loss = -(soft * rank.log_softmax(1)).sum(1).mean() - (soft * rank.log_softmax(0)).sum(0).mean()
    positive = F.softplus(-match.diagonal()).mean()
    negative = (F.softplus(match) * (1 - eye)).sum() / (1 - eye).sum()
    hit = (rank.argmax(1) == torch.arange(len(ids))).float().mean().item()
    return 0.5 * loss + args.w_match * (positive + negative), hit


@torch.inference_mode()
def val_tables(head: CrossHead, features: Features, model: Dual, every: int) -> dict:
    """Coarse and rank terms (Q, 50) of val captions, with the column of the truth (or -1)."""
    head.eval()
    img = F.normalize(features.val_patches.float().mean(1), dim=-1)  # (N, 320)
    captions = [(s, i) for i, per in enumerate(features.val_states) for s in per][::every]
    order = sorted(range(len(captions)), key=lambda k: len(captions[k][0]))
    coarse, rank, match = (torch.empty(len(captions), 50) for _ in range(3))
    truth = torch.empty(len(captions), dtype=torch.long)
    for at in range(0, len(order), 16):
        some = order[at : at + 16]
        tokens, mask = stack_states([captions[k][0] for k in some])
        pool = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, 384)
        sim = F.normalize(model.txt_proj(pool), dim=-1) @ img.T  # (B, N)
        top = sim.topk(50)  # (B, 50)
        with torch.autocast("cpu", torch.bfloat16):
            out = head.judge(tokens, mask, features.val_patches[top.indices])
        coarse[some], rank[some], match[some] = top.values, out.rank.float(), out.match.float()
        own = torch.tensor([captions[k][1] for k in some])[:, None]
        found = (top.indices == own).float()
        truth[some] = torch.where(found.sum(1) > 0, found.argmax(1), -1)
    head.train()
    return {"coarse": coarse, "rank": rank, "match": match, "truth": truth}


def recalls(score: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """R@1, 5, 10 in percent from scores (Q, 50)."""
    own = score.gather(1, truth.clamp(min=0)[:, None])
    place = (score > own).sum(1).masked_fill(truth < 0, 99)
    return [round(100 * (place < k).float().mean().item(), 2) for k in (1, 5, 10)]


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("captions", type=Path)
    ap.add_argument("work", type=Path)
    ap.add_argument("encoder", type=Path, help="the checkpoint that export.py wrote out")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument(
        "--halves", type=Path, nargs=2, metavar=("WITHOUT_0", "WITHOUT_1"),
        help="checkpoints of encoders trained without one half each, to cross-fit features",
    )  # fmt: skip
    ap.add_argument("--self-attention", action="store_true")
    ap.add_argument("--minutes", type=float, default=22, help="the schedule's length")
    ap.add_argument("--views", type=int, default=6)
    ap.add_argument("--groups", type=int, default=8)
    ap.add_argument("--neighbours", type=int, default=60)
    ap.add_argument("--ffn-ratio", type=int, default=1)
    ap.add_argument("--lr", type=float, default=4e-4)
    ap.add_argument("--decay", type=float, default=0.1)
    ap.add_argument("--dropout", type=float, default=0.1)
    ap.add_argument("--input-dropout", type=float, default=0.1)
    ap.add_argument("--token-drop", type=float, default=0.1)
    ap.add_argument("--noise", type=float, default=0.3)
    ap.add_argument("--soft", type=float, default=0.15)
    ap.add_argument("--w-match", type=float, default=0.25)
    ap.add_argument("--eval-minutes", type=float, default=4)
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    data, model = Data(args.captions, args.work, args.seed), Dual()
    model.load_state_dict(torch.load(args.encoder, weights_only=True))
    model.requires_grad_(False)
    start = time.time()
    of = hashlib.sha256(args.encoder.read_bytes()).hexdigest()[:12]
    cache = args.work / f"features.{of}.{args.views}.pt"
    if cache.exists():
        features = torch.load(cache, weights_only=False)
    else:
        features = Features(model, data, args.views)
        torch.save(features, cache)
    cosine = None
    if args.halves:
        halves = [Dual(), Dual()]
        for each, path in zip(halves, args.halves, strict=True):
            each.load_state_dict(torch.load(path, weights_only=True))
        features.cross_fit(halves, data)
        cosine = Cosine(model.txt_proj.weight.float())
    print(f"features in {time.time() - start:.0f} s", flush=True)
    img = F.normalize(features.patches[0].float().mean(1), dim=-1)  # (N, 320)
    alike = img @ img.T + features.pooled @ features.pooled.T  # (N, N)
    if args.halves:  # look-alikes seen through the same encoder only
        half = torch.tensor([half_of(picture) for picture in features.train])  # (N,)
        alike = alike.masked_fill(half[:, None] != half, -9)  # (N, N)
    near = alike.topk(args.neighbours + 1).indices[:, 1:].tolist()
    teacher = data.init["fl.mean"][features.train]  # (N, 384)

    config = HeadConfig(
        kind="cross", text_dim=384, patch_dim=model.img_proj.out_features, grid=Grid(7, 7),
        width=256, heads=4, depth=2, ffn_ratio=args.ffn_ratio, dropout=args.dropout,
        self_attention=args.self_attention,
    )  # fmt: skip
    head = CrossHead(config)
    said = [s.float() for per in features.states[:400] for s in per]  # (T, 384) each
    means = torch.stack([s.mean(0) for s in said])  # (K, 384)
    pooled = F.normalize(model.txt_proj(means), dim=-1)  # (K, 320)
    align(head, said, pooled, features.patches[0, :1000])
    ema = Ema(head, 0.995)
    vectors = [p for p in head.parameters() if p.ndim < 2]
    if cosine is not None:
        vectors.append(cosine.log_scale)
    matrices = [p for p in head.parameters() if p.ndim >= 2]
    optim = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.decay}, {"params": vectors, "weight_decay": 0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    log = (args.out / "metrics.jsonl").open("a")
    start, step, shown, queue, hits, losses = time.time(), 0, 0.0, [], [], []
    while True:
        done = (time.time() - start) / (60 * args.minutes)
        rate = min(1.0, (step + 1) / 20) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        )
        if done >= 1 or time.time() - start - shown > 60 * args.eval_minutes or step == 0:
            spent = time.time()
            t = val_tables(ema.model, features, model, 4)
            z = t["rank"] / t["rank"].std()
            row = {
                "step": step, "minutes": round((spent - start) / 60, 1),
                "hit": round(sum(hits[-50:]) / max(len(hits[-50:]), 1), 3),
                "loss": round(sum(losses[-50:]) / max(len(losses[-50:]), 1), 3),
                "coarse": recalls(t["coarse"], t["truth"]),
                "alone": recalls(t["rank"], t["truth"]),
                "fused": {
                    w: recalls(t["coarse"] * 24 + w * z, t["truth"]) for w in (0.3, 0.6, 1.0)
                },
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            torch.save(
                {"head": ema.model.state_dict(), "config": config.to_dict()}, args.out / "head.pt"
            )
            if done >= 1:
                break
            shown = time.time() - start
        for g in optim.param_groups:
            g["lr"] = args.lr * rate
        optim.zero_grad(set_to_none=True)
        loss_sum, hit_sum = 0.0, 0.0
        for _ in range(args.groups):
            if not queue:
                queue = list(range(len(features.train)))
                rng.shuffle(queue)
            seed = queue.pop()
            ids = [seed, *rng.sample(near[seed], GROUP - 1)]
            t = teacher[ids]
            with torch.autocast("cpu", torch.bfloat16):
                loss, hit = group_loss(head, features, ids, t @ t.T, rng, args, cosine)
            (loss / args.groups).backward()
            loss_sum, hit_sum = loss_sum + loss.item(), hit_sum + hit
        nn.utils.clip_grad_norm_(head.parameters(), 2.0)
        optim.step()
        ema.update()
        step += 1
        hits.append(hit_sum / args.groups)
        losses.append(loss_sum / args.groups)
        if step % 50 == 0:
            print(json.dumps({"step": step, "s": round(time.time() - start), "hit": hits[-1],
                              "loss": losses[-1]}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
