"""Compute silu_and_mul, the middle of SwiGLU, and its FP8 form.

    s = gate / (1 + e^-gate)     (fp32, then rounded to dtype)
    out = s * up                 (rounded to dtype)
    FP8: scale = max(min(amax|out|, scale_ub), tiny) / 448, q = e4m3(clamp(out / scale))

Why fused: unfused, the activation, the product and the quantization move an element of out 5 times
in 16 bits; here gate and up are read once and out is written once.

Cost per element of out, in 16 bits: 6 bytes, 5 to FP8; an exponential and a division, about 22
instructions (33 to FP8), which 132 SMs issue in half (to FP8: all) of the time that the bytes take
at 4.3 TB/s.

Elements are independent unless a row shares a scale. So the plain form cuts rows into tiles of 2048
columns, which divides the width of every Llama (14336, 28672, 53248), one tile a program: 16
programs an SM, each with 4 KB or more in flight, are twice what that bandwidth needs. To FP8, a
persistent program holds a row of up to 16384 in registers, 16 elements a thread, while the next two
rows arrive in shared memory. Wider rows are read in pieces, twice, the second time from L2. Not yet
measured.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, fp8
from .common import LOG2E, Chip, Config, Tuner
from .fp8 import amax_bits, divide_to_e4m3, fma, round_to, row_scale, to_fp32

LOG2E_REST: tl.constexpr = tl.constexpr(1.925963033500211e-08)  # log2(e) minus its fp32 value
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp(x):
    """Return e^x to 3 ulp, Inf and 0 beyond fp32's range. tl.exp computes 2^(x log2(e)), where the
    rounding of the product costs |x| / 2 ulp. The fma recovers the rounding error, which is applied
    to first order as a factor near 1: as a sum it could give Inf - Inf."""
    x = tl.minimum(tl.maximum(x, -128.0), 128.0)  # finite, and beyond the range on both sides
    product = x * LOG2E
    lost = fma(x, LOG2E, -product) + x * LOG2E_REST
    return tl.exp2(product) * fma(lost, LN2, 1.0)


@triton.jit
def _silu_and_mul(gate, up, DTYPE: tl.constexpr):
    """Return out in DTYPE, from blocks as loaded. -Inf gives NaN (-Inf / Inf), as in torch."""
    g = to_fp32(gate)
    s = round_to(g / (1.0 + _exp(-g)), DTYPE)
    return round_to(to_fp32(s) * to_fp32(up), DTYPE)


@triton.jit
def _tile_kernel(
    out,  # [rows, WIDTH], contiguous
    gate_up,  # [rows, 2 WIDTH], rows stride apart
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACROSS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    tile = tl.program_id(0)
    row = (tile // ACROSS).to(tl.int64)
    cols = (tile % ACROSS) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    gate = tl.load(gate_up + row * stride + cols, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + WIDTH + cols, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + cols, _silu_and_mul(gate, up, gate.dtype), mask=inside)


@triton.jit
def _row_fp8_kernel(
    out,  # [rows, WIDTH] e4m3 bits, contiguous
    scale,  # [rows] fp32
    gate_up,  # [rows, 2 WIDTH], rows stride apart
    rows,
    stride,
    scale_ub,
    WIDTH: tl.constexpr,
    BOUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least WIDTH
    PER_SM: tl.constexpr,  # programs per SM, for the launcher
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)[None, :]
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = cols < WIDTH
        if ROWS > 1:
            inside = inside & (row < rows)[:, None]
        at = row[:, None] * stride + cols
        gate = tl.load(gate_up + at, mask=inside, other=0.0)
        up = tl.load(gate_up + (at + WIDTH), mask=inside, other=0.0)
        y = _silu_and_mul(gate, up, gate.dtype)
        row_scales = row_scale(amax_bits(y, 1).to(tl.float32, bitcast=True), scale_ub)
        tl.store(scale + row, row_scales, mask=row < rows)
        q = divide_to_e4m3(to_fp32(y), row_scales[:, None], BOUNDED, NATIVE)
        to = row[:, None] * WIDTH + cols
        if BLOCK >= 8:
            to = tl.max_contiguous(to, (1, 8))  # rms_norm.py explains why
        tl.store(out + to, q, mask=inside)


@triton.jit
def _wide_fp8_kernel(
    out,  # as above
    scale,
    gate_up,
    rows,
    stride,
    scale_ub,
    WIDTH: tl.constexpr,
    BOUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_SM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Go over a row twice in pieces of BLOCK columns: find amax, then quantize."""
    within = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * stride
        largest = tl.zeros([BLOCK], tl.int32)
        for left in tl.range(0, WIDTH, BLOCK, num_stages=STAGES):
            cols = left + within
            gate = tl.load(gate_up + at + cols, mask=cols < WIDTH, other=0.0)
            up = tl.load(gate_up + at + WIDTH + cols, mask=cols < WIDTH, other=0.0)
            y = to_fp32(_silu_and_mul(gate, up, gate.dtype))
            largest = tl.maximum(largest, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        its_scale = row_scale(tl.max(largest, axis=0).to(tl.float32, bitcast=True), scale_ub)
        tl.store(scale + row, its_scale)
        for left in tl.range(0, WIDTH, BLOCK, num_stages=STAGES):
            cols = left + within
            gate = tl.load(gate_up + at + cols, mask=cols < WIDTH, other=0.0)
            up = tl.load(gate_up + at + WIDTH + cols, mask=cols < WIDTH, other=0.0)
            y = to_fp32(_silu_and_mul(gate, up, gate.dtype))
            to = tl.max_contiguous(tl.cast(row, tl.int64) * WIDTH + cols, 8)
            tl.store(out + to, divide_to_e4m3(y, its_scale, BOUNDED, NATIVE), mask=cols < WIDTH)


def _tile_configs(chip: Chip) -> list[Config]:
    """Return tiles of 16 elements a thread (two 16-byte loads each of gate and up), 8 and 32."""
    lanes = chip.warp_size
    sizes = ((2048, 128), (1024, 128), (2048, 64), (4096, 128))
    return [Config.of(threads // lanes, 1, BLOCK=block) for block, threads in sizes]


_WIDEST = 16384  # columns of out that a program's registers hold
_SM_THREADS = 1024


def _fp8_configs(chip: Chip, width: int, itemsize: int) -> list[Config]:
    """Return configurations as for rms_norm: 16 elements a thread, two rows of gate and up in
    flight, or one or none where shared memory is short; then 32 elements a thread. Wide rows have
    one program an SM, so that the rows in progress (28 MB for 405B's 53248 in 16 bits) stay in L2
    for the second pass."""
    block, lanes, found = common.next_power_of_2(width), chip.warp_size, []
    if width > _WIDEST:
        return common.wide_row_configs(chip, itemsize)
    rows = max(1, 512 // block)
    for elements, stages in ((16, 3), (16, 2), (32, 3), (32, 2), (16, 1), (32, 1)):
        warps = max(1, rows * block // (lanes * elements))
        shared = (stages - 1) * 2 * rows * block * itemsize + 1024
        per_sm = min(_SM_THREADS // (lanes * warps), chip.shared_memory // shared)
        config = Config.of(warps, 1, ROWS=rows, BLOCK=block, PER_SM=per_sm, STAGES=stages)
        # 64 lanes with 32 elements each of the widest row spill on CDNA.
        spills = chip.backend == "hip" and block >= 16384 and elements > 16
        if per_sm and not spills and config not in found:
            found.append(config)
    return found


_tiles = Tuner("silu_and_mul", _tile_configs)
_rows = Tuner("silu_and_mul_fp8", _fp8_configs)


def activation(
    out: Tensor, gate_up: Tensor, scale: Tensor | None = None, scale_ub: float | None = None
) -> None:
    """Fill out [rows, width], contiguous, from gate_up [rows, 2 width], gate first; with scale
    (fp32 [rows, 1]) out is e4m3."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    chip, stride = common.chip_of(gate_up), gate_up.stride(0)

    def run_tiles(config: Config) -> None:
        grid = (rows * common.cdiv(width, config["BLOCK"]),)
        common.launch(_tile_kernel, grid, out, gate_up, stride, WIDTH=width, config=config)

    def run_rows(config: Config) -> None:
        wide = width > _WIDEST
        work = rows if wide else common.cdiv(rows, config["ROWS"])
        common.launch(
            _wide_fp8_kernel if wide else _row_fp8_kernel,
            (common.programs(work, chip.sms * config["PER_SM"]),),
            out.view(torch.uint8),
            scale,
            gate_up,
            rows,
            stride,
            math.inf if scale_ub is None else float(scale_ub),
            WIDTH=width,
            BOUNDED=scale_ub is not None,
            NATIVE=fp8.native(chip),
            config=config,
        )

    if scale is None:
        run_tiles(_tiles.choose(gate_up, (), run_tiles))
    else:
        run_rows(_rows.choose(gate_up, (width, gate_up.element_size()), run_rows))
