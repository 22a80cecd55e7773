"""The op attention_with_kvcache: decode, speculative decode and chunked prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _cpu, reference
from ..dispatch import kernels
from . import checks
from .common import check_range, new, register, with_huge_pages


@checks.public
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Return attention of q over a KV cache: decode (Sq = 1), speculative decode, chunked prefill.

    q [B, Sq, H, D]; caches [B, S, Hkv, D] of any strides, or paged [blocks, block_size, Hkv, D]
    with block_table [B, n] int32 -> [B, Sq, H, D]. cache_seqlens [B] int32: valid tokens per
    sequence, including those of this call's queries; entries beyond them are never used. causal is
    bottom-right aligned against cache_seqlens. num_splits: the number of splits of the keys over
    threads or SMs; 0 is automatic, and a sequence's result then does not depend on the rest of the
    batch. k_scale and v_scale, fp32 [1] or [Hkv], multiply the entries of FP8 caches (e4m3). They
    are required with FP8 caches and refused with caches of q's dtype.
    """
    checks.activation("q", q)
    checks.has_shape("q", q, (None, None, None, None), "[B, Sq, H, D]")
    batch, _, heads, d = q.shape
    checks.head_dim(d)
    blocks = batch if block_table is None else None
    spelled = "[B, S, Hkv, D]" if block_table is None else "[blocks, block_size, Hkv, D]"
    checks.cache_scales(q, k_cache, v_cache, k_scale, v_scale)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.has_shape(name, cache, (blocks, None, None, d), spelled)
        checks.rows_contiguous(name, cache)
    checks.has_shape("v_cache", v_cache, tuple(k_cache.shape), "k_cache's shape")
    checks.heads(heads, k_cache.shape[2])
    checks.has_dtype("cache_seqlens", cache_seqlens, checks.INT32)
    checks.like("cache_seqlens", cache_seqlens, "q", q, dtype=False)
    checks.has_shape("cache_seqlens", cache_seqlens, (batch,), "[B]")
    if block_table is not None:
        checks.has_dtype("block_table", block_table, checks.INT32)
        checks.like("block_table", block_table, "q", q, dtype=False)
        checks.has_shape("block_table", block_table, (batch, None), "[B, n]")
    checks.flag("causal", causal)
    checks.integer("num_splits", num_splits, 0)
    scale = checks.softmax_scale(softmax_scale, d)
    return _attention_with_kvcache_op(
        q, k_cache, v_cache, cache_seqlens, block_table, causal, scale, num_splits, k_scale, v_scale
    )


def _check_cache(cache_seqlens: Tensor, block_table: Tensor | None, k_cache: Tensor) -> None:
    """Raise ValueError unless every length fits the cache and every block id in use exists."""
    blocks, block_size = k_cache.shape[:2]
    if not cache_seqlens.is_cpu:
        return
    if block_table is None:
        check_range("cache_seqlens", cache_seqlens, 0, block_size)
        return
    check_range("cache_seqlens", cache_seqlens, 0, block_table.shape[1] * block_size)
    bad = _cpu.first_bad_block(block_table, cache_seqlens, block_size, blocks)
    if bad is not None:
        row, column, block = bad
        raise ValueError(
            f"block_table: got block {block} at [{row}, {column}], want 0 to {blocks - 1}"
        )


def _attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    causal: bool,
    softmax_scale: float,
    num_splits: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    cache_seqlens = cache_seqlens.contiguous()
    if block_table is not None and block_table.shape[1] > 1 and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    _check_cache(cache_seqlens, block_table, k_cache)
    on = kernels("attention_with_kvcache", q, k_cache)
    if on is None:
        return reference.attention_with_kvcache(
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            block_table=block_table,
            causal=causal,
            softmax_scale=softmax_scale,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    out = with_huge_pages(new(q))
    if out.numel():
        on.decode_attention(
            out,
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            block_table,
            causal,
            softmax_scale,
            num_splits,
            k_scale,
            v_scale,
        )
    return out


def _cast(dtype: torch.dtype, q: Tensor, k_cache: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Cast q to the cache's dtype, or to autocast's for an FP8 cache."""
    return q.to(dtype if k_cache.itemsize == 1 else k_cache.dtype), k_cache, *rest


_attention_with_kvcache_op = register(
    "attention_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,"
    " Tensor? block_table, bool causal, float softmax_scale, int num_splits,"
    " Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _attention_with_kvcache,
    lambda q, *_: new(q),
    autocast=_cast,
)
