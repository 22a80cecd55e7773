"""The cpu backend: the compiled kernels of csrc/cpu. Threads follow torch.get_num_threads()."""

from __future__ import annotations

from torch import Tensor

from . import _cpu, amx
from ._cpu import activation, attention, decode_attention, pack_weight, quantize, rms_norm, rope

__all__ = [
    "activation",
    "attention",
    "decode_attention",
    "linear",
    "pack_weight",
    "prefers_fp8_activations",
    "quantize",
    "rms_norm",
    "rope",
]


def linear(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
) -> None:
    """Run the compiled kernels, or oneDNN's product where amx.py measured it faster."""
    run = amx.linear if amx.enabled and amx.serves(out, x, weight, x_scale) else _cpu.linear
    run(out, x, weight, bias, x_scale, weight_scale)


def prefers_fp8_activations(x: Tensor) -> bool:
    """Return False: the weights' bytes bound the time, and quantizing x does not reduce them."""
    return False
