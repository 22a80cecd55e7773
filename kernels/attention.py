"""Compute FlashAttention: out = softmax(q k^T * softmax_scale) v, causal or not, grouped heads.

    s = q k^T * softmax_scale * log2(e),  m = max_j s_j,  p_j = 2^(s_j - m)
    out = sum_j p_j v_j / sum_j p_j

Why fused: unfused, the scores [B, H, Sq, Sk] are written to memory and read back three times. Here
a program owns BLOCK_M queries of one head and walks the keys in tiles of BLOCK_N; m and both sums
stay in registers and are rescaled when m grows, so memory is linear in the length. softmax_scale
and log2(e) are one factor, applied in the FMA that subtracts m. Only tiles that some query does not
see whole (the diagonal, the end of the sequence) are masked. Causal programs with the longest walk
start first, so that those which finish last are short.

Cost of a (query, key) pair: 4 D FLOPs on the tensor cores and one exp2; causal has half the pairs.
On H200 a 128 x 128 tile with D = 128 is 8.4 MFLOP at 4096 a cycle, 2048 cycles of matrix
instructions; 16384 exp2 at 16 a cycle, 1024 cycles; and beside the exp2 some 430 instructions for
each of 8 warps on 4 schedulers, 860 cycles. A program's two warp groups meet at a barrier in every
tile, so matrix and exp2 phases mostly add up: 2048 / 3072 = 2/3 of the matrix rate. To hide the
softmax behind the products takes warp specialization, which tl.range offers and Triton 3.6 to 3.9
cannot compile for these loops. Each tile reads 64 KiB of k and v, 4 TB/s at 530 TFLOP/s, from the
L2 cache: so programs that share k and v run side by side.

Bits: a query's result depends on its own sequence only. The walk starts at key 0 for every tile of
queries, masked keys add exact zeros, and dtype and head_dim choose the configuration. So a sequence
gives the same bits alone, in any batch or packing, and through either load path.

NaN and Inf: no other sequence reaches a query, nor do keys and values past its diagonal, except a
NaN or Inf in v in the tiles that the diagonal crosses: 0 x NaN is NaN there, as it is everywhere in
eager PyTorch.

Source: Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import common
from .common import Chip, Config, Tuner
from .fp8 import dot

_MINUS_INFINITY: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def _load(
    x, x_tma, row_stride, sequence, kv_head, first, n, end,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load rows n to n + BLOCK_N of a sequence of k or v: [BLOCK_N, BLOCK_D], zeros past D.

    x: row 0 of the sequence and head. x_tma: None or [B, Hkv, rows, D], where the sequence starts
    at row `first`. MASKED: some rows are past the sequence's end. Through the pointer they are
    zeros; the TMA unit, which knows only the tensor's end, loads what is there.
    """
    if x_tma is not None:
        return x_tma.load([sequence, kv_head, first + n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        tile = x + tl.cast(n, tl.int64) * row_stride  # a scalar: the loop keeps its offsets
        tile += row.to(tl.int64)[:, None] * row_stride + column
        if MASKED:
            return tl.load(tile, mask=(row < end - n)[:, None] & (column < D), other=0.0)
        elif D < BLOCK_D:
            return tl.load(tile, mask=column[None, :] < D, other=0.0)
        else:
            return tl.load(tile)


@triton.jit
def _walk(
    acc, row_max, row_sum, q, k, v, k_tma, v_tma, k_stride, v_stride, sequence, kv_head, first_k,
    len_k, start, stop, last, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, ZERO_TAIL: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax over keys start to stop; start is a multiple of BLOCK_N.

    acc [BLOCK_M, BLOCK_D], row_max and row_sum [BLOCK_M] fp32; last [BLOCK_M]: the last key that
    each query sees, used where MASKED. ZERO_TAIL: v past the sequence's end may be another
    sequence's NaN, and 0 x NaN is NaN.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    for n in tl.range(start, stop, BLOCK_N):
        key = _load(
            k, k_tma, k_stride, sequence, kv_head, first_k, n, len_k, D, BLOCK_N, BLOCK_D, MASKED
        )
        score = dot(q, tl.trans(key), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if MASKED:
            seen = tl.arange(0, BLOCK_N)[None, :] <= (last - n)[:, None]
            score = tl.where(seen, score, _MINUS_INFINITY)
        new_max = tl.maximum(row_max, tl.max(score, 1) * scale)
        # While all of a row's scores are -inf, subtract 0: -inf - -inf is NaN.
        shift = tl.where(new_max == _MINUS_INFINITY, 0.0, new_max)
        # An explicit FMA, so that both loops round alike.
        p = tl.exp2(tl.fma(score, scale, -shift[:, None]))
        shrink = tl.exp2(row_max - shift)
        row_max = new_max
        row_sum = row_sum * shrink + tl.sum(p, 1)
        value = _load(
            v, v_tma, v_stride, sequence, kv_head, first_k, n, len_k, D, BLOCK_N, BLOCK_D, MASKED
        )
        if MASKED and ZERO_TAIL:
            value = tl.where((tl.arange(0, BLOCK_N) < len_k - n)[:, None], value, 0.0)
        acc = dot(p.to(q.dtype), value, acc * shrink[:, None])
    return acc, row_max, row_sum


@triton.jit
def _bounds(cu_seqlens, i, total):
    """Return the first row and the length of packed sequence i, clamped to [0, total]."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), total)
    end = tl.maximum(tl.minimum(tl.load(cu_seqlens + i + 1), total), first)
    return first, end - first


@triton.jit(
    do_not_specialize=[
        "batch", "seqlen_q", "seqlen_k", "kv_heads", "group", "tiles", "section"
    ]
)  # fmt: skip
def _attention(
    out, q, k, v,  # [B, Sq, H, D], k and v [B, Sk, Hkv, D]; packed: B = 1, Sq and Sk the totals
    k_tma, v_tma,  # descriptors of k and v as [B, Hkv, Sk, D], or None
    cu_seqlens_q, cu_seqlens_k,  # [batch + 1] or None
    batch, seqlen_q, seqlen_k, kv_heads, group, tiles, section, scale,
    out_strides, q_strides, k_strides, v_strides,  # of B, S and H
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M queries of one head of one sequence.

    A stream shares k and v: a (sequence, kv head), or a kv head of all packed sequences. Programs
    are numbered by section of streams (as many as the L2 cache holds), then tile, stream and query
    head, so that neighbors read the same keys at the same time.
    """
    PACKED: tl.constexpr = cu_seqlens_q is not None
    streams = kv_heads if PACKED else kv_heads * batch
    first_stream = tl.program_id(0) // (section * tiles * group) * section
    rest = tl.program_id(0) % (section * tiles * group)
    width = tl.minimum(section, streams - first_stream) * group
    tile = rest // width
    stream = first_stream + rest % width // group
    kv_head, sequence = stream % kv_heads, stream // kv_heads
    head = kv_head * group + rest % width % group

    first_q, len_q, first_k, len_k = 0, seqlen_q, 0, seqlen_k
    if PACKED:
        # Sequence i owns the tiles from cu_seqlens_q[i] // BLOCK_M + i on, as many as it needs or
        # one more: that takes no sum over the sequences before it and nothing from the host.
        low, high = 0, batch
        while high - low > 1:
            middle = (low + high) // 2
            first_q, len_q = _bounds(cu_seqlens_q, middle, seqlen_q)
            if first_q // BLOCK_M + middle <= tile:
                low = middle
            else:
                high = middle
        first_q, len_q = _bounds(cu_seqlens_q, low, seqlen_q)
        first_k, len_k = _bounds(cu_seqlens_k, low, seqlen_k)
        tile -= first_q // BLOCK_M + low
        if (tile < 0) | (tile * BLOCK_M >= len_q):
            return
    if CAUSAL:
        tile = tl.cdiv(len_q, BLOCK_M) - 1 - tile  # the longest walk first

    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (row < len_q - tile * BLOCK_M)[:, None] & (column < D)
    step, first_row = row.to(tl.int64)[:, None], tl.cast(first_q + tile * BLOCK_M, tl.int64)
    batch_index, head_index = sequence.to(tl.int64), head.to(tl.int64)
    q += batch_index * q_strides[0] + first_row * q_strides[1] + head_index * q_strides[2]
    query = tl.load(q + step * q_strides[1] + column, mask=inside, other=0.0)
    first, kv_index = tl.cast(first_k, tl.int64), kv_head.to(tl.int64)
    k += batch_index * k_strides[0] + first * k_strides[1] + kv_index * k_strides[2]
    v += batch_index * v_strides[0] + first * v_strides[1] + kv_index * v_strides[2]

    # In this tile keys below seen_by_all need no mask, and keys from seen_by_any on are skipped.
    last = tl.full([BLOCK_M], len_k - 1, tl.int32)
    seen_by_all, seen_by_any = len_k, len_k
    if CAUSAL:
        last = row + (tile * BLOCK_M + len_k - len_q)
        seen_by_all = tl.maximum(tl.minimum(tile * BLOCK_M + 1 + len_k - len_q, len_k), 0)
        seen_by_any = tl.minimum((tile + 1) * BLOCK_M + len_k - len_q, len_k)
    unmasked = seen_by_all // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], _MINUS_INFINITY, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = _walk(
        acc, row_max, row_sum, query, k, v, k_tma, v_tma, k_strides[1], v_strides[1], sequence,
        kv_head, first_k, len_k, 0, unmasked, last, scale, D, BLOCK_N, False, False,
    )  # fmt: skip
    acc, row_max, row_sum = _walk(
        acc, row_max, row_sum, query, k, v, k_tma, v_tma, k_strides[1], v_strides[1], sequence,
        kv_head, first_k, len_k, unmasked, seen_by_any, last, scale, D, BLOCK_N, True,
        PACKED and v_tma is not None,
    )  # fmt: skip
    nothing = last < 0  # zeros where no key was seen; NaN from keys that were seen stays NaN
    acc *= (1.0 / tl.where(nothing, 1.0, row_sum))[:, None]
    acc = tl.where(nothing[:, None], 0.0, acc)
    out += batch_index * out_strides[0] + first_row * out_strides[1] + head_index * out_strides[2]
    tl.store(out + step * out_strides[1] + column, acc.to(out.dtype.element_ty), mask=inside)


# ---- configurations ----


def _shared_memory(chip: Chip, dtype: str, d: int, config: Config) -> int:
    """Bound the shared memory in bytes: q's tile, the stages of k's and v's, and barriers."""
    m, n, stages = config["BLOCK_M"], config["BLOCK_N"], config.num_stages
    row = common.padded_dim(d) * (4 if dtype == "float32" else 2)
    if chip.backend == "hip":  # q's tile, then k's and v's with p's; a stage is in registers
        return max(m, 2 * n * max(1, stages - 1)) * row + 2 * m * n + 2048
    return (m + 2 * n * stages) * row + 2048


def _configs(chip: Chip, dtype: str, d: int) -> list[Config]:
    """Return the configurations, by dtype and head_dim alone: BLOCK_N sets the order of sums, so
    if a length or a batch chose it, a sequence's bits would vary. Larger tiles than these spill."""
    block_d = common.padded_dim(d)
    if dtype == "float32":
        # FMAs, since no matrix unit multiplies fp32 exactly; their operands take registers.
        m, n, warps = {256: (16, 16, 4), 128: (32, 16, 8)}.get(block_d, (32, 16, 4))
        offered = [Config.of(warps, 1, BLOCK_M=m, BLOCK_N=n)]
    elif chip.backend == "hip":
        # 4 warps of 64 lanes; a tile of k and one of v alternate in 64 KiB of LDS.
        m = 64 if block_d == 256 else 128
        offered = [Config.of(4, stages, BLOCK_M=m, BLOCK_N=32) for stages in (2, 1)]
    elif block_d == 256:
        # The accumulator takes 128 registers a thread (64 on sm_80, where q takes as many).
        offered = [Config.of(8, 2, BLOCK_M=128 if chip.has_tma else 64, BLOCK_N=32)]
    elif block_d == 128 and chip.has_tma:
        # 8 warps have one stage more. With 4 warps an SM has two small programs, and one computes
        # its softmax during the other's products, for twice the traffic from L2.
        offered = [
            Config.of(8, 3, BLOCK_M=128, BLOCK_N=64),
            Config.of(4, 2, BLOCK_M=64, BLOCK_N=64),
        ]
        # First two warp groups, with 64 registers a thread of accumulator and 64 of scores. The
        # masks of a padded d, or sm_100's tensor memory, would take too many more.
        if d == block_d and chip.arch == 90:
            offered.insert(0, Config.of(8, 2, BLOCK_M=128, BLOCK_N=128))
    elif block_d == 128:
        # mma.sync keeps q in registers too; the masks of a padded d do not fit beside wide tiles.
        offered = [Config.of(8, 2, BLOCK_M=128 if d == block_d else 64, BLOCK_N=32)]
        if d == block_d:
            offered.insert(0, Config.of(8, 2, BLOCK_M=128, BLOCK_N=64))
    else:
        # Half the products per exp2, so the softmax is the longer phase: two programs an SM take
        # turns; on sm_90 then one with wide tiles, which has fewer barriers.
        offered = [
            Config.of(4 if chip.has_tma else 8, 3, BLOCK_M=128, BLOCK_N=64),
            Config.of(8, 3, BLOCK_M=128, BLOCK_N=128 if chip.has_tma else 32),
        ]
    return [c for c in offered if _shared_memory(chip, dtype, d, c) <= chip.shared_memory]


_tuner = Tuner("attention", _configs)
# Bytes of the L2 cache for k and v of programs side by side: H200 has 50 MB, A100 40.
_L2_SHARE = 32 * 2**20


# ---- the launcher ----


def _descriptor(t: Tensor, block_n: int, block_d: int) -> TensorDescriptor | None:
    """Describe t [B, S, Hkv, D] as [B, Hkv, S, D] for the TMA unit. Return None where it cannot:
    addresses must be multiples of 16 bytes, and no dimension may be empty or have stride 0."""
    shape = [t.shape[i] for i in (0, 2, 1, 3)]
    unit = 16 // t.element_size()
    # The stride of a dimension of size 1 is not used and may be anything.
    strides = [t.stride(i) if t.shape[i] > 1 else unit for i in (0, 2, 1)]
    if t.data_ptr() % 16 or 0 in shape or 0 in strides or any(s % unit for s in strides):
        return None
    return TensorDescriptor(t, shape, [*strides, 1], [1, 1, block_n, block_d])


def attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    tma: bool = True,
) -> None:
    """Fill out [B, Sq, H, D] from q [B, Sq, H, D], k and v [B, Sk, Hkv, D], D a multiple of 8 up to
    256; or packed, [total, H, D] and [total, Hkv, D] with cu_seqlens_q and cu_seqlens_k [B + 1]
    int32.

    Strides may be any, with the last dimension contiguous. The kernel clamps offsets in cu_seqlens
    to the tensors, so wrong ones give wrong numbers and touch no other memory. A D that is not a
    power of two is padded on the chip (96 costs the arithmetic of 128), not in memory. tma=False
    loads through pointers, as for chips without a TMA unit and tensors that it cannot address.
    """
    if cu_seqlens_q is not None:
        out, q, k, v = (t.unsqueeze(0) for t in (out, q, k, v))
    chip = common.chip_of(q)
    batch, seqlen_q, heads, d = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    block_d = common.padded_dim(d)
    tma = tma and chip.has_tma and q.dtype != torch.float32
    # The fewest sections of streams, of equal size, whose k and v fit the L2 cache.
    streams = batch * kv_heads
    in_cache = max(1, _L2_SHARE // max(1, 2 * seqlen_k * d * k.element_size()))
    section = common.cdiv(streams, common.cdiv(streams, in_cache))
    if cu_seqlens_q is not None:
        batch = cu_seqlens_q.shape[0] - 1

    def run(config: Config) -> None:
        block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
        packed = cu_seqlens_q is not None
        tiles = seqlen_q // block_m + batch if packed else common.cdiv(seqlen_q, block_m)
        k_tma = _descriptor(k, block_n, block_d) if tma else None
        v_tma = _descriptor(v, block_n, block_d) if tma else None
        common.launch(
            _attention, (streams * group * tiles,), out, q, k, v,
            *((k_tma, v_tma) if k_tma and v_tma else (None, None)), cu_seqlens_q, cu_seqlens_k,
            batch, seqlen_q, seqlen_k, kv_heads, group, tiles, section,
            softmax_scale * common.LOG2E.value, *(t.stride()[:3] for t in (out, q, k, v)),
            config=config, D=d, BLOCK_D=block_d, CAUSAL=causal,
        )  # fmt: skip

    run(_tuner.choose(q, (str(q.dtype).removeprefix("torch."), d), run))
