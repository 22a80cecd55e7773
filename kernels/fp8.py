"""Numbers: e4m3 in and out, the FP8 rule, and the roundings that Triton's interpreter gets wrong.

    scale = max(min(amax|x|, scale_ub), tiny) / 448,  q = e4m3(clamp(x / scale, -448, 448))

e4m3fn: sign, 4 exponent bits (bias 7), 3 mantissa bits; largest 448 = 0x7e, NaN 0x7f, no infinity,
smallest 2^-9. FP8 tensors come and go as uint8: every chip has that type, and so has numpy.

NATIVE (native(chip)) picks the chip's conversion instructions. Elsewhere, and in the interpreter,
whose casts to e4m3 round halves up and whose casts to bf16 cut off, integers do the same work;
both ways give the same bits but for the sign of NaN, which the instruction drops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import common
from .common import FP8_MAX, FP8_TINY, Chip

INTERPRETED: tl.constexpr = tl.constexpr(common.INTERPRETED)


def native(chip: Chip) -> bool:
    """Whether kernels compiled for the chip convert e4m3 by instruction."""
    return chip.has_e4m3 and not common.INTERPRETED


# ---- 16 and 32 bits ----


@triton.jit
def to_fp32(x):
    """bf16, fp16 or fp32 -> fp32, exactly: also for subnormals in the interpreter."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 -> bf16, fp16 or fp32, to nearest even: also in the interpreter. Stores to 16-bit
    memory go through here, or they would round by themselves."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)  # a carry would turn NaN into 0
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def fma(x, y, z):
    """x * y + z of fp32, rounded once: also in the interpreter, whose own rounds twice."""
    if INTERPRETED:
        exact = tl.cast(x, tl.float64) * tl.cast(y, tl.float64) + tl.cast(z, tl.float64)
        return exact.to(tl.float32)
    return tl.fma(x, y, z)


# ---- e4m3 ----


@triton.jit
def to_e4m3(x, NATIVE: tl.constexpr):
    """fp32 -> the uint8 bits of e4m3: to nearest even, beyond 448 (infinity too) to 448, NaN to
    NaN."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # cvt.rn.satfinite.e4m3x2.f32
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal: half an ulp less one, and one more where the kept part is odd, carry to nearest even.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 e4m3 counts in steps of 2^-9, which are the ulps of fp32 at 2^14.
    counted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = counted.to(tl.int32, bitcast=True) - 0x46800000  # the bits of 2^14
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # the bits of 2^-6
    code = tl.where(code > 0x7E, 0x7E, code)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(bits, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """The uint8 bits of e4m3 -> fp32, bf16 or fp16, all of which hold every e4m3 value."""
    if NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    code = bits.to(tl.int32)
    # The exponent and mantissa moved to fp32's place mean 2^(7 - 127) of the value, subnormals too.
    placed = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
    x = placed.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    x = tl.where((code & 0x7F) == 0x7F, float("nan"), x)
    return round_to(x, DTYPE)


# ---- the FP8 rule ----


@triton.jit
def amax_bits(x, axis: tl.constexpr):
    """The bits of max|x| along axis, as int32, of a block of bf16, fp16 or fp32: positive floats
    order as their bits do, with NaN above infinity, so an integer maximum keeps NaN where tl.max
    would drop it."""
    bits = to_fp32(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis)


@triton.jit
def row_scale(amax, scale_ub):
    """amax, scale_ub (infinity: none) -> the scale, NaN for NaN; fp32."""
    amax = tl.where(amax > scale_ub, scale_ub, amax)
    amax = tl.where(amax < FP8_TINY, FP8_TINY, amax)
    return tl.div_rn(amax, FP8_MAX)


@triton.jit
def divide_to_e4m3(x, scale, BOUNDED: tl.constexpr, NATIVE: tl.constexpr):
    """x / scale as e4m3 bits, the quotient rounded as IEEE division rounds it.

    x: block of fp32; scale: row_scale's, of a shape that broadcasts to x's and few values.
    BOUNDED: scale_ub was given, so that x may be larger than 448 scale.

    x times 1 / scale would differ from the quotient in its last bit and so, at ties, in q. A
    division an element (12 instructions and a branch) would cost more than the memory traffic.
    Markstein's theorem gets the same bits from two more fma: with r = 1 / scale rounded to nearest
    and y = x r, the remainder y scale - x is exact, and y - r (y scale - x) rounds to x / scale,
    provided nothing under- or overflows on the way. Hence the factor below, exact as well but for
    an x that comes to 0 anyway: it brings scales near fp32's smallest and largest to the middle,
    and makes an infinite one 1 and its x 0 (NaN, where infinite).
    """
    factor = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # 2^-60, 2^64
    factor = tl.where(scale > 1.152921504606846976e18, 5.421010862427522e-20, factor)  # 2^60, 2^-64
    factor = tl.where(scale == float("inf"), 0.0, factor)
    lifted = tl.where(scale == float("inf"), 1.0, scale * factor)
    reciprocal = tl.div_rn(1.0, lifted)
    x = x * factor
    if BOUNDED:
        limit = lifted * 512.0  # beyond 448, and far from overflow; q is 448 for all of it
        x = tl.where(x > limit, limit, x)
        x = tl.where(x < -limit, -limit, x)
    y = x * reciprocal
    # In this order of signs an exact zero remainder leaves the sign of y alone, -0 included.
    return to_e4m3(fma(fma(y, lifted, -x), -reciprocal, y), NATIVE)
