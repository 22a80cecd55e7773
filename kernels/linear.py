"""Compute fp8_gemm and fp8_linear, x @ weight^T with FP8 weights; this kernel is for many rows.

    out[m, n] = sum over k of x[m, k] sx[m, k] w[n, k] sw[n, k] + bias[n]

x [M, K] and weight [N, K] e4m3, out [M, N]. linear() sends up to 64 rows, 16-bit activations, rows
that are not 16-byte aligned and chips that cannot multiply e4m3 to fp8_stream.py. That kernel adds
in another order, so a row's last bits may differ between M <= 64 and M > 64, and nowhere else.

Cost: 2 M N K FLOP, M K + N K + 2 M N bytes. At 8192^3 the FLOP take 556 us at 1,979 TFLOP/s (H200's
e4m3 peak), the bytes 63 us: tensor cores bound it, if operands arrive in time. For that:

- Persistent programs, one for each SM, take tile after tile, so only the last round leaves SMs
  idle. GROUP_M rows of tiles are walked column by column, so that the tiles in flight share their
  operands in the L2 cache.
- TMA copies tiles into shared memory, num_stages deep, without registers or address arithmetic.
- The tile is 128 x 256: (128 + 256) * 128 bytes from L2 for 2 * 128 * 256 * 128 FLOP, 5.9 TB/s at
  1,000 TFLOP/s. 128 x 128 would need 7.8; it is for problems with few tiles.
- Hopper and Ada sum e4m3 products with about 14 bits and truncate the rest. So the tensor cores
  start from zero every 128 of K, and their partial sum joins an fp32 total ("promotion"); scales by
  block are applied in the same fma. The total and the partial sum of a 128 x 256 tile would take
  256 registers a thread, all there are. So the tile is two halves of 128 columns, which have a
  total each and share one partial sum; while one warpgroup adds, the other multiplies. The error of
  summing all of K in the tensor core ("fast accumulation") grows with K: nearly 2 % at K = 4096 in
  DeepSeek-V3's report (arXiv:2412.19437), against 2^-12 here.

Triton's warp specialization is not used: on sm_90 it is new in 3.6, and unmeasured here. Beyond 64
rows every configuration adds in the same order, so neither it nor M changes a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import Chip, Config, Tuner, cdiv, next_power_of_2, programs
from .fp8 import INTERPRETED, round_to
from .fp8_stream import MOST_ROWS, stream
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

HALF: tl.constexpr = tl.constexpr(128)


@triton.jit
def _add_here(total, partial, factor):
    """Return total + partial * factor. LLVM would move an ordinary expression past the next half's
    product, so that both partial sums were live at once, and 128 registers would spill."""
    if INTERPRETED:
        return total + partial * factor
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;",
            "=f,f,f,f",
            [partial, factor, total],
            dtype=tl.float32,
            is_pure=False,  # keeps it in place
            pack=1,
        )


@triton.jit
def _add_product(
    total,
    a,
    sx,
    weight,
    weight_scale,
    n,
    block,
    N,
    K,
    weight_stride,
    w_step,
    X_BLOCKS: tl.constexpr,
    W_BLOCKS: tl.constexpr,
    W_HEIGHT: tl.constexpr,
    PROMOTE: tl.constexpr,
    MMA: tl.constexpr,
    TMA: tl.constexpr,
):
    """Return total [BLOCK_M, HALF] plus the product of a [BLOCK_M, 128] and HALF features from n
    on, both in block `block` of K. sx [BLOCK_M]: a's scales, where they are by block."""
    if W_BLOCKS:  # first, so that it arrives while the product runs
        sw = load_scale(weight_scale, n, block, N, w_step, HALF, W_HEIGHT)
    b = load_tile(weight, n, block * SCALE_BLOCK, N, K, weight_stride, HALF, SCALE_BLOCK, TMA)
    b = operand(b, MMA, False)
    if PROMOTE:
        partial = tl.dot(a, b.T, input_precision="ieee")
        if W_BLOCKS and W_HEIGHT == 1:
            partial *= sw[None, :]
        if W_BLOCKS and W_HEIGHT > 1:
            if X_BLOCKS:
                return _add_here(total, partial, (sx * sw)[:, None])
            else:
                return _add_here(total, partial, sw)
        elif X_BLOCKS:
            return _add_here(total, partial, sx[:, None])
        else:
            return _add_here(total, partial, 1.0)
    else:
        return tl.dot(a, b.T, total, input_precision="ieee")


@triton.jit
def _store(
    out,
    total,
    m,
    n,
    M,
    N,
    bias,
    x_scale,
    x_step,
    weight_scale,
    w_step,
    BLOCK_M: tl.constexpr,
    X_BLOCKS: tl.constexpr,
    W_BLOCKS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Apply scales that do not vary along K and the bias, round once, and store."""
    if not X_BLOCKS:
        total *= load_scale(x_scale, m, 0, M, x_step, BLOCK_M, 1)[:, None]
    if not W_BLOCKS:
        total *= load_scale(weight_scale, n, 0, N, w_step, HALF, 1)[None, :]
    if bias is not None:
        total += load_bias(bias, n, N, HALF)[None, :]
    if TMA:
        out.store([m, n], round_to(total, out.dtype))
    else:
        r = m + tl.arange(0, BLOCK_M)
        c = n + tl.arange(0, HALF)
        pointers = out + r.to(tl.int64)[:, None] * N + c[None, :]
        rounded = round_to(total, out.dtype.element_ty)
        tl.store(pointers, rounded, mask=(r < M)[:, None] & (c < N)[None, :])


@triton.jit
def _gemm(
    out,  # [M, N]; it, x and weight: pointers or tensor maps
    x,  # [M, K] e4m3
    weight,  # [N, K] e4m3
    bias,  # [N] or None
    x_scale,  # [1], [M, 1], [M, K / 128]
    weight_scale,  # [1], [N, 1], [N, K / 128], [N / 128, K / 128]
    M,
    N,
    K,
    x_stride,
    weight_stride,
    x_step,
    w_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # HALF or 2 HALF
    GROUP_M: tl.constexpr,
    X_BLOCKS: tl.constexpr,
    W_BLOCKS: tl.constexpr,
    W_HEIGHT: tl.constexpr,
    PROMOTE: tl.constexpr,
    MMA: tl.constexpr,
    TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    # fmt: off
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        first = tile // (GROUP_M * n_tiles) * GROUP_M
        group = tl.minimum(m_tiles - first, GROUP_M)
        m = (first + tile % (GROUP_M * n_tiles) % group) * BLOCK_M
        n = tile % (GROUP_M * n_tiles) // group * BLOCK_N
        left = tl.zeros((BLOCK_M, HALF), tl.float32)
        right = tl.zeros((BLOCK_M, HALF), tl.float32)
        for block in tl.range(0, tl.cdiv(K, SCALE_BLOCK)):
            sx = 1.0
            if X_BLOCKS:
                sx = load_scale(x_scale, m, block, M, x_step, BLOCK_M, 1)
            k = block * SCALE_BLOCK
            a = operand(load_tile(x, m, k, M, K, x_stride, BLOCK_M, SCALE_BLOCK, TMA), MMA, False)
            left = _add_product(
                left, a, sx, weight, weight_scale, n, block, N, K, weight_stride, w_step,
                X_BLOCKS, W_BLOCKS, W_HEIGHT, PROMOTE, MMA, TMA,
            )
            if BLOCK_N > HALF:
                right = _add_product(
                    right, a, sx, weight, weight_scale, n + HALF, block, N, K, weight_stride,
                    w_step, X_BLOCKS, W_BLOCKS, W_HEIGHT, PROMOTE, MMA, TMA,
                )
        _store(
            out, left, m, n, M, N, bias, x_scale, x_step, weight_scale, w_step,
            BLOCK_M, X_BLOCKS, W_BLOCKS, TMA_STORE,
        )
        if BLOCK_N > HALF:
            _store(
                out, right, m, n + HALF, M, N, bias, x_scale, x_step, weight_scale, w_step,
                BLOCK_M, X_BLOCKS, W_BLOCKS, TMA_STORE,
            )
    # fmt: on


# ---- configurations ----


def _shared_bytes(chip: Chip, config: Config, out_bytes: int) -> int:
    """Bound the shared memory: stages of both operands, half a tile of output for TMA to store, and
    barriers. Without TMA the stage that is being multiplied is in registers, and the output reuses
    the stages."""
    stage = (config["BLOCK_M"] + config["BLOCK_N"]) * 128
    if not chip.has_tma:
        return (config.num_stages - 1) * stage
    return config.num_stages * stage + config["BLOCK_M"] * 128 * out_bytes + 1024


# Tile, warps, and a rate relative to the best tile's: assumed, to order the tiles, not measured.
_TILES = (
    (128, 256, 8, 1.0),  # two warpgroups of 64 rows; the registers are full
    (128, 128, 8, 0.8),  # twice the tiles, for when the large ones leave SMs idle; fits Ada
    (64, 128, 4, 0.6),  # a few hundred rows; mma.sync, with both operands in registers: 8 warps
)


def _configs(chip: Chip, m: int, n: int, by_column: bool, out_bytes: int) -> list[Config]:
    """Return the configurations, ordered by waves of tiles over their rate, for m rounded up to a
    power of two. by_column: the weight's scales are 1x128 blocks, a vector in registers."""
    offered = []
    for block_m, block_n, warps, rate in _TILES:
        if (by_column and block_m > 64) or (block_n > 128 and not chip.has_tma):
            continue  # would spill: pointers and masks take registers too
        warps = warps if chip.has_tma else 8
        tiles = cdiv(m, block_m) * cdiv(n, block_n)
        cost = cdiv(tiles, chip.sms) * block_m * block_n / rate
        for stages in (4, 3, 2):  # as many as fit; 4 cover 2 us of latency
            config = Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, GROUP_M=8)
            if _shared_bytes(chip, config, out_bytes) <= chip.shared_memory:
                offered.append((cost, config))
                break
    return [config for _, config in sorted(offered, key=lambda offer: offer[0])]


_tuner = Tuner("fp8_gemm", _configs)

# ---- launcher ----


def linear(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> None:
    """Compute out = x @ weight^T + bias: fp8_gemm (both scales) or fp8_linear (weight_scale).

    out [M, N] bf16, fp16 or fp32, contiguous; x [M, K] e4m3 with x_scale, or bf16, fp16 or fp32
    without; weight [N, K] e4m3; bias [N] of out's dtype. Scales fp32, contiguous: [1] or [1, 1],
    [rows, 1], [rows, ceil(K / 128)], and for the weight [ceil(N / 128), ceil(K / 128)]. Rows may
    have any stride. A row's result does not depend on M, within M <= 64 and within M > 64.
    """
    if weight_scale is None or weight.dtype != E4M3:
        raise TypeError(f"weight: got {weight.dtype}, want float8_e4m3fn with its scale")
    chip = common.chip_of(out)
    m, k = x.shape
    if m <= MOST_ROWS or x.dtype != E4M3 or not chip.has_e4m3 or not aligned(x, weight):
        stream(out, x, weight, bias, x_scale, weight_scale)
        return
    n = weight.shape[0]
    sx, sw = spread(x_scale, m), spread(weight_scale, n)
    mma = mma_dtype(x, chip)
    x_raw, weight_raw = raw(x, mma), raw(weight, mma)
    tma, tma_store = use_tma(chip, x, weight), use_tma(chip, out)

    def run(config: Config) -> None:
        rows = config["BLOCK_M"]
        tiles = cdiv(m, rows) * cdiv(n, config["BLOCK_N"])
        resident = min(2, chip.shared_memory // _shared_bytes(chip, config, out.itemsize))
        common.launch(
            _gemm,
            (programs(tiles, chip.sms * resident),),
            source(out, rows, 128, tma_store),
            source(x_raw, rows, 128, tma),
            source(weight_raw, 128, 128, tma),
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
            X_BLOCKS=sx.blocks,
            W_BLOCKS=sw.blocks,
            W_HEIGHT=sw.height,
            PROMOTE=sx.blocks or sw.blocks or needs_promotion(chip),
            MMA=mma,
            TMA=tma,
            TMA_STORE=tma_store,
        )

    by_column = sw.blocks and sw.height == 1
    key = (next_power_of_2(min(m, 8192)), n, by_column, out.itemsize)
    run(_tuner.choose(out, key, run))
