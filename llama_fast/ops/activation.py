"""The ops silu_and_mul and silu_and_mul_fp8."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch import kernels
from ..reference import FP8_DTYPE
from . import checks
from .common import as_rows, new_scale, register, with_huge_pages


@checks.public
def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, the middle of SwiGLU. gate_up [..., 2 * I], gate first -> [..., I].

    silu(gate) is rounded to the dtype before the product, as in eager PyTorch.
    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    _check(gate_up)
    return _silu_and_mul_op(gate_up)


@checks.public
def silu_and_mul_fp8(gate_up: Tensor, *, scale_ub: float | None = None) -> tuple[Tensor, Tensor]:
    """Return silu_and_mul quantized by row: [..., 2 * I] -> e4m3 [..., I], scale fp32 [rows, 1]."""
    _check(gate_up)
    checks.bound("scale_ub", scale_ub)
    return _silu_and_mul_fp8_op(gate_up, scale_ub)


def _check(gate_up: Tensor) -> None:
    checks.activation("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got shape {list(gate_up.shape)}, want [..., 2 * I], gate first")


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    on = kernels("silu_and_mul", gate_up)
    if on is None:
        return reference.silu_and_mul(gate_up)
    out = with_huge_pages(_half(gate_up))
    if out.numel():
        on.activation(out, as_rows(gate_up), None, None)
    return out


def _silu_and_mul_fp8(gate_up: Tensor, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    on = kernels("silu_and_mul_fp8", gate_up)
    if on is None:
        return reference.silu_and_mul_fp8(gate_up, scale_ub=scale_ub)
    q, scale = _fake_silu_and_mul_fp8(gate_up, scale_ub)
    if q.numel():
        on.activation(q, as_rows(gate_up), scale, scale_ub)
    return q, scale


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_silu_and_mul_fp8(gate_up: Tensor, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return gate_up.new_empty(shape, dtype=FP8_DTYPE), new_scale(gate_up)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _silu_and_mul_backward(ctx: Any, grad: Tensor) -> Tensor:
    """Return gate_up's gradient, silu'(gate) * (grad * up) and silu(gate) * grad, with the bits of
    eager PyTorch. Computed in fp32 throughout, it took 4 times as long."""
    (gate_up,) = ctx.saved_tensors
    gate, up = gate_up.chunk(2, dim=-1)
    of_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat((of_gate, grad * F.silu(gate)), dim=-1)


_silu_and_mul_op = register(
    "silu_and_mul(Tensor gate_up) -> Tensor",
    _silu_and_mul,
    _half,
    setup=_setup,
    backward=_silu_and_mul_backward,
)
_silu_and_mul_fp8_op = register(
    "silu_and_mul_fp8(Tensor gate_up, float? scale_ub) -> (Tensor, Tensor)",
    _silu_and_mul_fp8,
    _fake_silu_and_mul_fp8,
)
