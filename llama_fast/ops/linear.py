"""The ops fp8_gemm, fp8_linear, linear and pack_weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cpu, reference
from ..dispatch import kernels
from ..reference import FP8_BLOCK, PACK_ROWS
from . import checks
from .common import as_rows, register, wide, with_huge_pages
from .quantize import quantize


@checks.public
def fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return (a * scale_a) @ (b * scale_b)^T + bias, summed in fp32 and rounded once.

    a [M, K] and b [N, K] e4m3 -> [M, N] of out_dtype (bf16, fp16 or fp32). Scales are fp32, as
    quantize_fp8 makes them: [1], [rows, 1], 1x128 blocks, and for b 128x128 blocks. bias [N] has
    out_dtype. On sm_89 and sm_90 the tensor cores sum 128 of K with about 14 bits; these partial
    sums are added in fp32.
    """
    checks.has_dtype("a", a, checks.FP8)
    checks.has_shape("a", a, (None, None), "[M, K]")
    m, k = a.shape
    if k == 0:
        raise ValueError("a: got K = 0, want at least 1")
    checks.rows_contiguous("a", a)
    checks.like("b", b, "a", a)
    checks.has_shape("b", b, (None, k), "[N, K]")
    checks.rows_contiguous("b", b)
    _check_scale("scale_a", scale_a, m, k, "a", a)
    if scale_a.dim() == 2 and scale_a.shape[0] != m and scale_a.numel() != 1:
        raise ValueError(f"scale_a: got shape {list(scale_a.shape)}, want a row for each of {m}")
    _check_scale("scale_b", scale_b, b.shape[0], k, "a", a)
    if not isinstance(out_dtype, torch.dtype) or out_dtype not in checks.ACTIVATIONS:
        got = checks.shown(out_dtype)
        raise TypeError(f"out_dtype: got {got}, want bfloat16, float16 or float32")
    if bias is not None:
        checks.has_dtype("bias", bias, (out_dtype,))
        checks.like("bias", bias, "a", a, dtype=False)
        checks.has_shape("bias", bias, (b.shape[0],), "[N]")
        checks.rows_contiguous("bias", bias)
    return _fp8_gemm_op(a, b, scale_a, scale_b, bias, out_dtype)


@checks.public
def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    quantize_activation: bool | None = None,
    scale_ub: float | None = None,
) -> Tensor:
    """Return x @ (weight * weight_scale)^T + bias. The weight stays FP8 in memory.

    x [..., K], weight e4m3 [N, K] or packed by pack_weight, weight_scale fp32 [1], [N, 1] or by
    block, bias [N] of x's dtype -> [..., N]. quantize_activation: whether x is quantized too (by
    row, or in 1x128 blocks if the weight is in blocks; scale_ub bounds its amax). None lets the
    backend choose: yes on a GPU that multiplies e4m3 (sm_89 and newer), for every number of rows,
    so that a row does not depend on the batch; no on other GPUs and on CPUs, where only the
    weight's bytes cost time. On a GPU a row's last bits may differ between calls of up to 64 rows
    and of more. On a CPU with AMX and bf16 x, see linear.

    With LLAMA_FAST_CPU_INT16=on, None rounds x and the weight to 13 bits from 32 rows on, on CPUs
    with AVX2 and no AVX-512. That is 1.2 to 1.5 times as fast, with a relative error of about 2e-4;
    that of e4m3 weights is 2.6e-2. A row's bits then differ between calls of up to 31 rows and of
    more. torch.use_deterministic_algorithms prevents it.
    """
    checks.activation("x", x)
    checks.has_dtype("weight", weight, checks.FP8)
    checks.like("weight", weight, "x", x, dtype=False)
    n = _check_weight("weight", weight, x.shape[-1])
    _check_scale("weight_scale", weight_scale, n, x.shape[-1], "x", x)
    if bias is not None:
        checks.vector("bias", bias, n, "x", x)
    if quantize_activation is not None:
        checks.flag("quantize_activation", quantize_activation)
    checks.bound("scale_ub", scale_ub)
    return _fp8_linear_op(x, weight, weight_scale, bias, quantize_activation, scale_ub)


@checks.public
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias, summed in fp32 in an order that does not depend on the batch.

    x [..., K], weight of x's dtype [N, K] or packed by pack_weight, bias [N] -> [..., N]. On a CPU
    with AMX, oneDNN may compute bf16 x of at least 32 rows (backends() shows from how many), which
    changes a row's last bits. LLAMA_FAST_CPU_AMX=off or torch.use_deterministic_algorithms prevents
    it.
    """
    checks.activation("x", x)
    checks.like("weight", weight, "x", x)
    n = _check_weight("weight", weight, x.shape[-1])
    if bias is not None:
        checks.vector("bias", bias, n, "x", x)
    return _linear_op(x, weight, bias)


@checks.public
def pack_weight(weight: Tensor) -> Tensor:
    """Reorder [N, K] -> [N / 64, K / 2, 64, 2], which linear and fp8_linear read fastest on a CPU.

    weight: e4m3, bf16, fp16 or fp32; N a multiple of 64, K even. linear and fp8_linear give the
    same bits for it. packed[n // 64, k // 2, n % 64, k % 2] = weight[n, k].
    """
    checks.has_dtype("weight", weight, (*checks.FP8, *checks.ACTIVATIONS))
    checks.has_shape("weight", weight, (None, None), "[N, K]")
    if weight.shape[0] % PACK_ROWS or weight.shape[1] % 2 or weight.shape[1] == 0:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, want N a multiple of {PACK_ROWS} and K even"
        )
    checks.rows_contiguous("weight", weight)
    return _pack_weight_op(weight)


def out_features(weight: Tensor) -> int:
    return weight.shape[0] * (PACK_ROWS if weight.dim() == 4 else 1)


def prefers_fp8_activations(weight: Tensor) -> bool:
    """Return what quantize_activation=None means for fp8_linear on weight's device."""
    on = kernels("fp8_linear", weight, weight, None)  # depends on the chip, not on the shape
    return on is not None and on.prefers_fp8_activations(weight)


def _check_scale(name: str, scale: Tensor, rows: int, cols: int, other: str, o: Tensor) -> None:
    """Check for a scale of any granularity that fits an FP8 operand [rows, cols]."""
    checks.has_dtype(name, scale, checks.FP32)
    checks.like(name, scale, other, o, dtype=False)
    blocks = -(-cols // FP8_BLOCK)
    shapes = ((1,), (1, 1), (rows, 1), (rows, blocks), (-(-rows // FP8_BLOCK), blocks))
    if tuple(scale.shape) not in shapes:
        raise ValueError(
            f"{name}: got shape {list(scale.shape)}, want [1], [{rows}, 1], [{rows}, {blocks}] "
            f"or [{-(-rows // FP8_BLOCK)}, {blocks}]"
        )


def _check_weight(name: str, weight: Tensor, k: int) -> int:
    """Check for [N, K], or packed [N / 64, K / 2, 64, 2], and return N."""
    if weight.dim() == 4:
        checks.has_shape(
            name, weight, (None, k // 2, PACK_ROWS, 2), "packed [N / 64, K / 2, 64, 2]"
        )
        if k % 2 or not weight.is_contiguous():
            raise ValueError(f"{name}: got a packed weight that is not pack_weight's own output")
    else:
        checks.has_shape(name, weight, (None, k), "[N, K]")
        checks.rows_contiguous(name, weight)
    return out_features(weight)


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
    if weight.dim() == 4 and on is not cpu:
        raise ValueError(
            f"weight: got a packed weight {list(weight.shape)}, a layout for CPUs; want [N, K]"
        )
    out = with_huge_pages(x.new_empty((*x.shape[:-1], out_features(weight))))
    if not out.numel():
        return out
    rows, x_scale, run = as_rows(x), None, on.linear
    if quantize_activation is None:
        quantize_activation = on.prefers_fp8_activations(x)
        if on is cpu and cpu.rounds(rows.shape[0]):
            run = cpu.linear_int16
    if quantize_activation:
        blockwise = weight_scale.dim() == 2 and weight_scale.shape[1] > 1
        granularity = "block" if blockwise else "row"
        rows, x_scale = quantize(rows, granularity, scale_ub)
    run(as_rows(out), rows, weight, bias, x_scale, weight_scale.contiguous())
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    on = kernels("linear", x)
    if on is None:
        return reference.linear(x, weight, bias)
    out = with_huge_pages(x.new_empty((*x.shape[:-1], out_features(weight))))
    if out.numel():
        on.linear(as_rows(out), as_rows(x), weight, bias, None, None)
    return out


def _pack_weight(weight: Tensor) -> Tensor:
    on = kernels("pack_weight", weight)
    if on is None:
        return reference.pack_weight(weight)
    packed = _fake_pack_weight(weight)
    if packed.numel():
        cpu.pack_weight(packed, weight)
    return packed


def _fake_pack_weight(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return weight.new_empty((n // PACK_ROWS, k // 2, PACK_ROWS, 2))


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, grad @ weight; of weight, grad^T @ x, packed if weight is; and
    of bias, grad summed over rows."""
    x, weight = ctx.saved_tensors
    rows = as_rows(grad)
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = (rows @ reference.unpack_weight(weight)).view(x.shape)
    if ctx.needs_input_grad[1]:
        of_weight = rows.t() @ as_rows(x)
        if weight.dim() == 4:
            of_weight = reference.pack_weight(of_weight)
    if ctx.needs_input_grad[2]:
        of_bias = wide(rows).sum(0).to(grad.dtype)
    return of_x, of_weight, of_bias


def _setup_fp8_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _fp8_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, grad @ (weight * weight_scale), even if x was quantized; and of
    bias, grad summed over rows."""
    weight, scale = ctx.saved_tensors
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError(
            "fp8_linear: an FP8 weight has no gradient; freeze it and its scale by "
            "requires_grad_(False), or train a 16- or 32-bit weight"
        )
    rows = as_rows(grad)
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        dense = reference.dequantize_fp8(reference.unpack_weight(weight), scale, grad.dtype)
        of_x = (rows @ dense).view(*grad.shape[:-1], dense.shape[1])
    if ctx.needs_input_grad[3]:
        of_bias = wide(rows).sum(0).to(grad.dtype)
    return of_x, None, None, of_bias, None, None


def _pack_weight_backward(ctx: Any, grad: Tensor) -> Tensor:
    return reference.unpack_weight(grad)


def _cast_linear(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Any, ...]:
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _cast_fp8_linear(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Any, ...]:
    return x.to(dtype), weight, weight_scale, None if bias is None else bias.to(dtype), *rest


_fp8_gemm_op = register(
    "fp8_gemm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    _fp8_gemm,
    _fake_fp8_gemm,
)
_fp8_linear_op = register(
    "fp8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " bool? quantize_activation, float? scale_ub) -> Tensor",
    _fp8_linear,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], out_features(weight))),
    setup=_setup_fp8_linear,
    backward=_fp8_linear_backward,
    autocast=_cast_fp8_linear,
)
_linear_op = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], out_features(weight))),
    setup=_setup_linear,
    backward=_linear_backward,
    autocast=_cast_linear,
)
_pack_weight_op = register(
    "pack_weight(Tensor weight) -> Tensor",
    _pack_weight,
    _fake_pack_weight,
    backward=_pack_weight_backward,
)
