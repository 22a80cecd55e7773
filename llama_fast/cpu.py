"""The cpu backend: the compiled kernels of csrc/cpu. Threads follow torch.get_num_threads()."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from . import _cpu, amx
from ._cpu import linear_int16 as linear_int16
from ._cpu import pack_weight as pack_weight

if _isa := os.environ.get("LLAMA_FAST_CPU_ISA"):
    _cpu.set_isa(_isa)
globals().update({family: getattr(_cpu, family) for family in _cpu.families})


def linear(*arguments: Any) -> None:
    """Run the compiled kernels, or oneDNN's product where amx.py measured it faster."""
    (amx.linear if amx.enabled and amx.serves(*arguments) else _cpu.linear)(*arguments)


def _switch() -> bool:
    switch = os.environ.get("LLAMA_FAST_CPU_INT16", "off")
    if switch not in ("on", "off"):
        raise ValueError(f"LLAMA_FAST_CPU_INT16: got {switch!r}, want on or off")
    return switch == "on"


int16 = _switch()
INT16_ROWS = 32  # two Zen 4 cores, 4096 x 4096: 1.2 times as fast from here on, 1.05 at 16


def rounds(rows: int) -> bool:
    """Return whether fp8_linear of that many rows runs linear_int16, which rounds x and the weight
    to 13 bits: with LLAMA_FAST_CPU_INT16=on, on AVX2. Other instruction sets stay exact: bf16
    products, where they exist, are as fast, and with AVX-512 alone int16 gains nothing."""
    if not int16 or rows < INT16_ROWS or _cpu.isa() != "avx2":
        return False
    return not torch.are_deterministic_algorithms_enabled()


def prefers_fp8_activations(x: Tensor) -> bool:
    """Return False: the weights' bytes bound the time, and quantizing x does not reduce them."""
    return False
