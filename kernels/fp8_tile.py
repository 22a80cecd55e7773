"""Load the operands and scales of the two FP8 matrix kernels.

    out[m, n] = sum over k of x[m, k] sx[m, k] w[n, k] sw[n, k] + bias[n]

A scale by tensor or row does not vary along K and multiplies the finished sum. A scale by block has
a value for every 128 of K and multiplies their fp32 sum as it joins the total.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import common
from .common import Chip
from .fp8 import from_e4m3, to_fp32

SCALE_BLOCK: tl.constexpr = tl.constexpr(128)
E4M3 = torch.float8_e4m3fn
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# ---- on the host ----


class Spread(NamedTuple):
    """How a scale covers an operand [rows, K]: scale[row // height * step (+ k // 128)]."""

    blocks: bool  # one value for every 128 of K
    step: int  # 0: one value for all; else the scale's own columns
    height: int  # rows that share a value: 1 or 128


def spread(scale: Tensor | None, rows: int) -> Spread:
    """Return the Spread of a scale's shape: [1], [rows, 1], [rows, K / 128] or [rows / 128,
    K / 128], rounded up."""
    if scale is None or scale.numel() == 1:
        return Spread(False, 0, 1)
    height = 1 if scale.shape[0] == rows else 128
    return Spread(scale.shape[1] > 1 or height > 1, scale.shape[1], height)


def needs_promotion(chip: Chip) -> bool:
    """Return whether the chip sums e4m3 products in less than fp32: Ada and Hopper do, in about 14
    bits. Blackwell sums them in fp32, as every chip does for 16-bit operands."""
    return chip.arch in (89, 90)


def aligned(*operands: Tensor) -> bool:
    """Return whether every row starts at a multiple of 16 bytes, for TMA and 16-byte loads."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in operands)


def use_tma(chip: Chip, *operands: Tensor) -> bool:
    """Return whether tensor maps can describe all operands: aligned rows that do not overlap."""
    apart = all(t.shape[1] <= t.stride(0) < 2**40 // t.itemsize for t in operands)
    return chip.has_tma and apart and aligned(*operands)


def source(t: Tensor, rows: int, cols: int, tma: bool) -> Any:
    """Return load_tile's source: t, or its tensor map of boxes [rows, cols]."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols]) if tma else t


def raw(t: Tensor, mma: tl.dtype) -> Tensor:
    """View e4m3 as bytes, unless the matrix instruction takes it: not every chip has the type."""
    return t.view(torch.uint8) if t.dtype == E4M3 and mma != tl.float8e4nv else t


def mma_dtype(x: Tensor, chip: Chip) -> tl.dtype:
    """Return the type that the matrix instruction multiplies: e4m3 where x and the chip have it;
    for e4m3 on other chips fp16, which holds all of e4m3; else x's type. The interpreter gets fp32:
    its products of bf16 and e4m3 are wrong (it multiplies bf16's bits as integers, and takes NaN
    for 480)."""
    if common.INTERPRETED:
        return tl.float32
    if x.dtype == E4M3:
        return tl.float8e4nv if chip.has_e4m3 else tl.float16
    return DTYPES[x.dtype]


# ---- on the device ----


@triton.jit
def load_tile(
    source, row, col, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):
    """Load [ROWS, COLS] of source [rows, cols] at (row, col); zeros outside it."""
    if TMA:
        return source.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, COLS)
        pointers = source + r.to(tl.int64)[:, None] * stride + c[None, :]
        return tl.load(pointers, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)


@triton.jit
def load_scale(scale, row, block, rows, step, ROWS: tl.constexpr, HEIGHT: tl.constexpr):
    """Load the scales [ROWS] of rows row ... row + ROWS - 1 in block `block` of K; with HEIGHT 128
    the one that they share (ROWS divides 128, and row is a multiple of ROWS). Offsets have 32 bits:
    2^31 scales are an operand of 256 GB."""
    if HEIGHT == 1:
        r = row + tl.arange(0, ROWS)
        return tl.load(scale + (r * step + block), mask=r < rows, other=0.0)
    else:
        shared = tl.minimum(row, rows - 1) // HEIGHT  # a tile may start past the last row
        return tl.load(scale + (shared * step + block))


@triton.jit
def load_bias(bias, col, cols, COLS: tl.constexpr):
    """Load [COLS] as fp32."""
    c = col + tl.arange(0, COLS)
    return to_fp32(tl.load(bias + c, mask=c < cols, other=0.0))


@triton.jit
def operand(tile, MMA: tl.constexpr, NATIVE: tl.constexpr):
    """Convert a loaded tile to the matrix instruction's type."""
    if tile.dtype == MMA:
        return tile
    elif tile.dtype == tl.uint8:
        return from_e4m3(tile, NATIVE, MMA)
    else:
        return to_fp32(tile)  # only in the interpreter
