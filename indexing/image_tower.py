"""Pooled vectors and patch features from any open_clip image tower, in one pass.

Patch tokens of a CLIP ViT's last layer are not aligned with text: they were never trained to be.
``aligned`` patches are, without training: for ViTs through ClearCLIP's last block (Lan et al.,
"ClearCLIP", arXiv 2407.12442: query-query attention, no residual, no feed-forward), for towers
that end in an attention pool through that pool's value path (Zhou et al., "MaskCLIP", arXiv
2112.01071), for convolutional timm towers by pooling each place as if it were the whole image.
``penultimate`` patches are the inputs of the last block, as they are.

``tiled`` makes finer patches from a larger view, whatever the tower.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..core.errors import ModelError
from ..core.types import Grid

PATCH_KINDS = ("aligned", "penultimate")

# images (N, 3, H, W) -> pooled (N, D), patches (N, P, C), grid
ImageTower = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, Grid]]


def image_tower(visual: nn.Module, patch_kind: str) -> ImageTower:
    """Wrap an open_clip ``model.visual`` so that one call gives pooled and patch features.

    Raises:
        ModelError: the tower's or the patches' kind is not known.
    """
    if patch_kind not in PATCH_KINDS:
        raise ModelError(
            f"unknown patch kind {patch_kind!r}", f"Use one of {', '.join(PATCH_KINDS)}."
        )
    kind = type(visual).__name__
    towers = {"VisionTransformer": _vit, "TimmModel": _timm, "ModifiedResNet": _resnet}
    if kind not in towers:
        raise ModelError(
            f"cannot take patch features from an image tower of type {kind}",
            f"Choose a model whose tower is one of {', '.join(towers)}.",
        )
    return towers[kind](visual, aligned=patch_kind == "aligned")


def tiled(tower: ImageTower, tiles: Grid, interpolation: str = "bicubic") -> ImageTower:
    """Take patches from the tiles of a larger view, pooled vectors from that view scaled down.

    Args:
        tower: takes images (N, 3, H, W) to patches on a grid of h x w.
        tiles: t rows of s tiles.
        interpolation: "bicubic" or "bilinear", how the view is scaled down; antialiased, as Pillow
            does it, which keeps the pooled vector nearer to the untiled one than averaging would.

    Returns:
        A tower that takes images (N, 3, t*H, s*W) to patches on a grid of t*h x s*w, in t*s + 1
        runs of ``tower`` over N images each.
    """
    if tiles == (1, 1):
        return tower

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Grid]:
        size = images.shape[2] // tiles.height, images.shape[3] // tiles.width  # H, W
        view = images.float()  # (N, 3, t*H, s*W); not every device can scale less than float32
        small = F.interpolate(view, size, mode=interpolation, antialias=True)  # (N, 3, H, W)
        pooled, _, grid = tower(small.to(images.dtype))  # (N, D)
        bands = []  # of (N, h, s*w, C)
        for band in images.chunk(tiles.height, dim=2):  # (N, 3, H, s*W)
            row = band.chunk(tiles.width, dim=3)  # (N, 3, H, W) each
            maps = [tower(tile)[1].unflatten(1, tuple(grid)) for tile in row]  # (N, h, w, C) each
            bands.append(torch.cat(maps, dim=2))
        patches = torch.cat(bands, dim=1).flatten(1, 2)  # (N, t*h * s*w, C)
        return pooled, patches, grid.refine(tiles)

    return forward


def _vit(visual, aligned: bool) -> ImageTower:
    blocks = visual.transformer.resblocks
    last = blocks[-1]

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Grid]:
        grid = Grid(
            images.shape[2] // visual.patch_size[0], images.shape[3] // visual.patch_size[1]
        )
        x = visual._embeds(images)  # (N, 1+P, w)
        for block in blocks[:-1]:
            x = block(x)  # (N, 1+P, w)
        pooled, _ = visual._pool(last(x))  # (N, w)
        if visual.proj is not None:
            pooled = pooled @ visual.proj  # (N, D)
        if not aligned:
            return pooled, x[:, 1:], grid
        y = _query_query_attention(last.attn, last.ln_1(x))  # (N, 1+P, w)
        y = y[:, 1:]  # (N, P, w)
        if visual.attn_pool is not None:
            y = _attention_pool_values(visual.attn_pool, y)  # (N, P, w')
        y = visual.ln_post(y)  # (N, P, w)
        return pooled, y @ visual.proj if visual.proj is not None else y, grid

    return forward


def _query_query_attention(attention, x: torch.Tensor) -> torch.Tensor:
    """Self-attention of x (N, T, w) in which the keys are the queries: similar patches agree."""
    heads = attention.num_heads
    w = x.shape[-1]
    bias = attention.in_proj_bias
    wq, _, wv = attention.in_proj_weight.split(w)  # (w, w) each
    bq, _, bv = bias.split(w) if bias is not None else (None, None, None)  # (w,) each
    q = F.linear(x, wq, bq).unflatten(-1, (heads, -1)).transpose(1, 2)  # (N, H, T, w/H)
    v = F.linear(x, wv, bv).unflatten(-1, (heads, -1)).transpose(1, 2)  # (N, H, T, w/H)
    mixed = F.scaled_dot_product_attention(q, q, v)  # (N, H, T, w/H)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))  # (N, T, w)


def _attention_pool_values(pool, x: torch.Tensor) -> torch.Tensor:
    """What open_clip's AttentionalPooler would return if it attended to one patch of x alone."""
    attention, x = pool.attn, pool.ln_k(x)  # (N, P, w)
    if attention.in_proj_weight is not None:
        weight = attention.in_proj_weight.chunk(3)[2]  # (w', w)
    else:
        weight = attention.v_proj_weight  # (w', w)
    return attention.out_proj(F.linear(x, weight, attention.in_proj_bias.chunk(3)[2]))  # (N, P, w')


def _timm(visual, aligned: bool) -> ImageTower:
    trunk, head = visual.trunk, visual.head

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Grid]:
        x = trunk.forward_features(images)  # (N, C, h, w) | (N, h, w, C) | (N, prefix+P, C)
        pooled = head(trunk.forward_head(x))  # (N, D)
        if x.ndim == 4:
            return _timm_map(trunk, head, x, pooled)
        prefix = getattr(trunk, "num_prefix_tokens", 0)
        patches = x[:, prefix:]  # (N, P, C)
        grid = _token_grid(trunk, images, patches.shape[1])
        if aligned:
            n, p, _ = patches.shape
            single = patches.flatten(0, 1).unsqueeze(1)  # (N*P, 1, C)
            if getattr(trunk, "global_pool", "") == "avg" and prefix:
                # average pooling skips the prefix tokens, so they must be there to be skipped
                tokens = x[:, :prefix].repeat_interleave(p, 0)  # (N*P, prefix, C)
                single = torch.cat([tokens, single], 1)  # (N*P, prefix+1, C)
            patches = head(trunk.forward_head(single)).unflatten(0, (n, p))  # (N, P, D)
        return pooled, patches, grid

    def _timm_map(trunk, head, x, pooled) -> tuple[torch.Tensor, torch.Tensor, Grid]:
        channels_last = x.shape[1] != trunk.num_features
        if not channels_last:
            x = x.permute(0, 2, 3, 1)  # (N, h, w, C)
        n, h, w, _ = x.shape
        grid = Grid(h, w)
        patches = x.flatten(1, 2)  # (N, P, C)
        if not aligned:
            return pooled, patches, grid
        single = patches.flatten(0, 1)[:, None, None, :]  # (N*P, 1, 1, C)
        if not channels_last:
            single = single.permute(0, 3, 1, 2)  # (N*P, C, 1, 1)
        pool = getattr(head, "pool", None)
        if pool is not None and hasattr(pool, "pos_embed"):
            # timm's AttentionPool2d knows one size of map only; its value path has no such limit
            values = _timm_pool_values(pool, patches)  # (N, P, D)
            rest = [part for name, part in head.named_children() if name != "pool"]
            return pooled, nn.Sequential(*rest)(values), grid
        return pooled, head(trunk.forward_head(single)).unflatten(0, (n, h * w)), grid

    return forward


def _timm_pool_values(pool, x: torch.Tensor) -> torch.Tensor:
    """The value path of timm's AttentionPool2d for each patch of x (N, P, C)."""
    if getattr(pool, "qkv", None) is not None:
        weight = pool.qkv.weight.chunk(3)[2]  # (w, C)
        bias = pool.qkv.bias.chunk(3)[2] if pool.qkv.bias is not None else None  # (w,)
    else:
        weight, bias = pool.v.weight, pool.v.bias  # (w, C), (w,)
    return pool.proj(F.linear(x, weight, bias))  # (N, P, D)


def _token_grid(trunk, images: torch.Tensor, tokens: int) -> Grid:
    patch_embed = getattr(trunk, "patch_embed", None)
    size = getattr(patch_embed, "patch_size", None)
    if size is not None:
        grid = Grid(images.shape[2] // size[0], images.shape[3] // size[1])
        if grid.size == tokens:
            return grid
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ModelError(f"cannot tell the shape of the {tokens} patches this timm tower gives")
    return Grid(side, side)


def _resnet(visual, aligned: bool) -> ImageTower:
    pool = visual.attnpool

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Grid]:
        x = visual.stem(images)  # (N, c, H/4, W/4)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)  # (N, C, h, w)
        grid = Grid(x.shape[2], x.shape[3])
        patches = x.flatten(2).transpose(1, 2)  # (N, P, C)
        if aligned:
            patches = pool.c_proj(pool.v_proj(patches))  # (N, P, D)
        return pool(x), patches, grid

    return forward
