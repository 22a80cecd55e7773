"""The cpu backend: the compiled kernels of csrc/cpu. Threads follow torch.get_num_threads()."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from . import _cpu, amx
from ._cpu import pack_weight as pack_weight

if _isa := os.environ.get("LLAMA_FAST_CPU_ISA"):
    _cpu.set_isa(_isa)
globals().update({family: getattr(_cpu, family) for family in _cpu.families})


def linear(*arguments: Any) -> None:
    """Run the compiled kernels, or oneDNN's product where amx.py measured it faster."""
    (amx.linear if amx.enabled and amx.serves(*arguments) else _cpu.linear)(*arguments)


def prefers_fp8_activations(x: Tensor) -> bool:
    """Return False: the weights' bytes bound the time, and quantizing x does not reduce them."""
    return False
