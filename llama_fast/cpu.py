"""The cpu backend: the compiled kernels of csrc/cpu. Threads follow torch.get_num_threads()."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import _cpu, amx
from ._cpu import (
    activation,
    attention,
    decode_attention,
    linear_int16,
    pack_weight,
    quantize,
    rms_norm,
    rope,
)

__all__ = [
    "activation",
    "attention",
    "decode_attention",
    "linear",
    "linear_int16",
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


def _switch() -> bool:
    switch = os.environ.get("LLAMA_FAST_CPU_INT16", "off")
    if switch not in ("on", "off"):
        raise ValueError(f"LLAMA_FAST_CPU_INT16: got {switch!r}, want on or off")
    return switch == "on"


int16 = _switch()
INT16_ROWS = 32  # two Zen 4 cores, 4096 x 4096: 1.2 times as fast from here on, 1.05 at 16


def rounds(rows: int) -> bool:
    """Return whether fp8_linear of that many rows runs linear_int16, which rounds x and the weight
    to 13 bits: under LLAMA_FAST_CPU_INT16=on, on AVX2. Other instruction sets stay exact: where
    bf16 products exist they are as fast, and with AVX-512 alone int16 gains nothing."""
    if not int16 or rows < INT16_ROWS or _cpu.isa() != "avx2":
        return False
    return not torch.are_deterministic_algorithms_enabled()


def prefers_fp8_activations(x: Tensor) -> bool:
    """Return False: the weights' bytes bound the time, and quantizing x does not reduce them."""
    return False
