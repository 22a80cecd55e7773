"""Registers the products with a weight: fp8_gemm, fp8_linear, linear; and pack_weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import kernels
from ..reference import PACK_ROWS
from .common import as_rows, register, with_huge_pages
from .quantize import quantize_fp8


def _fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    on = kernels("fp8_gemm", a, scale_b, out_dtype)
    if on is None:
        return reference.fp8_gemm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
    out = with_huge_pages(_fake_fp8_gemm(a, b, scale_a, scale_b, bias, out_dtype))
    if out.numel():
        on.linear(out, a, b, bias, scale_a.contiguous(), scale_b.contiguous())
    return out


def _fake_fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def out_features(weight: Tensor) -> int:
    return weight.shape[0] * (PACK_ROWS if weight.dim() == 4 else 1)


def prefers_fp8_activations(weight: Tensor) -> bool:
    """What quantize_activation=None means for fp8_linear on weight's device."""
    on = kernels("fp8_linear", weight, weight, None)  # a chip's, whatever the shape
    return on is not None and on.prefers_fp8_activations(weight)


def _fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    quantize_activation: bool | None,
    scale_ub: float | None,
) -> Tensor:
    on = kernels("fp8_linear", x, weight_scale, quantize_activation)
    if on is None:
        return reference.fp8_linear(
            x,
            weight,
            weight_scale,
            bias,
            quantize_activation=quantize_activation,
            scale_ub=scale_ub,
        )
    if weight.dim() == 4 and not hasattr(on, "pack_weight"):
        raise ValueError(
            f"weight: got a packed weight {list(weight.shape)}, a layout for CPUs; want [N, K]"
        )
    out = with_huge_pages(x.new_empty((*x.shape[:-1], out_features(weight))))
    if not out.numel():
        return out
    rows, x_scale = as_rows(x), None
    if quantize_activation is None:
        quantize_activation = on.prefers_fp8_activations(x)
    if quantize_activation:
        blockwise = weight_scale.dim() == 2 and weight_scale.shape[1] > 1
        granularity = "block" if blockwise else "row"
        rows, x_scale = quantize_fp8(rows, granularity, scale_ub)
    on.linear(as_rows(out), rows, weight, bias, x_scale, weight_scale.contiguous())
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    on = kernels("linear", x)
    if on is None:
        return reference.linear(x, weight, bias)
    out = with_huge_pages(x.new_empty((*x.shape[:-1], out_features(weight))))
    if out.numel():
        on.linear(as_rows(out), as_rows(x), weight, bias)
    return out


def _pack_weight(weight: Tensor) -> Tensor:
    on = kernels("pack_weight", weight)
    if on is None:
        return reference.pack_weight(weight)
    packed = _fake_pack_weight(weight)
    if packed.numel():
        on.pack_weight(packed, weight)
    return packed


def _fake_pack_weight(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return weight.new_empty((n // PACK_ROWS, k // 2, PACK_ROWS, 2))


register(
    "fp8_gemm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    _fp8_gemm,
    _fake_fp8_gemm,
)
register(
    "fp8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " bool? quantize_activation, float? scale_ub) -> Tensor",
    _fp8_linear,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], out_features(weight))),
)
register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], out_features(weight))),
)
register("pack_weight(Tensor weight) -> Tensor", _pack_weight, _fake_pack_weight)
