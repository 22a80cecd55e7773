"""Registers apply_rope, and apply_rope_and_append, which writes the KV cache."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..backends import kernels
from .common import check_range, new, register, with_huge_pages


def _apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    positions = positions.contiguous()
    check_range("positions", positions, 0, table.shape[0] - 1)
    on = kernels("apply_rope", q)
    if on is None:
        return reference.apply_rope(q, k, positions, table, interleaved=interleaved)
    q_out, k_out = with_huge_pages(new(q)), with_huge_pages(new(k))
    if positions.numel():
        on.rope(q_out, k_out, q, k, positions, table, interleaved)
    return q_out, k_out


def _apply_rope_and_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    positions, slots = positions.contiguous(), slots.contiguous()
    check_range("positions", positions, 0, table.shape[0] - 1)
    check_range("slots", slots, -1, k_cache.shape[0] * k_cache.shape[1] - 1)
    on = kernels("apply_rope_and_append", q)
    if on is None:
        return reference.apply_rope_and_append(
            q,
            k,
            v,
            positions,
            table,
            k_cache,
            v_cache,
            slots,
            interleaved=interleaved,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    q_out = with_huge_pages(new(q))
    if positions.numel():
        on.rope(
            q_out,
            None,
            q,
            k,
            positions,
            table,
            interleaved,
            v,
            k_cache,
            v_cache,
            slots,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    return q_out


register(
    "apply_rope(Tensor q, Tensor k, Tensor positions, Tensor table, bool interleaved)"
    " -> (Tensor, Tensor)",
    _apply_rope,
    lambda q, k, positions, table, interleaved: (new(q), new(k)),
)
register(
    "apply_rope_and_append(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor table,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, bool interleaved,"
    " Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _apply_rope_and_append,
    lambda q, *_: new(q),
)
