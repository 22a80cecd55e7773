"""bf16 products of many rows on a CPU with AMX, by oneDNN through PyTorch where that is faster.

csrc/cpu has no AMX kernels. FP8 and packed weights are decoded to bf16 in parts; e4m3 is exact in
bf16. The product is rounded to bf16, so tensor and row scales add a second rounding, up to one ulp
in all. Block scales are multiplied into the decoded weights instead, which rounds each weight. This
module has not run on a CPU with AMX: tests replace the CPU's flags and times.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _cpu, reference

# Below this many rows, as in decoding and speculation, a row's bits never depend on the batch.
LEAST_ROWS = 32
_COUNTS = (512, 256, 128, 64, LEAST_ROWS)
_FEATURES = 512  # of a weight, decoded at once: 4 MB in bf16 at K = 4096


def _has_amx() -> bool:
    probe: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and probe()


def allowed() -> bool:
    """Return whether this CPU has AMX and neither LLAMA_FAST_CPU_AMX=off nor LLAMA_FAST_CPU_ISA
    forbids it."""
    switch = os.environ.get("LLAMA_FAST_CPU_AMX", "on")
    if switch not in ("on", "off"):
        raise ValueError(f"LLAMA_FAST_CPU_AMX: got {switch!r}, want on or off")
    return switch == "on" and not os.environ.get("LLAMA_FAST_CPU_ISA") and _has_amx()


enabled = allowed()


def serves(
    out: Tensor, x: Tensor, weight: Tensor, bias: Any, x_scale: Tensor | None, *_: Any
) -> bool:
    """Return whether linear() below serves a call, given that AMX is enabled."""
    if x.shape[0] < LEAST_ROWS or out.dtype != torch.bfloat16:
        return False
    if x_scale is None:
        if x.dtype != torch.bfloat16:
            return False
    elif x.dtype != torch.float8_e4m3fn or _by_block(x_scale, x.shape[0]):
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    return x.shape[0] >= first_rows(weight.dtype, weight.dim() == 4, torch.get_num_threads())


def _by_block(scale: Tensor, rows: int) -> bool:
    return scale.numel() > 1 and scale.shape != (rows, 1)


@torch.no_grad()
def linear(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> None:
    """Compute what _cpu.linear does, for bf16 results."""
    n, k = out.shape[1], x.shape[1]
    if x_scale is not None:
        codes, x = x, x.new_empty(x.shape, dtype=torch.bfloat16)
        _cpu.decode_weight(x, codes)
    plain = weight.dim() == 2 and weight.dtype == torch.bfloat16
    step = n if plain else _FEATURES
    scratch = None if plain else x.new_empty((min(step, n), k))
    for begin in range(0, n, step):
        end = min(begin + step, n)
        part, y = weight, out[:, begin:end]
        if scratch is not None:
            packed = weight.dim() == 4
            part = weight[begin // 64 : end // 64] if packed else weight[begin:end]
            _cpu.decode_weight(scratch[: end - begin], part)
            part = scratch[: end - begin]
        if weight_scale is None:
            if bias is None:
                torch.mm(x, part.t(), out=y)
            else:
                torch.addmm(bias[begin:end], x, part.t(), out=y)
            continue
        scale = weight_scale
        if _by_block(scale, n):
            per = 1 if scale.shape[0] == n else reference.FP8_BLOCK
            blocks = scale[begin // per : -(-end // per)]
            part *= reference.spread_scale(blocks, end - begin, k)
            scale = scale.new_ones(1)
        sums = torch.mm(x, part.t()).float()
        if x_scale is not None:
            sums *= x_scale.view(-1, 1)
        sums *= scale if scale.numel() == 1 else scale[begin:end].view(1, -1)
        y.copy_(sums if bias is None else sums + bias[begin:end])


@functools.lru_cache
def first_rows(dtype: torch.dtype, packed: bool, threads: int) -> float:
    """Measure from how many rows oneDNN's product is faster than csrc/cpu's for weights of that
    dtype and layout; infinity if it never is. Takes 0.2 s on 2 cores, once a process."""
    weight = torch.randn((1024, 2048), dtype=torch.bfloat16).to(dtype)
    weight = reference.pack_weight(weight) if packed else weight
    scale = torch.ones(1, dtype=torch.float32) if dtype == torch.float8_e4m3fn else None

    def seconds(op: Callable[..., None], rows: int) -> float:
        x = torch.randn((rows, 2048), dtype=torch.bfloat16)
        out, times = x.new_empty((rows, 1024)), []
        for _ in range(3):
            start = time.perf_counter()
            op(out, x, weight, None, None, scale)
            times.append(time.perf_counter() - start)
        return min(times)

    first = math.inf
    for rows in _COUNTS:
        if seconds(linear, rows) >= seconds(_cpu.linear, rows):
            break
        first = rows
    return first


def why() -> str:
    """Return text for backends(): from how many rows oneDNN serves each kind of weight."""
    threads, parts = torch.get_num_threads(), []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float8_e4m3fn, "fp8")):
        for packed in (False, True):
            rows = first_rows(dtype, packed, threads)
            if rows < math.inf:
                parts.append(f"{rows:.0f} rows of {'packed' if packed else 'plain'} {name} weights")
    return f"; bf16 results by oneDNN (AMX) from {', '.join(parts)}" if parts else ""
