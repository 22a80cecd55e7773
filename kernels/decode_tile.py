"""Device functions of decode_attention.py: the keys that a program sees, loads of tiles of the
cache, and the online softmax over them."""

from __future__ import annotations

import triton
import triton.language as tl

from . import fp8
from .decode_plan import LONG_SPLIT, SHORT_SPLIT, SHORT_SPLITS


@triton.jit
def length_of(cache_seqlens, b, capacity):
    return tl.minimum(tl.maximum(tl.load(cache_seqlens + b), 0), capacity)


@triton.jit
def keys_seen(
    length, seqlen_q, tile, GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return how many keys the last query of a tile of rows sees."""
    if not CAUSAL:
        return length
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    return tl.maximum(length - seqlen_q + last + 1, 0)


@triton.jit
def splits_of(keys, num_splits, most, BLOCK_N: tl.constexpr):
    """Return how many splits `keys` keys have: num_splits, or where it is 0 by the keys alone."""
    splits = tl.maximum(keys // LONG_SPLIT, tl.minimum(keys // SHORT_SPLIT, SHORT_SPLITS))
    splits = tl.where(num_splits == 0, splits, num_splits)
    return tl.maximum(tl.minimum(tl.minimum(splits, most), tl.cdiv(keys, BLOCK_N)), 1)


@triton.jit
def _block_ids(table, tile, keys, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the ids of the blocks that hold a tile of keys: one where no tile crosses a block's end,
    else one for each key, [BLOCK_N]. Past the last key it is -1, and the table is not read."""
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
    """Load keys or values [BLOCK_N, BLOCK_D] in DTYPE."""
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
def as_fp16(q):
    """Split q, bf16 [BLOCK_M, BLOCK_D], into fp16 and a power of two per row, fp32 [BLOCK_M], whose
    product is q. Elements below 2^-14 of their row's largest are off by at most 2^-25 of it.

    One instruction converts two e4m3 to fp16; bf16 would take two more for each element, at a
    quarter of the rate: more time than the memory takes."""
    x = fp8.to_fp32(q)
    exponent = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return (x * inverse[:, None]).to(tl.float16), exponent.to(tl.float32, bitcast=True)


@triton.jit
def over_keys(
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
    scale,  # [BLOCK_M]: of the scores, to base 2; above zero, so that it keeps their order
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
    """Continue the online softmax over tiles of keys [first, last)."""
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
        scores = fp8.dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        if MASK:
            scores = tl.where(seen & (position[None, :] <= limit[:, None]), scores, -float("inf"))
        elif PAGED:
            scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        base = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        # An explicit fma, so that a key rounds alike, masked or not, paged or not.
        p = tl.exp2(tl.fma(scores, scale[:, None], -base[:, None]))
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = fp8.dot(fp8.round_to(p, q.dtype), v, acc * shrink[:, None])
        top = higher
    return acc, top, total
