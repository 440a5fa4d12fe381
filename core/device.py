"""Where to compute and in which precision: one rule for every model in mmsearch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def choose_device(name: str | None = None) -> torch.device:
    """Return the device called ``name``; None or "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        UsageError: the name is no device, or the device is not there.
    """
    import torch

    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"unknown device {name!r}", "Use auto, cpu, cuda, cuda:N or mps."
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is not available here", "Use --device auto or cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' is not available here", "Use --device auto or cpu.")
    return device


def choose_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Return the compute precision for a transformer on ``device``.

    "auto" takes what the hardware does fast: bf16 on CUDA (fp16 before Ampere) and on CPUs with
    AMX tiles or AVX-512 bf16 dot products, fp32 elsewhere. Whole-model bf16 is meant: on CPUs
    autocast is slower than fp32, because it converts the weights again on each call.

    Raises:
        UsageError: ``precision`` is none of PRECISIONS.
    """
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in named:
        return named[precision]
    if precision != "auto":
        raise UsageError(f"unknown precision {precision!r}", f"Use one of {', '.join(PRECISIONS)}.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions, not just conversions to fp32."""
    import torch

    capabilities = torch.backends.cpu.get_cpu_capability()
    if not capabilities.startswith("AVX512"):
        return False
    # Public names for these two probes do not exist yet; older torch lacks the second one.
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
