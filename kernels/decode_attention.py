"""Attention of a few queries over a KV cache: decode, speculative decode, chunked prefill.

    out[i] = sum_j softmax_j(q[i] . k[j] * softmax_scale) v[j],   j < cache_seqlens (and, causal,
                                                                  j <= i + cache_seqlens - Sq)

Why a kernel of its own: one query over L keys reads 2 L Hkv D elements and computes 4 L H D
operations, which is G a byte in 16 bits (G = H / Hkv, 4 in Llama 3.1 8B), where the chip has some
two hundred: only memory counts. So everything serves the stream of keys and values:

- Each key is read once for all G query heads that share it. They are rows of one matrix tile,
  which costs nothing: the matrix instruction wants 16 rows anyway. Row r of a key/value head's
  Sq * G rows is query r // G, head r % G.
- One query of one sequence has Hkv (8) programs' worth of work, and the chip 132 SMs. So the keys
  are split among programs (flash-decoding), each of which leaves its running (acc, top, total) in
  fp32, and a second kernel adds those up in the order of the keys.
- Loads are 16 bytes a thread and asynchronous, one to two tiles ahead; the id of a tile's block is
  read a tile earlier still, so that no load waits for the block table.

How many splits: a function of the sequence's own length and of constants (_num_splits), never of
the batch or of the cache's capacity, so that a sequence's result has the same bits in any batch.
The most that a sequence is split into fills the chip with that sequence alone (_most_splits); no
split is shorter than SHORTEST_SPLIT keys. The grid covers the capacity, since the lengths are on
the device; programs past their sequence's splits exit at once, and come last. A sequence of one
split is written directly.

Cost, predicted: the 2 L Hkv D elements a sequence, and a workspace, written and read once, of
4 (D + 2) bytes a query head and split: 0.8 % of the cache's bytes each way for G = 4 and splits of
512 keys. It holds B Sq H (D + 2) floats times the most splits: 17 MB for 32 sequences of 8B's shape
on an H200 (32 splits). Two or three programs an SM with one to two tiles of 64 keys each in flight
are 100 KB an SM; 4.3 TB/s at a microsecond of latency take 33.

Many queries (chunked prefill) are the same kernel with 64 or 128 rows a tile: wgmma on sm_90, tiles
that no row may see are skipped, those that all rows see are not masked.

An FP8 cache holds e4m3 of k / k_scale and v / v_scale. It is decoded exactly; k_scale multiplies
the scores and v_scale the result, both in fp32. Half the bytes leave half the time for arithmetic:
see _as_fp16.

Lengths and block ids are on the device and cannot be checked by the host. The kernel stays in
bounds whatever they are: a length counts as the nearest of 0 and the capacity, and keys in a block
that does not exist are not seen. NaN past the length never reaches a result; a NaN value within the
length reaches every query of its tile, as in the eager twin, even one that may not see it.

Source: Dao et al., Flash-Decoding (2023); Dao, FlashAttention-2, arXiv:2307.08691; Kwon et al.,
PagedAttention, arXiv:2309.06180.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, fp8
from .common import LOG2E, Chip, Config, cdiv

SHORTEST_SPLIT = 512  # keys: 256 KB of one head in 16 bits, 8 tiles, enough to amortise a start
COMBINED = 16  # splits added at a time; part of the order of summation, so not tuned
_INTERPRETED = tl.constexpr(common.INTERPRETED)


# ---- device helpers ----


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b in fp32, exact products."""
    if _INTERPRETED:  # which multiplies bf16 as the integers it stores it in
        a, b = fp8.to_fp32(a), fp8.to_fp32(b)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _length(cache_seqlens, b, capacity):
    return tl.minimum(tl.maximum(tl.load(cache_seqlens + b), 0), capacity)


@triton.jit
def _keys(length, seqlen_q, tile, GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many keys, from the first, the last query of a tile of rows sees."""
    if not CAUSAL:
        return length
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    return tl.maximum(length - seqlen_q + last + 1, 0)


@triton.jit
def _num_splits(keys, shortest, most, BLOCK_N: tl.constexpr):
    """How many ways `keys` keys are split; shortest in tiles of BLOCK_N keys."""
    return tl.maximum(tl.minimum(tl.cdiv(keys, BLOCK_N) // shortest, most), 1)


@triton.jit
def _block_ids(table, tile, keys, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The ids of the blocks that a tile of keys lies in: one where no tile crosses a block's end,
    else one for each key, [BLOCK_N]. -1 past the last key, where the table is not read."""
    position = tile * BLOCK_N
    if BLOCK_SIZE % BLOCK_N != 0:
        position += tl.arange(0, BLOCK_N)
    return tl.load(table + position // BLOCK_SIZE, mask=position < keys, other=-1)


@triton.jit
def _load_tile(
    pool,  # [block, token, D] of one head
    block,  # id, or [BLOCK_N] ids
    start,  # position of the tile's first key
    seen,  # [BLOCK_N]: the others are zeros
    stride_block,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Keys or values [BLOCK_N, BLOCK_D] in DTYPE."""
    rows, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if BLOCK_SIZE % BLOCK_N != 0:
        inside = ((start + rows) % BLOCK_SIZE).to(tl.int64)
        pointers = pool + ((block.to(tl.int64) * stride_block + inside * stride_token)[:, None] + d)
    else:
        inside = start % BLOCK_SIZE if BLOCK_SIZE > 0 else start
        first = pool + block.to(tl.int64) * stride_block + inside.to(tl.int64) * stride_token
        pointers = first + ((rows.to(tl.int64) * stride_token)[:, None] + d)
    values = tl.load(pointers, mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0)
    if pool.dtype.element_ty == tl.uint8:
        values = fp8.from_e4m3(values, NATIVE_FP8, DTYPE)
    return values


@triton.jit
def _as_fp16(q):
    """bf16 [BLOCK_M, BLOCK_D] -> (fp16, fp32 [BLOCK_M]), whose product is q: each row by a power of
    two of its own. Elements below 2^-14 of their row's largest are off by 2^-25 of it at most.

    e4m3 becomes fp16 by one instruction for two elements; to bf16 it would take two more for each,
    of those that run at a quarter of the rate, and they would cost more time than the memory."""
    x = fp8.to_fp32(q)
    exponent = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return (x * inverse[:, None]).to(tl.float16), exponent.to(tl.float32, bitcast=True)


@triton.jit
def _over_keys(
    acc,  # fp32 [BLOCK_M, BLOCK_D]
    top,  # fp32 [BLOCK_M]: largest score so far, in base 2
    total,  # fp32 [BLOCK_M]: sum of probabilities relative to it
    q,  # [BLOCK_M, BLOCK_D]
    k_pool,
    v_pool,
    b,
    table,  # the sequence's [n]
    first,
    last,  # tiles of keys [first, last)
    keys,
    limit,  # [BLOCK_M]: the last key that each row sees
    scale,  # [BLOCK_M]: of the scores, to base 2
    num_blocks,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    MASK: tl.constexpr,  # whether some row may not see some key of these tiles
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """The online softmax over some tiles of keys."""
    PAGED: tl.constexpr = BLOCK_SIZE > 0
    BLOCK_D: tl.constexpr = q.shape[1]
    following = b
    if PAGED:
        following = _block_ids(table, first, keys, BLOCK_SIZE, BLOCK_N)
    for tile in range(first, last):
        start = tile * BLOCK_N
        position = start + tl.arange(0, BLOCK_N)
        seen = position < keys
        block = following
        if PAGED:
            following = _block_ids(table, tile + 1, keys, BLOCK_SIZE, BLOCK_N)
            seen &= (block >= 0) & (block < num_blocks)
        k = _load_tile(
            k_pool, block, start, seen, stride_kb, stride_kt,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, NATIVE_FP8, q.dtype,
        )  # fmt: skip
        v = _load_tile(
            v_pool, block, start, seen, stride_vb, stride_vt,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, NATIVE_FP8, q.dtype,
        )  # fmt: skip
        scores = _dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32)) * scale[:, None]
        if MASK:
            scores = tl.where(seen & (position[None, :] <= limit[:, None]), scores, -float("inf"))
        elif PAGED:
            scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = _dot(fp8.round_to(p, q.dtype), v, acc * shrink[:, None])
        top = higher
    return acc, top, total


# ---- kernels ----


@triton.jit
def _attend(
    out,  # [B, Sq, H, D]
    partial,  # fp32 [B, Sq, H, most, D]
    tops,  # fp32 [B, Sq, H, most]
    totals,
    q,  # [B, Sq, H, D]
    k_cache,  # [blocks, block_size, Hkv, D], e4m3 as uint8
    v_cache,
    k_scale,  # fp32 [1] or [Hkv], or None
    v_scale,
    cache_seqlens,  # int32 [B]
    block_table,  # int32 [B, n], or None
    softmax_scale,
    capacity,  # keys a sequence can have
    num_blocks,
    batch,
    seqlen_q,
    kv_heads,
    m_tiles,  # tiles of BLOCK_M rows a key/value head
    shortest,  # tiles a split has at least
    most,  # splits a sequence of this capacity has at most
    stride_ob, stride_os, stride_oh,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ks, stride_vs,  # of the scales: 0 for one scale
    stride_table,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,  # whether any sequence may be split
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # 0: not paged
    NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Key/value heads next to each other read the same stretch of memory at the same time; the
    # splits that only long sequences have come last; so do rows that see fewer keys.
    index = tl.program_id(0)
    head = index % kv_heads
    index //= kv_heads
    m_tile = m_tiles - 1 - index % m_tiles
    index //= m_tiles
    b, split = index % batch, index // batch

    length = _length(cache_seqlens, b, capacity)
    keys = _keys(length, seqlen_q, m_tile, GROUP, CAUSAL, BLOCK_M)
    splits = _num_splits(keys, shortest, most, BLOCK_N)
    if split >= splits:
        return
    tiles = tl.cdiv(keys, BLOCK_N)
    first = split * (tiles // splits) + tl.minimum(split, tiles % splits)
    last = first + tiles // splits + (split < tiles % splits).to(tl.int32)

    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query, h = row // GROUP, head * GROUP + row % GROUP
    limit = query + (length - seqlen_q) if CAUSAL else query * 0 + (length - 1)
    d = tl.arange(0, BLOCK_D)
    stored = (row < seqlen_q * GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    b, head, query, h = b.to(tl.int64), head.to(tl.int64), query.to(tl.int64), h.to(tl.int64)
    rows_q = b * stride_qb + query * stride_qs + h * stride_qh
    queries = tl.load(q + (rows_q[:, None] + d), mask=stored, other=0)

    scale = tl.full([BLOCK_M], 1.0, tl.float32) * (softmax_scale * LOG2E)
    if k_scale is not None:
        if queries.dtype == tl.bfloat16:
            queries, power = _as_fp16(queries)
            scale *= power
        scale *= tl.load(k_scale + head * stride_ks)
    k_pool, v_pool = k_cache + head * stride_kh, v_cache + head * stride_vh
    table = block_table
    if BLOCK_SIZE > 0:
        table = block_table + b * stride_table
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    masked = first
    if BLOCK_M >= 64:  # bound by arithmetic: tiles that every row sees whole go unmasked
        whole = (
            length - seqlen_q + (m_tile * BLOCK_M) // GROUP + 1 if CAUSAL else length
        ) // BLOCK_N
        masked = tl.maximum(first, tl.minimum(last, whole))
        acc, top, total = _over_keys(
            acc, top, total, queries, k_pool, v_pool, b, table, first, masked, keys, limit, scale,
            num_blocks, stride_kb, stride_kt, stride_vb, stride_vt,
            False, HEAD_DIM, BLOCK_SIZE, BLOCK_N, NATIVE_FP8,
        )  # fmt: skip
    acc, top, total = _over_keys(
        acc, top, total, queries, k_pool, v_pool, b, table, masked, last, keys, limit, scale,
        num_blocks, stride_kb, stride_kt, stride_vb, stride_vt,
        True, HEAD_DIM, BLOCK_SIZE, BLOCK_N, NATIVE_FP8,
    )  # fmt: skip

    if v_scale is not None:
        acc *= tl.load(v_scale + head * stride_vs)
    if SPLIT and splits > 1:
        heads = kv_heads * GROUP
        rows = ((b * seqlen_q + query) * heads + h) * most + split
        tl.store(partial + (rows[:, None] * HEAD_DIM + d), acc, mask=stored)
        live = row < seqlen_q * GROUP
        tl.store(tops + rows, top, mask=live)
        tl.store(totals + rows, total, mask=live)
    else:
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]  # a row that sees no key gives zeros
        rows_out = b * stride_ob + query * stride_os + h * stride_oh
        tl.store(
            out + (rows_out[:, None] + d), fp8.round_to(acc, out.dtype.element_ty), mask=stored
        )


@triton.jit
def _combine(
    out,  # [B, Sq, H, D]
    partial,  # fp32 [B, Sq, H, most, D]
    tops,  # fp32 [B, Sq, H, most]
    totals,
    cache_seqlens,  # int32 [B]
    capacity,
    seqlen_q,
    heads,
    shortest,
    most,
    stride_ob, stride_os, stride_oh,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COMBINED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(top_s - top) acc_s / sum_s 2^(top_s - top) total_s, for one row."""
    row = tl.program_id(0)
    h, b = row % heads, row // heads // seqlen_q
    query = row // heads % seqlen_q
    m_tile = (query * GROUP + h % GROUP) // BLOCK_M
    length = _length(cache_seqlens, b, capacity)
    keys = _keys(length, seqlen_q, m_tile, GROUP, CAUSAL, BLOCK_M)
    splits = _num_splits(keys, shortest, most, BLOCK_N)
    if splits == 1:
        return  # written already
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, COMBINED)
    first = row.to(tl.int64) * most
    highest = tl.full([COMBINED], -float("inf"), tl.float32)
    for i in range(0, splits, COMBINED):
        top = tl.load(tops + first + i + s, mask=i + s < splits, other=-float("inf"))
        highest = tl.maximum(highest, top)
    highest = tl.max(highest, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    acc, total = tl.zeros([BLOCK_D], tl.float32), 0.0
    for i in range(0, splits, COMBINED):
        live = i + s < splits
        top = tl.load(tops + first + i + s, mask=live, other=-float("inf"))
        weight = tl.exp2(top - base)
        total += tl.sum(weight * tl.load(totals + first + i + s, mask=live, other=0.0), 0)
        pointers = partial + ((first + i + s)[:, None] * HEAD_DIM + d)
        parts = tl.load(pointers, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * parts, 0)
    acc /= tl.where(total == 0.0, 1.0, total)
    at = out + b.to(tl.int64) * stride_ob + query.to(tl.int64) * stride_os
    at += h.to(tl.int64) * stride_oh
    tl.store(at + d, fp8.round_to(acc, out.dtype.element_ty), mask=d < HEAD_DIM)


# ---- configurations ----


def _shared_bytes(config: Config, d: int, bytes_q: int, bytes_cache: int) -> int:
    """Shared memory of _attend: the tiles in flight, the queries, and what is on its way into the
    matrix unit. wgmma (64 rows and more) reads a tile while the next ones arrive, mma.sync copies
    it to registers first and needs one fewer."""
    block_m, block_n, block_d = config["BLOCK_M"], config["BLOCK_N"], _block_d(d)
    tile = block_n * block_d
    if block_m >= 64:
        decoded = 2 * tile * bytes_q if bytes_cache < bytes_q else 0
        tiles = 2 * tile * bytes_cache * config.num_stages + decoded
    else:
        probabilities = block_m * block_n * bytes_q
        tiles = 2 * tile * bytes_cache * max(config.num_stages - 1, 1) + probabilities
    return tiles + block_m * block_d * bytes_q + 1024


def _configs(chip: Chip, d: int, dtype: str, fp8_cache: bool, rows: int) -> list[Config]:
    """dtype: q's; rows: Sq * G rounded up to 16, 32, 64 or 128."""
    bytes_q = 4 if dtype == "float32" else 2
    bytes_cache = 1 if fp8_cache else bytes_q
    block_d = _block_d(d)

    def config(warps: int, stages: int, block_n: int, block_m: int = rows) -> Config:
        return Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n)

    few = min(rows, 32)
    wgmma = chip.has_tma  # or what followed it: 64 rows at a time, operands in shared memory
    if dtype == "float32":
        # Products on the vector units, whose operands lie in registers: small tiles, many threads.
        offered = [config(8, 1 if fp8_cache else 2, 16, 16)]
    elif d % 16:
        # Rows that start anywhere load in pieces, through registers, which then set the limit.
        offered = [config(4, 3, 32, few), config(4, 2, 16, few)]
    elif rows <= 32 and few * block_d < 32 * 256:
        # Bound by memory: bytes in flight count. Two programs an SM or more, 64 KB each, for
        # D = 128; then half the barriers and reductions a key (FP8 would not fit the registers);
        # then more in flight; then less of everything, for chips of little shared memory.
        offered = [config(4, 3, 64), config(4, 3, 128), config(4, 4, 64), config(4, 2, 32)]
        if fp8_cache:
            del offered[1]
            if chip.backend == "hip":  # four stages of decoded keys spill there
                offered.remove(config(4, 4, 64))
        elif block_d <= 64:
            offered[:2] = offered[1::-1]
    elif block_d == 256 and (rows <= 32 or fp8_cache or not wgmma):
        # The sums alone are 64 registers a thread, and a decoded tile of 64 keys as many.
        offered = [config(4, 3, 32, few), config(4, 2, 32, few)]
    elif block_d == 256:
        # Eight warps share 64 rows' sums, which would fill the registers of four.
        offered = [config(8, 2, 32, 64), config(8, 2, 16, 64)]
    else:
        # Bound by arithmetic: a warp for 16 rows; tiles of keys as large as registers allow, then
        # as small as little shared memory asks for.
        offered = [config(rows // 16, 3, 64), config(rows // 16, 3, 32), config(4, 2, 32, 64)]
        if not wgmma:
            del offered[0]
        if chip.backend == "hip":  # 64 rows and their sums spill there
            offered = [config(4, 2, 16, 32)]
    return [c for c in offered if _shared_bytes(c, d, bytes_q, bytes_cache) <= chip.shared_memory]


_tuner = common.Tuner("attention_with_kvcache", _configs)


def _resident(chip: Chip, config: Config, q: Tensor, cache: Tensor) -> int:
    """Programs an SM runs at a time: by shared memory, two at the most, one of 128 rows (whose
    registers fill the SM)."""
    needed = _shared_bytes(config, q.shape[-1], q.itemsize, cache.itemsize)
    return max(1, min(1 if config["BLOCK_M"] > 64 else 2, chip.shared_memory // needed))


def _block_d(d: int) -> int:
    return max(16, common.next_power_of_2(d))  # 16: the least a matrix instruction sums over


@functools.lru_cache(maxsize=1024)
def _most_splits(programs: int, slots: int) -> int:
    """Into how many splits one sequence's `programs` fill a chip that holds `slots` at a time: the
    fewest whose last wave is nearly (19 in 20) as full as any choice's, within four waves."""

    def full(splits: int) -> float:
        waves = programs * splits / slots
        return waves / math.ceil(waves)

    counts = range(1, max(1, 4 * slots // programs) + 1)
    best = max(map(full, counts))
    return next(s for s in counts if full(s) >= 0.95 * best)


def attention_with_kvcache(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    causal: bool,
    softmax_scale: float,
    num_splits: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """out and q [B, Sq, H, D], caches [B, S, Hkv, D] or paged [blocks, block_size, Hkv, D] with
    block_table int32 [B, n], cache_seqlens int32 [B]; FP8 caches with fp32 scales [1] or [Hkv].
    num_splits: 0, or what each sequence is split into as far as its tiles go."""
    batch, seqlen_q, heads, d = q.shape
    blocks, block_size, kv_heads = k_cache.shape[:3]
    group = heads // kv_heads
    rows = seqlen_q * group
    paged = block_table is not None
    capacity = block_size * (block_table.shape[1] if block_table is not None else 1)
    capacity = min(capacity, 2**31 - 2**16)  # positions are int32
    chip = common.chip_of(q)
    fp8_cache = k_cache.dtype == torch.float8_e4m3fn
    if fp8_cache:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    rows_m = min(max(16, common.next_power_of_2(rows)), 128)
    key = (d, str(q.dtype).removeprefix("torch."), fp8_cache, rows_m)

    def run(config: Config, out: Tensor) -> None:
        block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
        m_tiles = cdiv(rows, block_m)
        key_tiles = cdiv(capacity, block_n)
        if num_splits:
            shortest, most = 1, num_splits
        else:
            shortest = SHORTEST_SPLIT // block_n
            most = _most_splits(kv_heads * m_tiles, chip.sms * _resident(chip, config, q, k_cache))
        most = max(1, min(most, key_tiles // shortest))
        partial = tops = totals = None
        if most > 1:
            partial = q.new_empty((batch, seqlen_q, heads, most, d), dtype=torch.float32)
            tops, totals = q.new_empty((2, *partial.shape[:-1]), dtype=torch.float32)
        common.launch(
            _attend,
            (most * batch * m_tiles * kv_heads,),
            out,
            partial,
            tops,
            totals,
            q,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            cache_seqlens,
            block_table,
            softmax_scale,
            capacity,
            blocks,
            batch,
            seqlen_q,
            kv_heads,
            m_tiles,
            shortest,
            most,
            *out.stride()[:3],
            *q.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *(0 if t is None or t.numel() == 1 else t.stride(0) for t in (k_scale, v_scale)),
            0 if block_table is None else block_table.stride(0),
            config=config,
            CAUSAL=causal,
            SPLIT=most > 1,
            GROUP=group,
            HEAD_DIM=d,
            BLOCK_SIZE=block_size if paged else 0,
            NATIVE_FP8=fp8.native(chip),
            BLOCK_D=_block_d(d),
        )
        if most > 1:
            common.launch(
                _combine,
                (batch * seqlen_q * heads,),
                out,
                partial,
                tops,
                totals,
                cache_seqlens,
                capacity,
                seqlen_q,
                heads,
                shortest,
                most,
                *out.stride()[:3],
                config=config,
                CAUSAL=causal,
                GROUP=group,
                HEAD_DIM=d,
                COMBINED=COMBINED,
                BLOCK_D=_block_d(d),
            )

    run(_tuner.choose(q, key, lambda config: run(config, torch.empty_like(out))), out)
