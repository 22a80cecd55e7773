"""Registers silu_and_mul and the same with FP8 output."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..backends import kernels
from ..reference import FP8_DTYPE
from .common import as_rows, new, new_scale, register, with_huge_pages


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    on = kernels("silu_and_mul", gate_up)
    if on is None:
        return reference.silu_and_mul(gate_up)
    out = with_huge_pages(_fake_silu_and_mul(gate_up))
    if out.numel():
        on.silu_and_mul(as_rows(out), as_rows(gate_up))
    return out


def _fake_silu_and_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _silu_and_mul_fp8(gate_up: Tensor, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    on = kernels("silu_and_mul_fp8", gate_up)
    if on is None:
        return reference.silu_and_mul_fp8(gate_up, scale_ub=scale_ub)
    q, scale = _fake_silu_and_mul_fp8(gate_up, scale_ub)
    if q.numel():
        on.silu_and_mul(as_rows(q), as_rows(gate_up), scale, scale_ub)
    return q, scale


def _fake_silu_and_mul_fp8(gate_up: Tensor, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    out = _fake_silu_and_mul(gate_up)
    return new(out, FP8_DTYPE), new_scale(out)


register("silu_and_mul(Tensor gate_up) -> Tensor", _silu_and_mul, _fake_silu_and_mul)
register(
    "silu_and_mul_fp8(Tensor gate_up, float? scale_ub) -> (Tensor, Tensor)",
    _silu_and_mul_fp8,
    _fake_silu_and_mul_fp8,
)
