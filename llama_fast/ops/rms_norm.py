"""The ops rms_norm, add_rms_norm and rms_norm_fp8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import kernels
from ..reference import FP8_DTYPE
from . import checks
from .common import as_rows, new, new_scale, register, wide, with_huge_pages


@checks.public
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight.

    x [..., hidden], weight [hidden] of x's dtype -> [..., hidden]. x is normalized in fp32, rounded
    to x's dtype, then multiplied by the weight in x's dtype, as transformers' LlamaRMSNorm does.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    _check(x, weight, eps)
    return _rms_norm_op(x, weight, eps)


@checks.public
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) for s = x + residual, rounded to x's dtype.

    x and residual [..., hidden], weight [hidden] -> two tensors like x.
    """
    _check(x, weight, eps)
    _check_residual(residual, x)
    return _add_rms_norm_op(x, residual, weight, eps)


@checks.public
def rms_norm_fp8(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    scale_ub: float | None = None,
) -> tuple[Tensor, ...]:
    """Return rms_norm (with residual: add_rms_norm) quantized by row, in one pass.

    x [..., hidden] -> q e4m3 like x, scale fp32 [rows, 1] and, with residual, x + residual.
    scale_ub bounds a row's amax.
    """
    _check(x, weight, eps)
    checks.bound("scale_ub", scale_ub)
    if residual is None:
        return _rms_norm_fp8_op(x, weight, eps, scale_ub)
    _check_residual(residual, x)
    return _add_rms_norm_fp8_op(x, residual, weight, eps, scale_ub)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    checks.activation("x", x)
    checks.vector("weight", weight, x.shape[-1], "x", x)
    checks.number("eps", eps, 0.0)


def _check_residual(residual: Tensor, x: Tensor) -> None:
    checks.like("residual", residual, "x", x)
    checks.has_shape("residual", residual, x.shape, "x's shape")
    checks.rows_contiguous("residual", residual)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    on = kernels("rms_norm", x)
    if on is None:
        return reference.rms_norm(x, weight, eps)
    out = with_huge_pages(new(x))
    if x.numel():
        on.rms_norm(out, as_rows(x), weight, eps, None, None, None, None)
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    on = kernels("add_rms_norm", x)
    if on is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    out, total = with_huge_pages(new(x)), with_huge_pages(new(x))
    if x.numel():
        on.rms_norm(out, as_rows(x), weight, eps, as_rows(residual), total, None, None)
    return out, total


def _rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, scale_ub: float | None
) -> tuple[Tensor, Tensor]:
    on = kernels("rms_norm_fp8", x)
    if on is None:
        q, scale = reference.rms_norm_fp8(x, weight, eps, scale_ub=scale_ub)
        return q, scale
    q, scale = with_huge_pages(new(x, FP8_DTYPE)), new_scale(x)
    if x.numel():
        on.rms_norm(q, as_rows(x), weight, eps, None, None, scale, scale_ub)
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
        on.rms_norm(q, as_rows(x), weight, eps, as_rows(residual), total, scale, scale_ub)
    return q, scale, total


def _norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of rms_norm(x, weight), computed in fp32 and rounded once.

    With n = x * r, r = 1 / sqrt(mean(x^2) + eps) and g = grad * weight, the gradient of x is
    r * (g - n * mean(g * n)), and that of weight the sum of grad * n over the rows.
    """
    h, g, w = wide(x), wide(grad), wide(weight)
    r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    n = h * r
    of_x = of_weight = None
    if needs_weight:
        of_weight = as_rows(g * n).sum(0).to(weight.dtype)
    if needs_x:
        g = g * w
        of_x = (r * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype)
    return of_x, of_weight


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (*_norm_gradients(grad, x, weight, ctx.eps, *ctx.needs_input_grad[:2]), None)


def _setup_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _add_rms_norm_backward(
    ctx: Any, grad: Tensor | None, of_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    *needs_total, needs_weight = ctx.needs_input_grad[:3]
    of_sum, of_weight = of_total, None
    if grad is not None:
        of_sum, of_weight = _norm_gradients(
            grad, total, weight, ctx.eps, any(needs_total), needs_weight
        )
        if of_sum is not None and of_total is not None:
            of_sum = of_sum + of_total
    return of_sum, of_sum, of_weight, None


def _cast_rms_norm(dtype: torch.dtype, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Keep x's dtype: the norm is computed in fp32 anyway."""
    return x, weight.to(x.dtype), *rest


def _cast_add_rms_norm(
    dtype: torch.dtype, x: Tensor, residual: Tensor, weight: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """Promote x and residual to their common dtype, as their sum does."""
    both = torch.promote_types(x.dtype, residual.dtype)
    return x.to(both), residual.to(both), weight.to(both), *rest


_rms_norm_op = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    lambda x, weight, eps: new(x),
    setup=_setup_rms_norm,
    backward=_rms_norm_backward,
    autocast=_cast_rms_norm,
)
_add_rms_norm_op = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    lambda x, residual, weight, eps: (new(x), new(x)),
    setup=_setup_add_rms_norm,
    backward=_add_rms_norm_backward,
    autocast=_cast_add_rms_norm,
)
_rms_norm_fp8_op = register(
    "rms_norm_fp8(Tensor x, Tensor weight, float eps, float? scale_ub) -> (Tensor, Tensor)",
    _rms_norm_fp8,
    lambda x, weight, eps, scale_ub: (new(x, FP8_DTYPE), new_scale(x)),
    autocast=_cast_rms_norm,
)
_add_rms_norm_fp8_op = register(
    "add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, float eps, float? scale_ub)"
    " -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_fp8,
    lambda x, residual, weight, eps, scale_ub: (new(x, FP8_DTYPE), new_scale(x), new(x)),
    autocast=_cast_add_rms_norm,
)
