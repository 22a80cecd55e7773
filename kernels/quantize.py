"""Compute quantize_fp8: one scale per tensor, row, 1x128 block or 128x128 block.

    scale = max(min(amax|x|, scale_ub), tiny) / 448,  q = e4m3(clamp(x / scale, -448, 448))

Cost per element from 16 bits: 3 bytes, and about 9 instructions (fp8.py explains how a true
division costs so few), which 132 SMs issue in half of the time that the bytes take at 4.3 TB/s. A
whole tensor is read twice: 5 bytes.

Rows and 1x128 blocks are groups of columns with one scale each. A program holds 4096 elements of
groups in registers, or one group of up to 16384. Its threads hold 16 elements each, so an SM with
1024 threads or more has 32 KB in flight. A wider row, or a whole tensor, takes two passes: amax,
then the quotients. The second pass runs backwards, since L2 holds what the first pass read last.
Not yet measured.

amax is a maximum of integers, which has no order of summation: it needs no atomics and is the same
for any grid.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, fp8
from .common import Chip, Config, Tuner
from .fp8 import amax_bits, divide_to_e4m3, row_scale, to_fp32


@triton.jit
def _group_kernel(
    q,  # [rows, COLS] e4m3 bits, contiguous
    scale,  # [rows, ceil(COLS / WIDTH)] fp32
    x,  # [rows, COLS], rows x_stride apart
    rows,
    x_stride,
    scale_ub,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns that share a scale: 128, or COLS
    BOUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least WIDTH
):
    """Quantize GROUPS groups a program; groups are numbered along a row, then down."""
    ACROSS: tl.constexpr = (COLS + WIDTH - 1) // WIDTH
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    row, left = group // ACROSS, (group % ACROSS) * WIDTH
    within = tl.arange(0, BLOCK)[None, :]
    cols = left[:, None] + within
    inside = (row < rows)[:, None] & (cols < COLS)
    if WIDTH != BLOCK:
        inside &= within < WIDTH
    v = to_fp32(tl.load(x + (row[:, None] * x_stride + cols), mask=inside, other=0.0))
    amax = amax_bits(v, 1).to(tl.float32, bitcast=True)
    group_scale = row_scale(amax, scale_ub)
    tl.store(scale + group, group_scale, mask=row < rows)
    to = row[:, None] * COLS + cols
    if BLOCK >= 8:
        to = tl.max_contiguous(to, (1, 8))  # rms_norm.py explains why
    tl.store(q + to, divide_to_e4m3(v, group_scale[:, None], BOUNDED, NATIVE), mask=inside)


@triton.jit
def _square_kernel(
    q,  # [rows, COLS] e4m3 bits, contiguous
    scale,  # [ceil(rows / 128), ceil(COLS / 128)] fp32
    x,  # [rows, COLS], rows x_stride apart
    rows,
    x_stride,
    scale_ub,
    COLS: tl.constexpr,
    BOUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Quantize one 128x128 block a program. It is read twice in strips of STRIP rows, the second
    time from L1."""
    ACROSS: tl.constexpr = (COLS + 127) // 128
    block = tl.program_id(0)
    top = (block // ACROSS).to(tl.int64) * 128
    cols = (block % ACROSS) * 128 + tl.arange(0, 128)[None, :]
    largest = tl.zeros([STRIP], tl.int32)
    for strip in range(0, 128, STRIP):
        row = top + (strip + tl.arange(0, STRIP)[:, None])
        inside = (row < rows) & (cols < COLS)
        v = tl.load(x + (row * x_stride + cols), mask=inside, other=0.0)
        largest = tl.maximum(largest, amax_bits(v, 1))
    block_scale = row_scale(tl.max(largest, axis=0).to(tl.float32, bitcast=True), scale_ub)
    tl.store(scale + block, block_scale)
    for strip in range(0, 128, STRIP):
        row = top + (strip + tl.arange(0, STRIP)[:, None])
        inside = (row < rows) & (cols < COLS)
        v = to_fp32(tl.load(x + (row * x_stride + cols), mask=inside, other=0.0))
        to = tl.max_contiguous(row * COLS + cols, (1, 8))
        tl.store(q + to, divide_to_e4m3(v, block_scale, BOUNDED, NATIVE), mask=inside)


@triton.jit
def _wide_row_kernel(
    q,  # [rows, cols] e4m3 bits, contiguous
    scale,  # [rows] fp32
    x,  # [rows, cols], rows x_stride apart
    cols,
    x_stride,
    scale_ub,
    BOUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Quantize one row a program. It is read twice in pieces, the second time backwards."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for left in tl.range(0, cols, BLOCK, num_stages=STAGES):
        at = left + within
        v = to_fp32(tl.load(x + row * x_stride + at, mask=at < cols, other=0.0))
        largest = tl.maximum(largest, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    its_scale = row_scale(tl.max(largest, axis=0).to(tl.float32, bitcast=True), scale_ub)
    tl.store(scale + row, its_scale)
    pieces = tl.cdiv(cols, BLOCK)
    for piece in tl.range(0, pieces, num_stages=STAGES):
        at = (pieces - 1 - piece) * BLOCK + within
        v = to_fp32(tl.load(x + row * x_stride + at, mask=at < cols, other=0.0))
        to = tl.max_contiguous(row * cols + at, 8)
        tl.store(q + to, divide_to_e4m3(v, its_scale, BOUNDED, NATIVE), mask=at < cols)


@triton.jit
def _load_piece(x, piece, across, cols, x_stride, BLOCK: tl.constexpr):
    """Return a piece of x as fp32 (0 beyond the last column), its row and its columns. Pieces are
    numbered along a row, then down."""
    row = tl.cast(piece // across, tl.int64)
    at = tl.cast(piece % across, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = to_fp32(tl.load(x + row * x_stride + at, mask=at < cols, other=0.0))
    return v, row, at


@triton.jit
def _amax_kernel(
    part,  # [programs] int32: the bits of each program's amax
    x,  # [rows, cols], rows x_stride apart
    pieces,
    across,  # pieces a row
    cols,
    x_stride,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    largest = tl.zeros([BLOCK], tl.int32)
    for piece in tl.range(tl.program_id(0), pieces, tl.num_programs(0), num_stages=STAGES):
        v, _, _ = _load_piece(x, piece, across, cols, x_stride, BLOCK)
        largest = tl.maximum(largest, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(part + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def _tensor_kernel(
    q,  # [rows, cols] e4m3 bits, contiguous
    scale,  # [1] fp32
    part,  # [parts] int32, as _amax_kernel left them
    x,
    pieces,
    across,
    cols,
    x_stride,
    parts,
    scale_ub,
    BOUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least parts
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i = tl.arange(0, PARTS)
    largest = tl.max(tl.load(part + i, mask=i < parts, other=0), axis=0)
    its_scale = row_scale(largest.to(tl.float32, bitcast=True), scale_ub)
    if tl.program_id(0) == 0:
        tl.store(scale, its_scale)
    for piece in tl.range(tl.program_id(0), pieces, tl.num_programs(0), num_stages=STAGES):
        v, row, at = _load_piece(x, pieces - 1 - piece, across, cols, x_stride, BLOCK)
        to = tl.max_contiguous(row * cols + at, 8)
        tl.store(q + to, divide_to_e4m3(v, its_scale, BOUNDED, NATIVE), mask=at < cols)


_WIDEST = 16384  # columns of a row that registers hold
_PIECE = 4096  # elements of a piece in the kernels that loop


def _group_configs(chip: Chip, width: int) -> list[Config]:
    """Return configurations of 16 elements a thread (two loads of 16 bytes), 32 and 8."""
    block, found = common.next_power_of_2(width), []
    for elements in (16, 32, 8):
        groups = max(1, 4096 // block)
        warps = max(1, groups * block // (chip.warp_size * elements))
        if warps * chip.warp_size <= 1024:
            found.append(Config.of(warps, 1, GROUPS=groups, BLOCK=block))
    return found


def _piece_configs(chip: Chip, itemsize: int) -> list[Config]:
    """Return configurations of 16 elements a thread, with two, one and no pieces in flight."""
    return [
        Config.of(_PIECE // 16 // chip.warp_size, 1, BLOCK=_PIECE, STAGES=stages)
        for stages in (3, 2, 1)
        if 4 * (stages - 1) * _PIECE * itemsize <= chip.shared_memory
    ]


def _square_configs(chip: Chip) -> list[Config]:
    """Return strips of 32, 64 and 16 rows, with 16 elements a thread."""
    return [Config.of(8 * strip // chip.warp_size, 1, STRIP=strip) for strip in (32, 64, 16)]


_groups = Tuner("quantize_groups", _group_configs)
_pieces = Tuner("quantize_pieces", _piece_configs)
_squares = Tuner("quantize_squares", _square_configs)


def quantize(q: Tensor, scale: Tensor, x: Tensor, granularity: str, scale_ub: float | None) -> None:
    """Fill q [rows, cols] e4m3 and scale fp32, contiguous, from x [rows, cols]. granularity:
    "tensor" (scale [1]), "row" ([rows, 1]), "block" ([rows, ceil(cols / 128)]) or "block_2d" (both
    / 128)."""
    rows, cols = x.shape
    q, bound = q.view(torch.uint8), math.inf if scale_ub is None else float(scale_ub)
    chip = common.chip_of(x)
    constants = {"BOUNDED": scale_ub is not None, "NATIVE": fp8.native(chip)}
    if granularity == "tensor":
        _quantize_tensor(q, scale, x, bound, constants)
    elif granularity == "block_2d":
        grid = (common.cdiv(rows, 128) * common.cdiv(cols, 128),)
        args = (q, scale, x, rows, x.stride(0), bound)

        def run_squares(config: Config) -> None:
            common.launch(_square_kernel, grid, *args, COLS=cols, **constants, config=config)

        run_squares(_squares.choose(x, (), run_squares))
    elif granularity == "row" and cols > _WIDEST:
        args = (q, scale, x, cols, x.stride(0), bound)
        config = _pieces.choose(x, (x.element_size(),))
        common.launch(_wide_row_kernel, (rows,), *args, **constants, config=config)
    else:
        width = cols if granularity == "row" else 128

        def run(config: Config) -> None:
            grid = (common.cdiv(rows * common.cdiv(cols, width), config["GROUPS"]),)
            args = (q, scale, x, rows, x.stride(0), bound)
            common.launch(
                _group_kernel, grid, *args, COLS=cols, WIDTH=width, **constants, config=config
            )

        run(_groups.choose(x, (width,), run))


def _quantize_tensor(
    q: Tensor, scale: Tensor, x: Tensor, bound: float, constants: dict[str, bool]
) -> None:
    """Launch the two kernels. The partial maxima between them are a few KB, allocated here."""
    rows, cols = x.shape
    if x.is_contiguous():
        rows, cols = min(1, x.numel()), x.numel()  # one long row has no ragged pieces inside
    chip, stride = common.chip_of(x), x.stride(0)

    def run(config: Config) -> None:
        across = common.cdiv(cols, config["BLOCK"])
        pieces = rows * across
        # At least one program: an empty tensor has amax 0.
        grid = (max(1, common.programs(pieces, 4 * chip.sms)),)
        part = torch.empty(grid, dtype=torch.int32, device=x.device)
        common.launch(_amax_kernel, grid, part, x, pieces, across, cols, stride, config=config)
        args = (q, scale, part, x, pieces, across, cols, stride, grid[0], bound)
        slots = common.next_power_of_2(grid[0])
        common.launch(_tensor_kernel, grid, *args, PARTS=slots, **constants, config=config)

    run(_pieces.choose(x, (x.element_size(),), run))
