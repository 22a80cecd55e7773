"""Registers rms_norm, add_rms_norm and both with FP8 output."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..backends import kernels
from ..reference import FP8_DTYPE
from .common import as_rows, new, new_scale, register, with_huge_pages


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    on = kernels("rms_norm", x)
    if on is None:
        return reference.rms_norm(x, weight, eps)
    out = with_huge_pages(new(x))
    if x.numel():
        on.rms_norm(as_rows(out), as_rows(x), weight, eps)
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    on = kernels("add_rms_norm", x)
    if on is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    out, residual_out = with_huge_pages(new(x)), with_huge_pages(new(x))
    if x.numel():
        on.rms_norm(as_rows(out), as_rows(x), weight, eps, as_rows(residual), as_rows(residual_out))
    return out, residual_out


def _rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, scale_ub: float | None
) -> tuple[Tensor, Tensor]:
    on = kernels("rms_norm_fp8", x)
    if on is None:
        q, scale = reference.rms_norm_fp8(x, weight, eps, scale_ub=scale_ub)
        return q, scale
    q, scale = with_huge_pages(new(x, FP8_DTYPE)), new_scale(x)
    if x.numel():
        on.rms_norm(as_rows(q), as_rows(x), weight, eps, scale=scale, scale_ub=scale_ub)
    return q, scale


def _add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale_ub: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    on = kernels("rms_norm_fp8", x)
    if on is None:
        q, scale, total = reference.rms_norm_fp8(
            x, weight, eps, residual=residual, scale_ub=scale_ub
        )
        return q, scale, total
    q, scale, total = with_huge_pages(new(x, FP8_DTYPE)), new_scale(x), with_huge_pages(new(x))
    if x.numel():
        on.rms_norm(
            as_rows(q), as_rows(x), weight, eps, as_rows(residual), as_rows(total), scale, scale_ub
        )
    return q, scale, total


register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    lambda x, weight, eps: new(x),
)
register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    lambda x, residual, weight, eps: (new(x), new(x)),
)
register(
    "rms_norm_fp8(Tensor x, Tensor weight, float eps, float? scale_ub) -> (Tensor, Tensor)",
    _rms_norm_fp8,
    lambda x, weight, eps, scale_ub: (new(x, FP8_DTYPE), new_scale(x)),
)
register(
    "add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, float eps, float? scale_ub)"
    " -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_fp8,
    lambda x, residual, weight, eps, scale_ub: (new(x, FP8_DTYPE), new_scale(x), new(x)),
)
