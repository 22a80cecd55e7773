"""The cpu backend: the compiled kernels of csrc/cpu. Threads follow torch.get_num_threads()."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cpu, amx
from .native import Native

_native = Native(_cpu, lambda _: torch.get_num_threads())
rms_norm = _native.rms_norm
silu_and_mul = _native.silu_and_mul
quantize_fp8 = _native.quantize_fp8
rope = _native.rope
attention = _native.attention
attention_with_kvcache = _native.attention_with_kvcache
compiled_linear = _native.linear


def linear(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> None:
    """Native.linear, or oneDNN's product where amx.py finds that faster."""
    if amx.enabled and amx.serves(out, x, weight, x_scale):
        amx.linear(out, x, weight, bias, x_scale, weight_scale)
    else:
        compiled_linear(out, x, weight, bias, x_scale, weight_scale)


def prefers_fp8_activations(x: Tensor) -> bool:
    """No: the weights' bandwidth is the cost here, which quantised activations do not lower."""
    return False


def pack_weight(packed: Tensor, weight: Tensor) -> None:
    n, k = weight.shape
    _cpu.pack_weight(
        weight.data_ptr(),
        packed.data_ptr(),
        n,
        k,
        weight.stride(0),
        weight.itemsize,
        torch.get_num_threads(),
    )
