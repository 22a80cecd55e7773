"""Compute rms_norm, add_rms_norm and their FP8 forms.

    s = x + residual                      (rounded to dtype; s = x without residual)
    n = s / sqrt(mean(s^2) + eps)         (fp32, then rounded to dtype)
    out = n * weight                      (rounded to dtype)
    FP8: scale = max(min(amax|out|, scale_ub), tiny) / 448, q = e4m3(clamp(out / scale))

Why fused: the kernel is bound by memory. Unfused, the sum, the norm and the quantization move a row
six times; here x and the residual are read once and each output is written once.

Cost per element in 16 bits: 4 bytes (norm), 8 (with residual), 7 (with residual, to FP8); about 11
instructions, 25 for FP8, which 132 SMs issue in a quarter and a half of the time that the bytes
take at 4.3 TB/s. That bandwidth at a latency of 0.8 us needs 26 KB in flight per SM.

How: one program holds a row in registers, 16 elements a thread. Programs are persistent, as many as
an SM holds, and the loop over rows is pipelined: while a row is reduced, cp.async fetches the next
one or two into shared memory, so an SM has 32 KB or more in flight (8 KB rows, 4 programs). A
program reads the weight once and keeps it in registers. Not yet measured.

Rows wider than 16384 (8192 in fp32) and what is computed from them exceed 64 registers a thread.
The second kernel goes over such a row in pieces, two or three times: the first pass reads memory,
the others L2.

The same threads reduce a row in the same order, whatever the number of rows, the strides and the
form.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, fp8
from .common import Chip, Config, Tuner
from .fp8 import amax_bits, divide_to_e4m3, round_to, row_scale, to_fp32


@triton.jit
def _rstd(sum_of_squares, eps, HIDDEN: tl.constexpr):
    """Return 1 / sqrt(mean + eps), each step rounded as IEEE 754 says, so that GPUs, CPUs and the
    interpreter agree. It is one value per row."""
    mean = tl.div_rn(sum_of_squares, HIDDEN * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _normed(s, rstd, weight, DTYPE: tl.constexpr):
    """Return round(round(s * rstd) * weight). s and weight are fp32, which holds the product of two
    16-bit values exactly."""
    return round_to(to_fp32(round_to(s * rstd, DTYPE)) * weight, DTYPE)


@triton.jit
def _rms_norm_kernel(
    out,  # [rows, HIDDEN], contiguous; uint8 for FP8
    x,  # [rows, HIDDEN], rows x_stride apart
    weight,  # [HIDDEN]
    residual,  # [rows, HIDDEN], rows residual_stride apart
    residual_out,  # [rows, HIDDEN], contiguous
    scale,  # [rows], fp32
    rows,
    x_stride,
    residual_stride,
    eps,
    scale_ub,
    HIDDEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FP8: tl.constexpr,
    BOUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    CHUNK: tl.constexpr,  # adjacent columns of a thread
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least HIDDEN
    PER_SM: tl.constexpr,  # programs per SM, for the launcher
    STAGES: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    w = to_fp32(tl.load(weight + cols, mask=cols < HIDDEN, other=0.0))[None, :]
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        inside = cols[None, :] < HIDDEN
        if ROWS > 1:
            inside = inside & (row < rows)[:, None]
        at = row.to(tl.int64)[:, None]
        # The widest access sets the row's layout, and so the order of its sum. CHUNK bounds every
        # access: otherwise the FP8 form, which stores bytes, would get 16 adjacent columns a thread
        # instead of 8, sum in another order, and exchange elements through shared memory.
        to = tl.max_contiguous(at * HIDDEN + cols[None, :], [1, CHUNK])
        x_at = tl.max_contiguous(at * x_stride + cols[None, :], [1, CHUNK])
        s = to_fp32(tl.load(x + x_at, mask=inside, other=0.0))
        if RESIDUAL:
            r_at = tl.max_contiguous(at * residual_stride + cols[None, :], [1, CHUNK])
            r = tl.load(residual + r_at, mask=inside, other=0.0)
            total = round_to(s + to_fp32(r), DTYPE)
            tl.store(residual_out + to, total, mask=inside)
            s = to_fp32(total)
        rstd = _rstd(tl.sum(s * s, axis=1), eps, HIDDEN)
        y = _normed(s, rstd[:, None], w, DTYPE)
        if FP8:
            amax = amax_bits(y, 1).to(tl.float32, bitcast=True)
            row_scales = row_scale(amax, scale_ub)
            tl.store(scale + row, row_scales, mask=row < rows)
            q = divide_to_e4m3(to_fp32(y), row_scales[:, None], BOUNDED, NATIVE)
            tl.store(out + to, q, mask=inside)
        else:
            tl.store(out + to, y, mask=inside)


@triton.jit
def _wide_kernel(
    out,  # as above
    x,
    weight,
    residual,
    residual_out,
    scale,
    rows,
    x_stride,
    residual_stride,
    eps,
    scale_ub,
    HIDDEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FP8: tl.constexpr,
    BOUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_SM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Go over a row in pieces of BLOCK columns: sum the squares, then normalize and store; for FP8
    find amax instead, then normalize again and quantize."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        s_row = x + at * x_stride
        squares = tl.zeros([BLOCK], tl.float32)
        for left in tl.range(0, HIDDEN, BLOCK, num_stages=STAGES):
            inside = left + cols < HIDDEN
            here = tl.max_contiguous(left + cols, CHUNK)  # as above
            s = to_fp32(tl.load(s_row + here, mask=inside, other=0.0))
            if RESIDUAL:
                r_row = residual + at * residual_stride
                r = to_fp32(tl.load(r_row + here, mask=inside, other=0.0))
                total = round_to(s + r, DTYPE)
                tl.store(residual_out + at * HIDDEN + here, total, mask=inside)
                s = to_fp32(total)
            squares += s * s
        rstd = _rstd(tl.sum(squares, axis=0), eps, HIDDEN)
        if RESIDUAL:
            s_row = residual_out + at * HIDDEN
            tl.debug_barrier()  # other threads of this program stored what is read next
        largest = tl.zeros([BLOCK], tl.int32)
        for left in tl.range(0, HIDDEN, BLOCK, num_stages=STAGES):
            inside = left + cols < HIDDEN
            here = tl.max_contiguous(left + cols, CHUNK)
            w = to_fp32(tl.load(weight + here, mask=inside, other=0.0))
            s = to_fp32(tl.load(s_row + here, mask=inside, other=0.0))
            y = _normed(s, rstd, w, DTYPE)
            if FP8:
                largest = tl.maximum(largest, to_fp32(y).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            else:
                tl.store(out + at * HIDDEN + here, y, mask=inside)
        if FP8:
            amax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
            its_scale = row_scale(amax, scale_ub)
            tl.store(scale + row, its_scale)
            for left in tl.range(0, HIDDEN, BLOCK, num_stages=STAGES):
                inside = left + cols < HIDDEN
                here = tl.max_contiguous(left + cols, CHUNK)
                w = to_fp32(tl.load(weight + here, mask=inside, other=0.0))
                s = to_fp32(tl.load(s_row + here, mask=inside, other=0.0))
                y = to_fp32(_normed(s, rstd, w, DTYPE))
                q = divide_to_e4m3(y, its_scale, BOUNDED, NATIVE)
                tl.store(out + at * HIDDEN + here, q, mask=inside)


_WIDE = 2**15  # bytes of a row of BLOCK columns, beyond which it is read in pieces
_SM_THREADS = 1024  # with 64 registers each


def _configs(chip: Chip, hidden: int, itemsize: int) -> list[Config]:
    """Return the configurations, the same for all four forms, so that fusing changes no bit: shared
    memory is counted for x and a residual.

    The first has 16 elements a thread: two loads of 16 bytes and under 64 registers. 32 halve the
    warps that meet at a barrier, 8 shorten each thread's work. Two rows are in flight (STAGES 3),
    or one or none where shared memory is short. Small rows are taken 512 elements at a time.

    Wide rows have one program an SM, so that the rows in progress (17 MB of 65536 columns in 16
    bits) stay in L2 for the second pass.
    """
    block, lanes = common.next_power_of_2(hidden), chip.warp_size
    if block * itemsize > _WIDE:
        return common.wide_row_configs(chip, itemsize)
    rows, found = max(1, 512 // block), []
    for elements, stages in ((16, 3), (32, 3), (8, 3), (16, 2), (16, 1)):
        warps = min(1024 // lanes, max(1, rows * block // (lanes * elements)))
        shared = (stages - 1) * 2 * rows * block * itemsize + 1024
        per_sm = min(_SM_THREADS // (lanes * warps), chip.shared_memory // shared)
        config = Config.of(warps, 1, ROWS=rows, BLOCK=block, PER_SM=per_sm, STAGES=stages)
        if per_sm and config not in found:
            found.append(config)
    return found


_tuner = Tuner("rms_norm", _configs)


def rms_norm(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    scale: Tensor | None = None,
    scale_ub: float | None = None,
) -> None:
    """Fill out [rows, hidden], contiguous, from x [rows, hidden] and weight [hidden]; with scale
    (fp32 [rows, 1]) out is e4m3. With residual (like x), write x + residual to residual_out,
    contiguous."""
    rows, hidden = x.shape
    chip = common.chip_of(x)

    def run(config: Config) -> None:
        wide = "ROWS" not in dict(config.constants)
        work = rows if wide else common.cdiv(rows, config["ROWS"])
        common.launch(
            _wide_kernel if wide else _rms_norm_kernel,
            (common.programs(work, chip.sms * config["PER_SM"]),),
            out if scale is None else out.view(torch.uint8),
            x,
            weight,
            residual,
            residual_out,
            scale,
            rows,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            float(eps),
            math.inf if scale_ub is None else float(scale_ub),
            HIDDEN=hidden,
            RESIDUAL=residual is not None,
            FP8=scale is not None,
            BOUNDED=scale_ub is not None,
            NATIVE=fp8.native(chip),
            CHUNK=math.gcd(hidden, 16 // x.element_size()),  # 16 bytes, where rows are aligned
            config=config,
        )

    run(_tuner.choose(x, (hidden, x.element_size()), run))
