"""Compute x @ weight^T with FP8 weights for few rows, reading the weight once.

    out[m, n] = sum over k of x[m, k] sx[m, k] w[n, k] sw[n, k] + bias[n]

x [M, K] e4m3, bf16, fp16 or fp32; weight [N, K] e4m3; out [M, N]. It also serves 16-bit activations
and chips that cannot multiply e4m3, at any M.

Cost for M <= 64: N K bytes of weight, 2 M N K FLOP. A 14336 x 4096 weight is 59 MB, 14 us at
4.2 TB/s; the FLOP are 4 us of H200's tensor cores at M = 64. So the weight's bytes decide, and the
kernel keeps enough of them in flight: 1.2 us of latency at 4.2 TB/s is 5 MB, 40 KB an SM; the
stages of an SM's one or two programs hold 64 KB or more.

- The weight is the left operand, with 64 features or more on the tensor core's M, and x^T the right
  one: one row of x then costs a product 8 or 16 wide, not 64 padded rows.
- Where there are fewer tiles of features than SMs, K is split over programs. They write fp32 sums,
  which a second kernel adds from first to last. Atomic adds would save that launch, but their order
  varies.
- The number of splits, the blocks of K and their order depend on N, K and the chip, never on M: a
  row gives the same bits alone and among 64. Beyond 64 rows nothing is split, so the last bits
  differ.
- For 16-bit activations e4m3 is converted to x's dtype exactly, in registers, between shared memory
  and the tensor core. At full bandwidth an SM gets 18 values a clock; two take a thread two to four
  instructions, and an SM issues 128: a third of them at most.
- On Ada and Hopper the sum of every 128 of K of e4m3 products joins an fp32 total (linear.py
  explains why). fp32 products, which are chains of fma, join it every 32: over K = 4096 a single
  chain is several times as far from fp64 as a blocked product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import Chip, Config, Tuner, cdiv
from .fp8 import native, round_to
from .fp8_tile import (
    E4M3,
    SCALE_BLOCK,
    aligned,
    load_bias,
    load_scale,
    load_tile,
    mma_dtype,
    needs_promotion,
    operand,
    raw,
    source,
    spread,
    use_tma,
)

MOST_ROWS = 64  # the largest M that is "few"


@triton.jit
def _stream(
    out,  # [M, N], or fp32 [SPLITS, M, N]
    x,  # [M, K]; it and weight: pointers or tensor maps
    weight,  # [N, K] e4m3
    bias,  # [N] or None
    x_scale,  # None, [1], [M, 1], [M, K / 128]
    weight_scale,  # [1], [N, 1], [N, K / 128], [N / 128, K / 128]
    M,
    N,
    K,
    x_stride,
    weight_stride,
    x_step,
    w_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides 128
    SPLITS: tl.constexpr,
    X_BLOCKS: tl.constexpr,
    W_BLOCKS: tl.constexpr,
    W_HEIGHT: tl.constexpr,
    PROMOTE: tl.constexpr,
    MMA: tl.constexpr,
    NATIVE: tl.constexpr,
    TMA: tl.constexpr,
):
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) % m_tiles * BLOCK_M  # neighbors share the weight
    n = tl.program_id(0) // m_tiles % n_tiles * BLOCK_N
    split = tl.program_id(0) // (m_tiles * n_tiles)
    blocks = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(blocks, SPLITS)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(split * each, tl.minimum(blocks, (split + 1) * each)):
        k = block * BLOCK_K
        w = load_tile(weight, n, k, N, K, weight_stride, BLOCK_N, BLOCK_K, TMA)
        a = load_tile(x, m, k, M, K, x_stride, BLOCK_M, BLOCK_K, TMA)
        w = operand(w, MMA, NATIVE)
        a = operand(a, MMA, NATIVE)
        if PROMOTE:
            partial = tl.dot(w, a.T, input_precision="ieee")
            if W_BLOCKS:
                sw = load_scale(weight_scale, n, k // SCALE_BLOCK, N, w_step, BLOCK_N, W_HEIGHT)
                if W_HEIGHT == 1:
                    partial *= sw[:, None]
                else:
                    partial *= sw
            if X_BLOCKS:
                partial *= load_scale(x_scale, m, k // SCALE_BLOCK, M, x_step, BLOCK_M, 1)[None, :]
            total += partial
        else:
            total = tl.dot(w, a.T, total, input_precision="ieee")
    if SPLITS == 1:
        if x_scale is not None and not X_BLOCKS:
            total *= load_scale(x_scale, m, 0, M, x_step, BLOCK_M, 1)[None, :]
        if not W_BLOCKS:
            total *= load_scale(weight_scale, n, 0, N, w_step, BLOCK_N, 1)[:, None]
        if bias is not None:
            total += load_bias(bias, n, N, BLOCK_N)[:, None]
    r = m + tl.arange(0, BLOCK_M)
    c = n + tl.arange(0, BLOCK_N)
    pointers = out + (split.to(tl.int64) * M + r)[None, :] * N + c[:, None]
    rounded = round_to(total, out.dtype.element_ty)
    tl.store(pointers, rounded, mask=(r < M)[None, :] & (c < N)[:, None])


@triton.jit
def _add_splits(
    out,  # [M, N]
    partial,  # fp32 [SPLITS, M, N]
    bias,
    x_scale,
    weight_scale,
    M,
    N,
    x_step,
    w_step,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    X_BLOCKS: tl.constexpr,
    W_BLOCKS: tl.constexpr,
):
    """Add the splits of a row's BLOCK features, from first to last; then scale, add the bias and
    round, as _stream does without splits."""
    chunks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    n = tl.program_id(0) % chunks * BLOCK
    c = n + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + (split * M + row) * N + c, mask=c < N, other=0.0)
    if x_scale is not None and not X_BLOCKS:
        total *= tl.load(x_scale + row * x_step)
    if not W_BLOCKS:
        total *= load_scale(weight_scale, n, 0, N, w_step, BLOCK, 1)
    if bias is not None:
        total += load_bias(bias, n, N, BLOCK)
    tl.store(out + row * N + c, round_to(total, out.dtype.element_ty), mask=c < N)


# ---- configurations ----


def _splits(chip: Chip, n: int, k: int, block_n: int) -> int:
    """Return how many splits give each SM a program of at least 4 blocks of 128, enough to fill its
    pipeline. One where two thirds of the SMs have work, which suffices for full bandwidth."""
    tiles = cdiv(n, block_n)
    if 3 * tiles >= 2 * chip.sms:
        return 1
    return max(1, min(chip.sms // tiles, cdiv(k, 128) // 4, 16))


def _configs(chip: Chip, few: bool, n: int, k: int, x_bytes: int, fits: bool) -> list[Config]:
    """Return the configurations. few: M <= MOST_ROWS. x_bytes: 4 for fp32, whose products have no
    tensor core. fits: 16-byte loads fit the rows. Tiles that are loaded byte by byte, or multiplied
    without tensor cores, are in registers: 32 of K at a time."""
    rows, depth = most_rows(few, x_bytes, fits), 128
    if x_bytes == 4 or not fits:
        # On sm_100 Triton multiplies 64 rows of fp32 as tf32, whatever input_precision says.
        tiles, depth = [(32 if x_bytes == 4 and chip.arch == 100 else 64, 4, 4)], 32
    elif few and x_bytes == 2 and chip.has_tma:
        # 16-bit x: wgmma takes decoded weights from registers; wider tiles would wait for them.
        tiles = [(64, 4, 8)]
    elif few and chip.has_tma:
        tiles = [
            (128, 4, 6),  # 16 KB of weight a stage
            (64, 4, 8),  # more tiles, so fewer splits
            (128, 8, 6),  # half the registers a thread
        ]
    elif few:  # mma.sync and mfma take both operands from registers
        tiles = [(64, 4, 8), (128, 8, 6)]
    else:
        tiles, depth = [(128, 8, 4)], 128 if chip.has_tma else 64
    offered = []
    for block_n, warps, most_stages in tiles:
        splits = _splits(chip, n, k, block_n) if few else 1
        # With more programs than SMs two share an SM, so that one loads while the other ends.
        budget = chip.shared_memory - 1024
        if not few or cdiv(n, block_n) * splits > chip.sms:
            budget //= 2
        stages = budget // ((block_n + rows * x_bytes) * depth)
        if not chip.has_tma:
            stages += 1  # the one that is being multiplied is in registers
        if chip.backend == "hip":
            stages = 2  # staged through registers
        stages = max(2, min(most_stages, stages))
        offered.append(Config.of(warps, stages, BLOCK_N=block_n, BLOCK_K=depth, SPLITS=splits))
    # Fewest splits first: each costs workspace traffic.
    return sorted(offered, key=lambda config: config["SPLITS"])


def most_rows(few: bool, x_bytes: int, fits: bool) -> int:
    """Return the largest BLOCK_M of a class of M."""
    if x_bytes == 4:
        return 32
    return MOST_ROWS if few or not fits else 128


_tuner = Tuner("fp8_stream", _configs)

# ---- launcher ----


def stream(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    weight_scale: Tensor,
) -> None:
    """Do what linear.linear() describes, with this file's kernels."""
    chip = common.chip_of(out)
    (m, k), n = x.shape, weight.shape[0]
    few = m <= MOST_ROWS
    sx, sw = spread(x_scale, m), spread(weight_scale, n)
    mma = mma_dtype(x, chip)
    x_raw, weight_raw = raw(x, mma), raw(weight, mma)
    tma = use_tma(chip, x, weight)
    fits = aligned(x, weight)
    # BLOCK_M: the narrowest that holds the rows; it changes no bit.
    rows = next(b for b in (16, 32, 64, 128) if b >= min(m, most_rows(few, x.itemsize, fits)))
    options = {"matrix_instr_nonkdim": 16} if chip.backend == "hip" else {}  # at any BLOCK_M

    def run(config: Config) -> None:
        splits, cols, depth = config["SPLITS"], config["BLOCK_N"], config["BLOCK_K"]
        target = out if splits == 1 else out.new_empty((splits, m, n), dtype=torch.float32)
        common.launch(
            _stream,
            (cdiv(m, rows) * cdiv(n, cols) * splits,),
            target,
            source(x_raw, rows, depth, tma),
            source(weight_raw, cols, depth, tma),
            bias,
            x_scale,
            weight_scale,
            m,
            n,
            k,
            x.stride(0),
            weight.stride(0),
            sx.step,
            sw.step,
            config=config,
            BLOCK_M=rows,
            X_BLOCKS=sx.blocks,
            W_BLOCKS=sw.blocks,
            W_HEIGHT=sw.height,
            PROMOTE=sx.blocks
            or sw.blocks
            or x.itemsize == 4
            or (x.dtype == E4M3 and needs_promotion(chip)),
            MMA=mma,
            NATIVE=native(chip) and not (chip.arch == 89 and mma == tl.bfloat16),  # no such cvt
            TMA=tma,
            **options,
        )
        if splits > 1:
            common.launch(
                _add_splits,
                (m * cdiv(n, 512),),
                out,
                target,
                bias,
                x_scale,
                weight_scale,
                m,
                n,
                sx.step,
                sw.step,
                config=Config.of(128 // chip.warp_size, 1, BLOCK=512, SPLITS=splits),
                X_BLOCKS=sx.blocks,
                W_BLOCKS=sw.blocks,
            )

    run(_tuner.choose(out, (few, n, k, x.itemsize, fits), run))
