"""Convert e4m3, apply the FP8 rule, and correct what Triton's interpreter rounds wrong.

    scale = max(min(amax|x|, scale_ub), tiny) / 448,  q = e4m3(clamp(x / scale, -448, 448))

e4m3fn: sign, 4 exponent bits (bias 7), 3 mantissa bits; largest 448 = 0x7e, NaN 0x7f, no infinity,
smallest 2^-9. Kernels take FP8 tensors as uint8, a type that every chip and numpy have.

NATIVE (native(chip)) selects the chip's conversion instructions. Other chips use integer
arithmetic, and so does the interpreter, whose casts round halves up (e4m3) or truncate (bf16). Both
give the same bits but for the sign of NaN, which the instruction drops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import common
from .common import FP8_MAX, FP8_TINY, Chip

INTERPRETED: tl.constexpr = tl.constexpr(common.INTERPRETED)


def native(chip: Chip) -> bool:
    """Return whether kernels compiled for the chip convert e4m3 by instruction."""
    return chip.has_e4m3 and not common.INTERPRETED


# ---- 16 and 32 bits ----


@triton.jit
def to_fp32(x):
    """Widen bf16, fp16 or fp32 to fp32 exactly, in the interpreter subnormals too."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round fp32 to bf16, fp16 or fp32, to nearest even, in the interpreter too. Every store to
    16-bit memory calls this, or the store itself would round."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)  # a carry would make NaN 0
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def fma(x, y, z):
    """Return x * y + z of fp32, rounded once, in the interpreter too: its own fma rounds twice."""
    if INTERPRETED:
        exact = tl.cast(x, tl.float64) * tl.cast(y, tl.float64) + tl.cast(z, tl.float64)
        return exact.to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b in fp32, with exact products. The interpreter would multiply the bit
    patterns of bf16."""
    if INTERPRETED:
        a, b = to_fp32(a), to_fp32(b)
    return tl.dot(a, b, acc, input_precision="ieee")


# ---- e4m3 ----


@triton.jit
def to_e4m3(x, NATIVE: tl.constexpr):
    """Convert fp32 to the uint8 bits of e4m3, to nearest even. Values beyond 448 (infinity too)
    become 448, NaN stays NaN."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # cvt.rn.satfinite.e4m3x2.f32
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal: adding half an ulp less one, or half an ulp where the kept part is odd, carries to
    # nearest even.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 e4m3 has steps of 2^-9, fp32's ulp at 2^14.
    steps = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = steps.to(tl.int32, bitcast=True) - 0x46800000  # the bits of 2^14
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # the bits of 2^-6
    code = tl.where(code > 0x7E, 0x7E, code)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(bits, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """Convert the uint8 bits of e4m3 to fp32, bf16 or fp16, which hold every e4m3 value."""
    if NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    code = bits.to(tl.int32)
    # In fp32's place the exponent and mantissa mean 2^(7 - 127) of the value, subnormals too.
    placed = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
    x = placed.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    x = tl.where((code & 0x7F) == 0x7F, float("nan"), x)
    return round_to(x, DTYPE)


# ---- the FP8 rule ----


@triton.jit
def amax_bits(x, axis: tl.constexpr):
    """Return the bits of max|x| along axis, as int32, for a block of bf16, fp16 or fp32. Positive
    floats order as their bits do, with NaN above infinity, so an integer maximum keeps NaN, which
    tl.max would drop."""
    bits = to_fp32(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis)


@triton.jit
def row_scale(amax, scale_ub):
    """Return the fp32 scale for amax and scale_ub (infinity: none); NaN for NaN."""
    amax = tl.where(amax > scale_ub, scale_ub, amax)
    amax = tl.where(amax < FP8_TINY, FP8_TINY, amax)
    return tl.div_rn(amax, FP8_MAX)


@triton.jit
def divide_to_e4m3(x, scale, BOUNDED: tl.constexpr, NATIVE: tl.constexpr):
    """Return x / scale as e4m3 bits, the quotient rounded as IEEE division rounds it.

    x: a block of fp32; scale: row_scale's, of few values, broadcast to x's shape. BOUNDED: scale_ub
    was given, so x may exceed 448 scale.

    x times 1 / scale would differ from the quotient in the last bit and so, at ties, in q. A
    division for each element (12 instructions and a branch) would cost more than the memory
    traffic. By Markstein's theorem two more fma give the same bits: with r = 1 / scale rounded to
    nearest and y = x r, the remainder y scale - x is exact, and y - r (y scale - x) rounds to
    x / scale, provided that nothing under- or overflows. Hence the factor below: it moves scales
    near fp32's smallest and largest to the middle, exactly except for an x whose q is 0 anyway, and
    replaces an infinite scale by 1 and its x by 0 (NaN, where infinite).
    """
    factor = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # 2^-60, 2^64
    factor = tl.where(scale > 1.152921504606846976e18, 5.421010862427522e-20, factor)  # 2^60, 2^-64
    factor = tl.where(scale == float("inf"), 0.0, factor)
    lifted = tl.where(scale == float("inf"), 1.0, scale * factor)
    reciprocal = tl.div_rn(1.0, lifted)
    x = x * factor
    if BOUNDED:
        limit = lifted * 512.0  # far from overflow; q is 448 for every quotient beyond 448
        x = tl.where(x > limit, limit, x)
        x = tl.where(x < -limit, -limit, x)
    y = x * reciprocal
    # With this order of signs a zero remainder keeps the sign of y, -0 included.
    return to_e4m3(fma(fma(y, lifted, -x), -reciprocal, y), NATIVE)
