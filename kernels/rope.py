"""Compute apply_rope and apply_rope_and_append in one kernel.

    (a, b) -> (a cos - b sin, b cos + a sin)      (fp32, rounded to dtype once)

for pairs (i, i + D / 2), or (2i, 2i + 1) when interleaved; cos and sin come from the fp32 table,
at the token's position. With caches, a token's k and v [Hkv, D] are written to its slot, block *
block_size + offset; to an FP8 cache as e4m3(clamp(k / k_scale)).

Why fused: unfused, q, k and the append are four launches, and k is written and read once more. In
decode a launch costs more than its bytes.

Cost per token of 8B (H 32, Hkv 8, D 128, 16 bits): 10 KB read and 10 KB written; with append, where
v is copied, 12 KB each; 512 bytes of table, from L2 when positions repeat. 3 flops an element.

How: a program takes one token, up to 4096 elements of its q and the matching share of its k and v
heads. It issues every load but the table's before it waits: 12 KB a program and 8 programs an SM
are three times what 4.3 TB/s needs in flight. The halves of a head are two runs of 64 elements,
read 16 bytes a thread; interleaved pairs are read whole, split in registers and joined again. Each
product and sum is rounded (no fma: enable_fp_fusion=False), so that the result equals eager
PyTorch's bit for bit. Not yet measured.

The host does not read positions and slots. A position outside the table makes the token's q and k
NaN; a slot outside the cache, such as -1, writes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, fp8
from .common import Chip, Config, Tuner
from .fp8 import divide_to_e4m3, round_to, to_fp32


@triton.jit
def _load_heads(x, head, head_stride, keep, D, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the two members of each pair of a token's heads, [HEADS, HALF]. x: the token's."""
    if INTERLEAVED:
        col = tl.arange(0, 2 * HALF)[None, :]
        at = head.to(tl.int64)[:, None] * head_stride + col
        pairs = tl.load(x + at, mask=keep & (col < D), other=0.0)
        a, b = tl.split(tl.reshape(pairs, [pairs.shape[0], HALF, 2]))
    else:
        col = tl.arange(0, HALF)[None, :]
        at = head.to(tl.int64)[:, None] * head_stride + col
        keep = keep & (col < D // 2)
        a = tl.load(x + at, mask=keep, other=0.0)
        b = tl.load(x + (at + D // 2), mask=keep, other=0.0)
    return a, b


@triton.jit
def _store_heads(
    x, head, head_stride, keep, a, b, D, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Store what _load_heads returns."""
    if INTERLEAVED:
        col = tl.arange(0, 2 * HALF)[None, :]
        at = head.to(tl.int64)[:, None] * head_stride + col
        tl.store(x + at, tl.reshape(tl.join(a, b), [a.shape[0], 2 * HALF]), mask=keep & (col < D))
    else:
        col = tl.arange(0, HALF)[None, :]
        at = head.to(tl.int64)[:, None] * head_stride + col
        keep = keep & (col < D // 2)
        tl.store(x + at, a, mask=keep)
        tl.store(x + (at + D // 2), b, mask=keep)


@triton.jit
def _rotate(a, b, cos, sin, DTYPE: tl.constexpr):
    a, b = to_fp32(a), to_fp32(b)
    return round_to(a * cos - b * sin, DTYPE), round_to(b * cos + a * sin, DTYPE)


@triton.jit
def _to_cache(
    x, scale, head, mine, SCALE_STRIDE: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr
):
    """Convert a block [HEADS, HALF] to the cache's type. scale: fp32 [1] or [Hkv], for e4m3."""
    if FP8:
        by = tl.load(scale + head * SCALE_STRIDE, mask=mine, other=1.0)[:, None]
        return divide_to_e4m3(to_fp32(x), by, True, NATIVE)
    else:
        return x


@triton.jit
def _rope_kernel(
    q_out,  # [T, H, D], contiguous
    k_out,  # [T, Hkv, D], contiguous; without caches
    q,  # [T, H, D] of any strides
    k,  # [T, Hkv, D] of any strides
    v,  # [T, Hkv, D] of any strides; with caches
    k_cache,  # [blocks, block_size, Hkv, D] of any strides; e4m3 as uint8 with k_scale
    v_cache,
    k_scale,  # fp32, [1] or [Hkv]
    v_scale,
    positions,  # [T] int32 or int64
    slots,  # [T] int32 or int64
    table,  # [max_positions, D] fp32: cos | sin
    q_token,  # strides
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    k_block,
    k_offset,
    k_cache_head,
    v_block,
    v_offset,
    v_cache_head,
    table_row,
    max_positions,
    num_slots,
    block_size,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    APPEND: tl.constexpr,
    FP8: tl.constexpr,
    K_SCALE_STRIDE: tl.constexpr,  # 0 for a scale [1]
    V_SCALE_STRIDE: tl.constexpr,
    NATIVE: tl.constexpr,
    PARTS: tl.constexpr,  # programs per token
):
    Q_HEADS: tl.constexpr = (H + PARTS - 1) // PARTS  # a program's share
    K_HEADS: tl.constexpr = (HKV + PARTS - 1) // PARTS
    HALF: tl.constexpr = triton.next_power_of_2(D // 2)
    DTYPE: tl.constexpr = q.dtype.element_ty
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS

    position = tl.load(positions + token).to(tl.int64)
    q_at, k_at = (
        tl.arange(0, triton.next_power_of_2(Q_HEADS)),
        tl.arange(0, triton.next_power_of_2(K_HEADS)),
    )
    q_mine = (q_at < Q_HEADS) & (part * Q_HEADS + q_at < H)
    k_mine = (k_at < K_HEADS) & (part * K_HEADS + k_at < HKV)
    q_at += part * Q_HEADS
    k_at += part * K_HEADS
    q_keep, k_keep = q_mine[:, None], k_mine[:, None]
    qa, qb = _load_heads(q + token * q_token, q_at, q_head, q_keep, D, HALF, INTERLEAVED)
    ka, kb = _load_heads(k + token * k_token, k_at, k_head, k_keep, D, HALF, INTERLEAVED)
    if APPEND:
        col = tl.arange(0, 2 * HALF)[None, :]
        v_keep = k_keep & (col < D)
        v_from = v + token * v_token + k_at.to(tl.int64)[:, None] * v_head + col
        value = tl.load(v_from, mask=v_keep, other=0.0)
        slot = tl.load(slots + token).to(tl.int64)
    # Nothing above needs a loaded value. Without a barrier, which loads do not cross, the assembler
    # delays half of them until registers are free; with it all are in flight here.
    tl.debug_barrier()

    # No angles, so NaN, for a position outside the table.
    angles = tl.where((position >= 0) & (position < max_positions), D // 2, 0)
    i = tl.arange(0, HALF)
    angle = table + position * table_row + i
    cos = tl.load(angle, mask=i < angles, other=float("nan"))[None, :]
    sin = tl.load(angle + D // 2, mask=i < angles, other=float("nan"))[None, :]

    qa, qb = _rotate(qa, qb, cos, sin, DTYPE)
    _store_heads(q_out + token * (H * D), q_at, D, q_keep, qa, qb, D, HALF, INTERLEAVED)
    ka, kb = _rotate(ka, kb, cos, sin, DTYPE)
    if APPEND:
        written = tl.where((slot >= 0) & (slot < num_slots), HKV, 0)  # heads
        held = (k_at < written)[:, None]
        block, offset = slot // block_size, slot % block_size
        ka = _to_cache(ka, k_scale, k_at, k_mine, K_SCALE_STRIDE, FP8, NATIVE)
        kb = _to_cache(kb, k_scale, k_at, k_mine, K_SCALE_STRIDE, FP8, NATIVE)
        to = k_cache + block * k_block + offset * k_offset
        _store_heads(to, k_at, k_cache_head, k_keep & held, ka, kb, D, HALF, INTERLEAVED)
        value = _to_cache(value, v_scale, k_at, k_mine, V_SCALE_STRIDE, FP8, NATIVE)
        to = v_cache + block * v_block + offset * v_offset
        to += k_at.to(tl.int64)[:, None] * v_cache_head + col
        tl.store(to, value, mask=v_keep & held)
    else:
        _store_heads(k_out + token * (HKV * D), k_at, D, k_keep, ka, kb, D, HALF, INTERLEAVED)


def _configs(chip: Chip, heads: int, head_dim: int) -> list[Config]:
    """Return configurations of up to 4096 elements of q a program, 32 a thread (with k and v, 6
    loads of 16 bytes in flight); then 16 a thread; then 2048 elements a program."""
    found = []
    for most, each in ((4096, 32), (4096, 16), (2048, 16)):  # 32 of 2048 would spill
        elements = heads * common.next_power_of_2(head_dim)
        parts = min(heads, common.cdiv(elements, most))
        threads = common.next_power_of_2(elements // parts // each)
        warps = min(16, max(1, threads // chip.warp_size))
        config = Config.of(warps, 1, PARTS=parts)
        if config not in found:
            found.append(config)
    return found


_tuner = Tuner("rope", _configs)


def rope(
    q_out: Tensor,
    k_out: Tensor | None,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    table: Tensor,
    interleaved: bool,
    v: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotate q [T, H, D] into q_out and k [T, Hkv, D] into k_out, both contiguous; or, with v, both
    caches [blocks, block_size, Hkv, D] and slots, write k and v to the caches. With k_scale and
    v_scale (fp32 [1] or [Hkv]) the caches are e4m3."""
    tokens, heads, head_dim = q.shape
    chip = common.chip_of(q)
    append = k_cache is not None and v_cache is not None
    cache_strides: tuple[int, ...] = (0,) * 6
    num_slots = block_size = 1
    if k_cache is not None and v_cache is not None:
        cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
        block_size = k_cache.shape[1]
        num_slots = k_cache.shape[0] * block_size
        if k_scale is not None:
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)

    def run(config: Config) -> None:
        common.launch(
            _rope_kernel,
            (tokens * config["PARTS"],),
            q_out,
            k_out,
            q,
            k,
            v,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            positions,
            slots,
            table,
            *q.stride()[:2],
            *k.stride()[:2],
            *((0, 0) if v is None else v.stride()[:2]),
            *cache_strides,
            table.stride(0),
            table.shape[0],
            num_slots,
            block_size,
            H=heads,
            HKV=k.shape[1],
            D=head_dim,
            INTERLEAVED=interleaved,
            APPEND=append,
            FP8=k_scale is not None,
            K_SCALE_STRIDE=0 if k_scale is None or k_scale.numel() == 1 else 1,
            V_SCALE_STRIDE=0 if v_scale is None or v_scale.numel() == 1 else 1,
            NATIVE=fp8.native(chip),
            enable_fp_fusion=False,
            config=config,
        )

    # Tuning may repeat this: it rewrites a slot with the same values.
    run(_tuner.choose(q, (heads, head_dim), run))
