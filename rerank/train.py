"""Train a head on captioned pictures of an index.

A step takes one group of K pictures that look alike to the coarse stage, one caption each, and
judges all K x K pairs. The right caption must win among the captions and the right picture among
the pictures (listwise loss, both directions), the match logit must tell pairs from non-pairs, and
each picture must prefer its caption to one broken by a rule.

Groups are drawn anew each epoch around the captions of that epoch, from a pool of neighbours that
narrows as training goes. Weights are averaged over steps, and the average is what is validated.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import InputError, ModelError
from ..core.writing import write_whole
from .alignment import NARROWEST, align
from .checkpoint import Calibration, Fusion, HeadCard, save_head
from .dataset import TrainingSet
from .fitting import Fit, Judged, calibrate, fit_fusion, paired_p, spread_scale
from .heads import CrossHead, Head, HeadConfig, build_head
from .scorers import HeadScorer

if TYPE_CHECKING:
    from ..indexing.encoder import EncoderSpec

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
# What a checkpoint holds of a run besides weights and optimiser.
PROGRESS = ("epoch", "stale", "steps", "best_value", "best", "history")
CONTEXT_SAMPLE = 512  # pictures whose patches set the head's starting point
ALIGN_SAMPLE = 4096  # and captions
QUERIES_AT_ONCE = 64
STEPS_UNREAD = 20  # reading the loss makes the host wait for the device


@dataclass(frozen=True)
class TrainOptions:
    """How to train; docs/rerank.md says what the options are worth."""

    kind: str = "cross"
    width: int = 256
    heads: int = 4
    depth: int = 2
    dropout: float = 0.1
    self_attention: bool = True  # kind "cross": tokens attend to each other
    align: bool = True  # kind "cross": start from the encoder's contrastive space
    epochs: int = 12
    group: int = 16  # K, pictures judged together
    pool: int = 96  # nearest pictures a group is drawn from, at first
    pool_end: int = 32  # and at the end
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    averaging: float = 0.995  # decay of the weight average
    match_weight: float = 0.5  # of telling pairs from non-pairs, captions made wrong included
    text_negatives: bool = True
    coarse_in_loss: bool | None = None  # None: unless the encoder has seen the training pictures
    patience: int = 4  # epochs without a better validation before stopping
    candidates: int = 50  # N of the validation
    val_queries: int = 1000  # of each epoch; the last validation takes all
    seed: int = 0


@dataclass(frozen=True)
class StepDone:
    """A step of training."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float  # mean of this epoch's steps up to the last of which it was read


@dataclass(frozen=True)
class EpochDone:
    """An epoch and its validation; percentages of queries over the val pictures."""

    epoch: int
    epochs: int
    loss: float
    r1: float
    coarse_r1: float
    best: bool
    seconds: float


Event = StepDone | EpochDone


@dataclass(frozen=True)
class Outcome:
    """A trained head and whether it earns its place."""

    head: Head
    card: HeadCard
    history: list[dict[str, Any]]

    @property
    def beats_coarse(self) -> bool:
        """Better recall at 1 on val than the coarse order, and not by chance (p < 0.05)."""
        figures = self.card.figures
        return figures["r1"] > figures["r1_coarse"] and figures["p"] < 0.05


def train_head(
    data: TrainingSet,
    encoder: EncoderSpec,
    options: TrainOptions,
    folder: Path,
    *,
    name: str,
    device: torch.device,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Outcome:
    """Train until the validation stops getting better, and write the head to ``folder``.

    Args:
        data: from ``build_training_set``.
        encoder: what the features come from.
        options: see TrainOptions.
        folder: gets head.safetensors, config.json, metrics.jsonl and checkpoint.pt.
        name: what the head will be called.
        device: where to train.
        resume: go on from the folder's checkpoint, to the same result as without the break.
        on_event: called after each step and each epoch.

    Raises:
        ModelError: there is no checkpoint to resume, it cannot be read, or it is of other options,
            captions or pictures.
        InputError: the loss is not a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen = _seen_by_encoder(data)
    with_coarse = not seen if options.coarse_in_loss is None else options.coarse_in_loss
    run = _Run(data, encoder, options, device, with_coarse)
    if resume:
        run.load(folder / CHECKPOINT)
    _write_metrics(folder, run.history)
    while run.epoch < options.epochs and run.stale < options.patience:
        run.one_epoch(on_event)
        run.save(folder / CHECKPOINT)
        _write_metrics(folder, run.history)
    head = build_head(run.config)
    head.load_state_dict(run.best)
    outcome = _finish(head.eval(), data, encoder, options, name, device, run.history)
    save_head(folder, outcome.head, outcome.card, data.bank(options.seed))
    return outcome


class _Run:
    """The state of a training run: everything a checkpoint holds."""

    def __init__(
        self,
        data: TrainingSet,
        encoder: EncoderSpec,
        options: TrainOptions,
        device: torch.device,
        with_coarse: bool,
    ) -> None:
        self.data, self.options, self.device = data, options, device
        self.with_coarse = with_coarse
        self.material = {  # besides the options, what decides which weights come out
            "weights_hash": encoder.weights_hash,
            "patch_kind": encoder.patch_kind,
            "grid": list(data.grid),
            "captions": data.fingerprint(),
            "with_coarse": with_coarse,
        }
        self.config = HeadConfig(
            options.kind,
            encoder.text_dim,
            encoder.patch_dim,
            data.grid,
            options.width,
            options.heads,
            options.depth,
            dropout=options.dropout,
            self_attention=options.self_attention and options.kind == "cross",
        )
        torch.manual_seed(options.seed)
        self.head = build_head(self.config)
        self._start(encoder)
        self.head.to(device)
        self.average = copy.deepcopy(self.head).eval().requires_grad_(False)
        self.log_scale = nn.Parameter(torch.tensor(3.0, device=device))  # of the cosine
        # Places and distances decay like weights: what training does not use goes.
        decayed = [each for each in self.head.parameters() if each.ndim > 1]
        others = [each for each in self.head.parameters() if each.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": options.weight_decay},
                {"params": [*others, self.log_scale], "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.98),
        )
        self.epoch, self.stale, self.steps = 0, 0, 0
        self.best_value = -1.0
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.by_picture = [
            rows.tolist()
            for rows in np.split(
                np.argsort(data.owner, kind="stable"),
                np.cumsum(np.bincount(data.owner, minlength=len(data.pooled)))[:-1],
            )
        ]

    def _start(self, encoder: EncoderSpec) -> None:
        """Start from the contrastive space where the patches lie in it, else from white patches."""
        data, width = self.data, self.config.width
        draw = np.random.default_rng(self.options.seed).permutation
        patches = data.codes[draw(data.train)[:CONTEXT_SAMPLE]]  # (M, P, C)
        in_space = encoder.patch_kind == "aligned" and encoder.patch_dim == encoder.embed_dim
        wide = width >= NARROWEST and width % 2 == 0
        if isinstance(self.head, CrossHead) and in_space and wide and self.options.align:
            rows = draw(data.captions_of(data.train))[:ALIGN_SAMPLE]
            tokens = [data.captions.tokens[row].float() for row in rows]
            align(self.head, tokens, data.captions.pooled[rows], patches)
        else:
            self.head.fit_context(patches)

    def one_epoch(self, on_event: Callable[[Event], None] | None) -> None:
        """Train one epoch and validate; a run broken off between epochs goes on the same."""
        start = time.perf_counter()
        loss = self._train(on_event)
        self.epoch += 1
        fit = self._validate()
        r1, coarse_r1 = 100 * fit.hits[:, 0].mean(), 100 * fit.coarse_hits[:, 0].mean()
        value = float(100 * (fit.hits @ np.array([1.0, 0.5, 0.25])).mean())
        better = value > self.best_value
        if better:
            self.best_value, self.stale = value, 0
            state = self.average.state_dict()
            self.best = {key: tensor.cpu().clone() for key, tensor in state.items()}
        else:
            self.stale += 1
        seconds = time.perf_counter() - start
        row = {
            "epoch": self.epoch,
            "loss": round(loss, 5),
            "r1": round(float(r1), 3),
            "r5": round(100 * float(fit.hits[:, 1].mean()), 3),
            "r10": round(100 * float(fit.hits[:, 2].mean()), 3),
            "r1_coarse": round(float(coarse_r1), 3),
            "weight": fit.weight,
        }
        self.history.append(row)
        if on_event:
            told = (loss, float(r1), float(coarse_r1), better, seconds)
            on_event(EpochDone(self.epoch, self.options.epochs, *told))

    def _train(self, on_event: Callable[[Event], None] | None) -> float:
        """Take the steps of one epoch and return their mean loss.

        Raises:
            InputError: a loss was not a number; at most STEPS_UNREAD steps later.
        """
        options = self.options
        rng = random.Random(f"{options.seed}-{self.epoch}")
        torch.manual_seed(options.seed * 1000 + self.epoch)
        groups = list(self._groups(rng))
        total, mean = torch.zeros((), device=self.device), 0.0
        self.head.train()
        for at, captions in enumerate(groups):
            done = (self.epoch + at / len(groups)) / options.epochs
            for part in self.optimiser.param_groups:
                part["lr"] = options.learning_rate * _schedule(self.steps, done)
            total += self._step(captions)
            if at % STEPS_UNREAD == 0 or at + 1 == len(groups):
                mean = _read_mean(total, at + 1)
            if on_event:
                on_event(StepDone(self.epoch, options.epochs, at + 1, len(groups), mean))
        return mean

    def _groups(self, rng: random.Random) -> Iterator[list[int]]:
        """Yield groups of K captions of K pictures that are near each other."""
        options, data = self.options, self.data
        train = data.train
        said = [rng.choice(self.by_picture[picture]) for picture in train]  # one caption a picture
        pooled = data.pooled[train]  # (m, D)
        progress = self.epoch / max(options.epochs - 1, 1)
        pool = round(options.pool + (options.pool_end - options.pool) * progress)
        size = min(options.group, len(train))
        pool = min(max(pool, size - 1), len(train) - 1)
        anchors = rng.sample(range(len(train)), -(-len(train) // size))
        for chunk in (anchors[at : at + 256] for at in range(0, len(anchors), 256)):
            words = data.captions.pooled[[said[at] for at in chunk]]  # (B, D)
            # Near the caption, as at query time, and near its picture: where the coarse stage is
            # weak, only the latter finds the look-alikes.
            both = words + pooled[chunk]  # (B, D)
            near = (both @ pooled.T).topk(pool + 1, dim=1).indices.tolist()  # (B, pool + 1)
            for anchor, row in zip(chunk, near, strict=True):
                others = [at for at in row if at != anchor][:pool]
                yield [said[at] for at in [anchor, *rng.sample(others, size - 1)]]

    def _step(self, captions: list[int]) -> Tensor:
        """One group, one step of the optimiser; return the loss (), still on the device."""
        loss = self._loss(captions)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimiser.step()
        self.steps += 1
        decay = min(self.options.averaging, self.steps / (self.steps + 10))
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), self.head.parameters(), strict=True):
                ours.lerp_(theirs, 1 - decay)
        return loss.detach()

    def _loss(self, captions: list[int]) -> Tensor:
        """Judge one group and return its loss, (); nothing here waits for the device."""
        data, device = self.data, self.device
        pictures = data.owner[captions]
        tokens, mask = data.captions.batch(captions)  # (K, T, C_text), (K, T)
        codes = _send(data.codes[pictures], device)  # (K, P, C)
        cosine = _send(data.captions.pooled[captions] @ data.pooled[pictures].T, device)  # (K, K)
        texts = [data.captions.texts[row] for row in captions]
        # Two pictures with the very same caption are not each other's negatives.
        same = torch.tensor([[a == b for b in texts] for a in texts]).fill_diagonal_(False)
        same = _send(same, device)  # (K, K)
        broken = data.wrong_of[captions]  # (K,)
        has = np.flatnonzero(broken >= 0)  # (k,)
        dtype = torch.bfloat16 if device.type == "cuda" or _fast_bf16() else torch.float32
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = self.head.judge(_send(tokens, device), _send(mask, device), codes.unsqueeze(0))
            rank, match = output.rank.float(), output.match.float()  # (K, K): text, picture
            wrong_rank = rank.new_full((len(captions), 1), -torch.inf)  # (K, 1)
            of_wrong = rank.new_zeros(())
            if len(has):
                said, there = data.wrong.batch(broken[has].tolist())  # (k, T, C_text), (k, T)
                rows = _send(torch.from_numpy(has), device)  # (k,)
                wrong = self.head(_send(said, device), _send(there, device), codes[rows])
                wrong_rank[rows, 0] = wrong.rank.float()
                of_wrong = functional.softplus(wrong.match.float()).mean()
        if self.with_coarse:
            scale = self.log_scale.exp()
            rank = rank + scale * cosine  # (K, K)
            own = cosine.diagonal().unsqueeze(1)  # (K, 1), as if the wrong text were it
            wrong_rank = wrong_rank + scale * own  # (K, 1)
        rank = rank.masked_fill(same, -torch.inf)  # (K, K)
        target = torch.arange(len(captions), device=device)  # (K,)
        by_text = functional.cross_entropy(rank, target)
        by_picture = functional.cross_entropy(torch.cat([rank.T, wrong_rank], dim=1), target)
        matched = _match_loss(match, same) + 0.5 * of_wrong
        return 0.5 * (by_text + by_picture) + self.options.match_weight * matched

    def _validate(self) -> Fit:
        return fit_fusion(
            judge_val(self.average, self.data, self.options, self.device, self.options.val_queries)
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint in one move."""
        state = {
            "options": asdict(self.options),
            "material": self.material,
            "head": self.head.state_dict(),
            "average": self.average.state_dict(),
            "log_scale": self.log_scale.detach(),
            "optimiser": self.optimiser.state_dict(),
            **{field: getattr(self, field) for field in PROGRESS},
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Go back to where a checkpoint was written.

        Raises:
            ModelError: there is none, it cannot be read, or it is of another run.
        """
        folder = path.parent
        state = _read_checkpoint(path)
        try:
            self._check(state, folder)
            self._restore(state, folder)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _unreadable(folder, error) from error

    def _check(self, state: dict[str, Any], folder: Path) -> None:
        """Refuse a checkpoint that other options or other captions led to.

        Raises:
            ModelError: they did.
        """
        # More epochs may be asked for, but the rest decides what the weights mean.
        if replace(TrainOptions(**state["options"]), epochs=0) != replace(self.options, epochs=0):
            raise ModelError(
                f"the checkpoint in {folder} was made with other options",
                "Give the same options, or start without --resume.",
            )
        if state["material"] != self.material:
            raise ModelError(
                f"captions, split or index changed since the checkpoint in {folder} was made",
                "Give the same captions, index and --val-share, or start without --resume.",
            )

    def _restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take over what a checkpoint holds.

        Raises:
            ModelError: its weights are not of this head.
        """
        try:
            self.head.load_state_dict(state["head"])
            self.average.load_state_dict(state["average"])
        except RuntimeError as error:
            raise ModelError(
                f"the checkpoint in {folder} is of a head that this version builds otherwise",
                "Start without --resume.",
            ) from error
        self.log_scale.data.copy_(state["log_scale"])
        self.optimiser.load_state_dict(state["optimiser"])
        for field in PROGRESS:
            setattr(self, field, state[field])


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU: there AdamW keeps its step counts, which it reads each step.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(
            f"no checkpoint to resume in {path.parent}", "Start without --resume."
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise _unreadable(path.parent, error) from error


def _unreadable(folder: Path, error: Exception) -> ModelError:
    # The first sentence: torch goes on with advice, such as to load it without weights_only.
    reason = str(error).partition("\n")[0].partition(". ")[0]
    said = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return ModelError(
        f"the checkpoint in {folder} cannot be read: {said}",
        "Start without --resume.",
    )


def _write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write the epochs so far, one a line: those of the checkpoint, wherever a run broke off."""
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_whole(folder / METRICS, lines.encode())


def judge_val(
    head: Head, data: TrainingSet, options: TrainOptions, device: torch.device, limit: int | None
) -> Judged:
    """Let a head judge the coarse candidates of val captions among the val pictures.

    Args:
        head: in evaluation mode.
        data: gives pictures and captions.
        options: how many candidates.
        device: where to judge.
        limit: at most this many captions, spread evenly; None takes all.
    """
    queries = data.captions_of(data.val)  # (Q,)
    if limit is not None and len(queries) > limit:
        queries = queries[np.linspace(0, len(queries) - 1, limit).round().astype(int)]
    gallery = data.pooled[data.val]  # (V, D)
    cosine = data.captions.pooled[queries] @ gallery.T  # (Q, V)
    top = cosine.topk(min(options.candidates, len(data.val)), dim=1)  # (Q, N) twice
    scorer = HeadScorer(copy.deepcopy(head), HeadCard("", "", "", Fusion(0.0)), device)
    codes = data.codes[data.val].to(device)  # (V, P, C), once for all queries
    ranks, matches = [], []
    for at in range(0, len(queries), QUERIES_AT_ONCE):
        text = data.captions.features(queries[at : at + QUERIES_AT_ONCE].tolist())
        rank, match = scorer.judge(text, codes, top.indices[at : at + QUERIES_AT_ONCE])
        ranks.append(rank)
        matches.append(match)
    own = torch.from_numpy(np.searchsorted(data.val, data.owner[queries]))  # (Q,)
    relevant = top.indices == own.unsqueeze(1)  # (Q, N)
    scale = spread_scale(top.values)
    popularity = data.bank(options.seed).popularity(gallery, scale)[top.indices]  # (Q, N)
    return Judged(
        scale, top.values, popularity, torch.cat(ranks), torch.cat(matches), relevant, own.numpy()
    )


def _finish(
    head: Head,
    data: TrainingSet,
    encoder: EncoderSpec,
    options: TrainOptions,
    name: str,
    device: torch.device,
    history: list[dict[str, Any]],
) -> Outcome:
    """Fit fusion and calibration on all val captions and write down what was measured."""
    judged = judge_val(head, data, options, device, None)
    fit = fit_fusion(judged)
    fused = fit.fused(judged)  # (Q, N)
    calibration: Calibration = calibrate(judged, fused)
    figures = {"pictures": float(len(data.val)), "queries": float(len(judged.rank))}
    for column, k in enumerate((1, 5, 10)):
        figures[f"r{k}_coarse"] = round(100 * float(fit.coarse_hits[:, column].mean()), 2)
        figures[f"r{k}_bank"] = round(100 * float(fit.bank_hits[:, column].mean()), 2)
        figures[f"r{k}"] = round(100 * float(fit.hits[:, column].mean()), 2)
    figures["p"] = paired_p(fit.hits[:, 0], fit.coarse_hits[:, 0], judged.picture, options.seed)
    added = float((fused - judged.scale * judged.coarse).mean())
    fusion = Fusion(judged.scale, fit.weight, fit.popularity_weight, added)
    card = HeadCard(name, encoder.weights_hash, encoder.patch_kind, fusion, calibration, figures)
    return Outcome(head.cpu(), card, history)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: pinned memory lets CUDA overlap the copy with its work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _read_mean(total: Tensor, steps: int) -> float:
    """Return the mean loss of some steps from their sum (), in which one bad loss shows for good.

    Raises:
        InputError: it is not a number.
    """
    mean = float(total) / steps
    if not math.isfinite(mean):
        raise InputError(
            "training diverged: the loss is not a number", "Try a lower --learning-rate."
        )
    return mean


def _match_loss(match: Tensor, same: Tensor) -> Tensor:
    """Binary cross-entropy of (K, K) logits; pairs and non-pairs weigh the same in all.

    By masks: to pick logits, the host would have to wait for the device to say how many.
    """
    others = ~(torch.eye(len(match), dtype=torch.bool, device=match.device) | same)  # (K, K)
    apart = (functional.softplus(match) * others).sum() / others.sum().clamp_min(1)
    return functional.softplus(-match.diagonal()).mean() + apart


def _schedule(step: int, done: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Share of the learning rate: linear warm-up, then a cosine down to a floor."""
    cosine = 0.5 * (1 + float(np.cos(np.pi * min(done, 1.0))))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


def _seen_by_encoder(data: TrainingSet) -> bool:
    """Whether the encoder was trained on the training pictures: it then knows them far better.

    Its coarse scores would teach the head to trust them more than it may at query time.
    """

    def recall(pictures: np.ndarray) -> float:
        captions = data.captions_of(pictures)[:2000]
        cosine = data.captions.pooled[captions] @ data.pooled[pictures].T  # (Q, V)
        best = pictures[cosine.argmax(dim=1).numpy()]  # (Q,)
        return float((best == data.owner[captions]).mean())

    size = min(len(data.train), len(data.val))
    some = np.random.default_rng(0).permutation(data.train)[:size]
    fewer = np.random.default_rng(0).permutation(data.val)[:size]
    return recall(np.sort(some)) > recall(np.sort(fewer)) + 0.1


def _fast_bf16() -> bool:
    from ..core.device import choose_dtype

    return choose_dtype(torch.device("cpu")) == torch.bfloat16
