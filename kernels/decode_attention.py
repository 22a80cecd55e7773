"""Compute attention of a few queries over a KV cache: decode, speculation, chunked prefill.

    out[i] = sum_j softmax_j(q[i] . k[j] * softmax_scale) v[j],   j < cache_seqlens (and, causal,
                                                                  j <= i + cache_seqlens - Sq)

Why a separate kernel: one query over L keys reads 2 L Hkv D elements and computes 4 L H D
operations. In 16 bits that is G per byte (G = H / Hkv, 4 in Llama 3.1 8B), where the chip can do
some two hundred: memory bounds it.

- Each key is read once for all G query heads that share it. They are rows of one matrix tile, which
  costs nothing, since the matrix instruction takes 16 rows anyway. Row r of a key/value head's
  Sq * G rows is query r // G, head r % G.
- One query of one sequence is work for Hkv (8) programs, and the chip has 132 SMs. So the keys are
  split over programs (flash-decoding). Each writes its running (acc, top, total) in fp32, and a
  second kernel adds them in the order of the keys. decode_plan.py sets their number.
- Loads are 16 bytes a thread and asynchronous, one to two tiles ahead; a tile's block id is read
  one tile earlier, so that no load waits for the block table.

Cost per sequence: the 2 L Hkv D elements, and a workspace, written and read once, of 4 (D + 2)
bytes for each query head and split: 0.8 % of the cache's bytes each way for G = 4 and splits of 512
keys. It holds B Sq H (D + 2) floats times the most splits: 17 MB for 32 sequences of 8B's shape on
an H200 (32 splits). Two or three programs an SM, with one to two tiles of 64 keys each in flight,
are 100 KB an SM, more than the latency of memory needs.

Many queries (chunked prefill) use the same kernel with 64 or 128 rows a tile: wgmma on sm_90. Tiles
that no row sees are skipped; those that all rows see are not masked.

An FP8 cache holds e4m3 of k / k_scale and v / v_scale and is decoded exactly; k_scale multiplies
the scores and v_scale the result, both in fp32. Half the bytes leave half the time for arithmetic:
see as_fp16 in decode_tile.py.

The host cannot check lengths and block ids, which are on the device. The kernel stays in bounds
whatever they are: it clamps a length to 0 and the capacity, and masks keys in a block that does not
exist. NaN past the length never reaches a result; a NaN value within the length reaches every query
of its tile, as in the eager twin, even one that may not see it.

Source: Dao et al., Flash-Decoding (2023); Dao, FlashAttention-2, arXiv:2307.08691; Kwon et al.,
PagedAttention, arXiv:2309.06180.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, fp8
from .common import FP8_TINY, LOG2E, Config, cdiv
from .decode_plan import configs, most_splits, resident, splits_wanted
from .decode_tile import as_fp16, keys_seen, length_of, over_keys, splits_of

COMBINED = 16  # splits added at a time; it sets the order of summation, so it is not tuned


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
    num_splits,  # 0: of each sequence's length
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
    # Adjacent key/value heads read adjacent memory at the same time. The splits that only long
    # sequences have come last, and so do rows that see fewer keys.
    index = tl.program_id(0)
    head = index % kv_heads
    index //= kv_heads
    m_tile = m_tiles - 1 - index % m_tiles
    index //= m_tiles
    b, split = index % batch, index // batch

    length = length_of(cache_seqlens, b, capacity)
    keys = keys_seen(length, seqlen_q, m_tile, GROUP, CAUSAL, BLOCK_M)
    splits = splits_of(keys, num_splits, most, BLOCK_N)
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
            queries, power = as_fp16(queries)
            scale *= power
        scale *= tl.load(k_scale + head * stride_ks)
        queries = tl.where((scale < 0.0)[:, None], -queries, queries)
        scale = tl.abs(scale)
    # over_keys needs it above zero. At this scale all scores are equal.
    scale = tl.where(scale < FP8_TINY, FP8_TINY, scale)
    k_pool, v_pool = k_cache + head * stride_kh, v_cache + head * stride_vh
    table = block_table
    if BLOCK_SIZE > 0:
        table = block_table + b * stride_table
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    masked = first
    if BLOCK_M >= 64:  # bound by arithmetic: tiles that every row sees are not masked
        whole = (
            length - seqlen_q + (m_tile * BLOCK_M) // GROUP + 1 if CAUSAL else length
        ) // BLOCK_N
        masked = tl.maximum(first, tl.minimum(last, whole))
        acc, top, total = over_keys(
            acc, top, total, queries, k_pool, v_pool, b, table, first, masked, keys, limit, scale,
            num_blocks, stride_kb, stride_kt, stride_vb, stride_vt,
            False, HEAD_DIM, BLOCK_SIZE, BLOCK_N, NATIVE_FP8,
        )  # fmt: skip
    acc, top, total = over_keys(
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
        # A row that sees no key gives zeros; one whose scores are all -inf, 0 / 0.
        acc /= tl.where(limit < 0, 1.0, total)[:, None]
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
    num_splits,
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
    """Compute out = sum_s 2^(top_s - top) acc_s / sum_s 2^(top_s - top) total_s for one row."""
    row = tl.program_id(0)
    h, b = row % heads, row // heads // seqlen_q
    query = row // heads % seqlen_q
    m_tile = (query * GROUP + h % GROUP) // BLOCK_M
    length = length_of(cache_seqlens, b, capacity)
    keys = keys_seen(length, seqlen_q, m_tile, GROUP, CAUSAL, BLOCK_M)
    splits = splits_of(keys, num_splits, most, BLOCK_N)
    if splits == 1:
        return  # _attend has written it
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
    sees = length + query >= seqlen_q if CAUSAL else length > 0
    acc /= tl.where(sees, total, 1.0)
    at = out + b.to(tl.int64) * stride_ob + query.to(tl.int64) * stride_os
    at += h.to(tl.int64) * stride_oh
    tl.store(at + d, fp8.round_to(acc, out.dtype.element_ty), mask=d < HEAD_DIM)


# ---- the launcher ----


_tuner = common.Tuner("attention_with_kvcache", configs)


def decode_attention(
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
    """Fill out [B, Sq, H, D] from q [B, Sq, H, D], caches [B, S, Hkv, D], or paged [blocks,
    block_size, Hkv, D] with block_table int32 [B, n], and cache_seqlens int32 [B]; FP8 caches with
    fp32 scales [1] or [Hkv]. num_splits: how many splits a sequence has, at most one per tile; 0:
    by its length."""
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
        if num_splits:
            most = min(num_splits, cdiv(capacity, block_n))
        else:
            slots = chip.sms * resident(chip, config, q, k_cache)
            most = min(most_splits(kv_heads * m_tiles, slots), splits_wanted(capacity))
        most = max(1, most)
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
            num_splits,
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
            BLOCK_D=common.padded_dim(d),
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
                num_splits,
                most,
                *out.stride()[:3],
                config=config,
                CAUSAL=causal,
                GROUP=group,
                HEAD_DIM=d,
                COMBINED=COMBINED,
                BLOCK_D=common.padded_dim(d),
            )

    run(_tuner.choose(q, key, lambda config: run(config, torch.empty_like(out))), out)
