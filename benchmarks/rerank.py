"""What the second stage costs: our forms of attention against torch's and against recomputation.

    python benchmarks/rerank.py                    # all shapes, CPU
    python benchmarks/rerank.py --device cuda
    python benchmarks/rerank.py --candidates 100 --patches 49 --tokens 8   # the bundled model
    python benchmarks/rerank.py --attention        # one attention, without the rest of a head

Each line judges N candidates of one text with a head of the bundled one's shape: two blocks, text
states of width 256, four heads, patches of width 320 in int8. ``torch`` swaps in
nn.MultiheadAttention with the same weights over patches widened and placed as it needs them;
``chosen`` is what a query runs; ``shared`` and ``co`` are the other kinds of head, for which
nothing can be computed before the query is known; ``as trained`` is the larger head that
``mmsearch train`` makes. The floor counts multiplications of the cheaper exact form, over the
patches read, at the machine's measured matrix speed and bytes at the speed it copies with,
whichever takes longer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from mmsearch.core.types import Grid
from mmsearch.rerank.attention import (
    Context,
    CrossAttention,
    absorption_is_cheaper,
    normalising_gain,
)
from mmsearch.rerank.checkpoint import read_card
from mmsearch.rerank.heads import CrossBlock, CrossHead, HeadConfig, build_head
from mmsearch.rerank.scorers import SHIPPED, pictures_at_once
from mmsearch.rerank.sparse import Hierarchical, Local
from torch import nn

BUNDLED, _ = read_card(SHIPPED / "cross")
C_TEXT, C, WIDTH, HEADS = BUNDLED.text_dim, BUNDLED.patch_dim, BUNDLED.width, BUNDLED.heads
GRIDS = {49: Grid(7, 7), 196: Grid(14, 14), 576: Grid(24, 24)}


def timed(work: Callable[[], object], device: torch.device, least: float) -> float:
    """Median seconds of one call."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: list[float] = []
    work()
    wait()
    while sum(times) < least or len(times) < 5:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def torch_attention(ours: CrossAttention) -> nn.MultiheadAttention:
    """PyTorch's attention with the same weights."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, kdim=C, vdim=C, batch_first=True)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    for name, layer in zip("qkv", projections, strict=True):
        getattr(theirs, f"{name}_proj_weight").data.copy_(layer.weight)
    theirs.in_proj_bias.data.copy_(torch.cat([layer.bias for layer in projections]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return theirs.eval()


class TorchHead(nn.Module):
    """The same head through nn.MultiheadAttention."""

    def __init__(self, head: CrossHead) -> None:
        super().__init__()
        self.head = head
        self.attentions = nn.ModuleList()
        for block in head.blocks:
            self.attentions.append(torch_attention(block.attention))

    def judge(self, tokens: torch.Tensor, mask: torch.Tensor, codes: torch.Tensor):
        values = self.head.context(tokens, mask, codes).values()[0]  # (N, P, C)
        states = self.head.embed(tokens)[0].expand(len(values), -1, -1)  # (N, T, W)
        for block, attention in zip(self.head.blocks, self.attentions, strict=True):
            assert block.words is None
            query = block.attention_norm(states)
            states = states + attention(query, values, values, need_weights=False)[0]
            states = states + block.ffn(block.ffn_norm(states))
        return self.head.read(states.unsqueeze(0), mask)


class OneForm(CrossAttention):
    """Our attention, held to one of its two forms."""

    absorb = True

    def forward(self, states: torch.Tensor, context: Context) -> torch.Tensor:
        return (self.absorbed if self.absorb else self.projected)(states, context)


def hold(head: CrossHead, absorb: bool) -> CrossHead:
    """A copy of a head that uses one form only."""
    other = CrossHead(head.config).eval()
    other.load_state_dict(head.state_dict())
    for block in other.blocks:
        assert isinstance(block, CrossBlock)
        block.attention.__class__ = OneForm
        block.attention.absorb = absorb
    return other


def operations(tokens: int, patches: int, config: HeadConfig) -> float:
    """Multiplications for one pair, the cheaper form, feed-forward included."""
    absorb = absorption_is_cheaper(tokens, patches, C, WIDTH, HEADS)
    if absorb:
        attention = 2 * tokens * C * WIDTH + 2 * tokens * patches * (HEADS * C + WIDTH)
    else:
        attention = 2 * patches * C * WIDTH + 2 * tokens * patches * WIDTH
    rest = tokens * WIDTH * WIDTH * (2 + 3 * config.ffn_ratio)  # q, out; gated feed-forward
    return config.depth * (attention + rest)


class Speed(NamedTuple):
    """What the floor is counted by."""

    multiplications: float  # of a matrix product, a second
    copied: float  # bytes a second
    encoding: float  # seconds to encode a picture again


def machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured multiplications a second of a matrix product, and bytes a second of a copy."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    flops = side**3 / timed(lambda: a @ a, device, 0.3)
    data = torch.ones(1 << 26, dtype=torch.int8, device=device)
    return flops, data.numel() / timed(lambda: data.clone(), device, 0.3)


def encoder_seconds(device: str) -> float:
    """Seconds a picture to encode it again with the bundled encoder."""
    import numpy as np
    from mmsearch.indexing.encoder import load_encoder

    encoder = load_encoder("bundled", device=device)
    pixels = np.random.default_rng(0).integers(0, 255, (16, *encoder.spec.input_size, 3), np.uint8)
    return timed(lambda: encoder.encode_images(pixels), encoder.device, 1.0) / 16


@torch.inference_mode()
def judge_in_pieces(module, tokens, mask, codes: torch.Tensor, room: int) -> None:
    """Judge candidates as the scorer does: as many at once as fit the cache."""
    for at in range(0, codes.shape[1], room):
        module.judge(tokens, mask, codes[:, at : at + room])


@torch.inference_mode()
def attend_in_pieces(attend, states: torch.Tensor, codes: torch.Tensor, place, room: int) -> None:
    """One attention over the candidates' codes (1, N, P, C) from states (1, N, T, W)."""
    for at in range(0, codes.shape[1], room):
        some = codes[:, at : at + room].to(states.dtype)  # (1, n, P, C)
        attend(states[:, at : at + room], Context(some, normalising_gain(some), place))


def compare_attention(
    n: int, p: int, t: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> None:
    """Print a line for each form of one attention, without what is around it in a head."""
    torch.manual_seed(0)
    ours = CrossAttention(WIDTH, C, HEADS).eval().to(device, dtype)
    theirs = torch_attention(ours).to(device, dtype)

    def by_torch(states: torch.Tensor, context: Context) -> torch.Tensor:
        values = context.values()[0]  # (n, P, C)
        return theirs(states[0], values, values, need_weights=False)[0]  # (n, T, W)

    codes = torch.randint(-127, 128, (1, n, p, C), dtype=torch.int8, device=device)
    states = torch.randn(1, n, t, WIDTH, device=device, dtype=dtype)
    place = torch.randn(p, C, device=device, dtype=dtype)
    room = pictures_at_once(device, p * C)
    base = None
    for name, form in (
        ("torch", by_torch), ("projected", ours.projected), ("absorbed", ours.absorbed),
    ):  # fmt: skip
        work = functools.partial(attend_in_pieces, form, states, codes, place, room)
        took = timed(work, device, seconds)
        base = base or took
        print(
            f"| {n} | {p} | {t} | {name} | {took * 1e3:.1f} | {n / took:.0f} | {base / took:.2f} |",
            flush=True,
        )


def compare_heads(
    n: int, p: int, t: int, speed: Speed, device: torch.device, dtype: torch.dtype, least: float
) -> None:
    """Print a line for each form of a whole head."""
    torch.manual_seed(0)
    config = replace(BUNDLED, grid=GRIDS[p])
    head = CrossHead(config).eval()
    codes = torch.randint(-127, 128, (1, n, p, C), dtype=torch.int8, device=device)
    tokens = torch.randn(1, t, C_TEXT, device=device, dtype=dtype)
    mask = torch.ones(1, t, dtype=torch.bool, device=device)
    forms: dict[str, nn.Module] = {
        "torch": TorchHead(head),
        "projected": hold(head, absorb=False),
        "absorbed": hold(head, absorb=True),
        "chosen": head,
    }
    if p > 49:
        for name, rule in (("local", Local()), ("hierarchical", Hierarchical())):
            part = CrossHead(config).eval()
            part.load_state_dict(head.state_dict())
            part.selection = rule
            forms[name] = part
    for kind in ("shared", "co"):  # other heads of the same width and depth
        forms[kind] = build_head(replace(config, kind=kind)).eval()
    trained = HeadConfig("cross", C_TEXT, C, GRIDS[p], self_attention=True)
    forms["as trained"] = build_head(trained).eval()
    base = 0.0
    for name, module in forms.items():
        module.to(device, dtype)
        inner = module.head if isinstance(module, TorchHead) else module
        read = inner.patches_read()
        computed = n * operations(t, read, inner.config) / speed.multiplications
        floor = max(computed, n * read * C / speed.copied)
        room = pictures_at_once(device, read * C)
        work = functools.partial(judge_in_pieces, module, tokens, mask, codes, room)
        seconds = timed(work, device, least)
        base = base or seconds
        print(
            f"| {n} | {p} | {t} | {name} | {seconds * 1e3:.1f} | {n / seconds:.0f} | "
            f"{base / seconds:.2f} | {n * read * C / 1e6:.1f} | {floor * 1e3:.1f} | "
            f"{seconds / floor:.1f} |",
            flush=True,
        )
    again = speed.encoding
    print(
        f"| {n} | {p} | {t} | encode again (bundled) | {again * n * 1e3:.0f} | "
        f"{1 / again:.0f} | {base / (again * n):.2f} | | | |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time a measurement")
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--patches", type=int, nargs="+", choices=GRIDS, default=[*GRIDS])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 77])
    parser.add_argument("--attention", action="store_true", help="one attention, not a whole head")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = itertools.product(args.candidates, args.patches, args.tokens)
    if args.attention:
        print("| N | P | T | one attention | ms a query | pairs/s | x torch |")
        print("|--|--|--|--|--|--|--|")
        for shape in shapes:
            compare_attention(*shape, device, dtype, args.seconds)
        return
    speed = Speed(*machine(device, dtype), encoder_seconds(args.device))
    print(f"{device}, {dtype}, {speed.multiplications / 1e9:.0f} GMAC/s, "
          f"{speed.copied / 1e9:.1f} GB/s; encoding a picture again "
          f"{speed.encoding * 1e3:.1f} ms")  # fmt: skip
    print("| N | P | T | form | ms a query | pairs/s | x torch | MB read | floor, ms | x floor |")
    print("|--|--|--|--|--|--|--|--|--|--|")
    for shape in shapes:
        compare_heads(*shape, speed, device, dtype, args.seconds)


if __name__ == "__main__":
    main()
