"""Registers attention and attention_with_kvcache."""

from __future__ import annotations

from torch import Tensor

from .. import _cpu, reference
from ..backends import kernels
from .common import check_range, new, register, with_huge_pages


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> None:
    if cu_seqlens.device.type != "cpu":
        return
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
        raise ValueError(
            f"{name}: got {starts if len(starts) < 9 else [*starts[:4], '...', *starts[-4:]]}, "
            f"want non-decreasing offsets from 0 to the {total} packed tokens"
        )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    on = kernels("attention", q)
    if on is None:
        return reference.attention(
            q,
            k,
            v,
            causal=causal,
            softmax_scale=softmax_scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    out = with_huge_pages(new(q))
    if out.numel():
        on.attention(out, q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k)
    return out


def _check_cache(cache_seqlens: Tensor, block_table: Tensor | None, k_cache: Tensor) -> None:
    """Every length fits the cache and every block id that a length reaches exists."""
    blocks, block_size = k_cache.shape[:2]
    if cache_seqlens.device.type != "cpu":
        return
    if block_table is None:
        check_range("cache_seqlens", cache_seqlens, 0, block_size)
        return
    check_range("cache_seqlens", cache_seqlens, 0, block_table.shape[1] * block_size)
    bad = _cpu.first_bad_block(
        block_table.data_ptr(),
        block_table.stride(0),
        cache_seqlens.data_ptr(),
        cache_seqlens.numel(),
        block_size,
        blocks,
    )
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
        on.attention_with_kvcache(
            out,
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            block_table,
            causal,
            softmax_scale,
            num_splits,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    return out


register(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float softmax_scale,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> Tensor",
    _attention,
    lambda q, *_: new(q),
)
register(
    "attention_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,"
    " Tensor? block_table, bool causal, float softmax_scale, int num_splits,"
    " Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _attention_with_kvcache,
    lambda q, *_: new(q),
)
