"""Registers quantize_fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import kernels
from ..reference import FP8_BLOCK, FP8_DTYPE
from .common import as_rows, new, register


def quantize_fp8(x: Tensor, granularity: str, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    on = kernels("quantize_fp8", x)
    if on is None:
        return reference.quantize_fp8(x, granularity, scale_ub=scale_ub)
    q, scale = _fake_quantize_fp8(x, granularity, scale_ub)
    if x.numel() or granularity == "tensor":
        on.quantize_fp8(as_rows(q), scale, as_rows(x), granularity, scale_ub)
    return q, scale


def _fake_quantize_fp8(
    x: Tensor, granularity: str, scale_ub: float | None
) -> tuple[Tensor, Tensor]:
    cols = x.shape[-1]
    rows = x.numel() // cols
    blocks = (cols + FP8_BLOCK - 1) // FP8_BLOCK
    shapes: dict[str, tuple[int, ...]] = {
        "tensor": (1,),
        "row": (rows, 1),
        "block": (rows, blocks),
        "block_2d": ((rows + FP8_BLOCK - 1) // FP8_BLOCK, blocks),
    }
    return new(x, FP8_DTYPE), x.new_empty(shapes[granularity], dtype=torch.float32)


register(
    "quantize_fp8(Tensor x, str granularity, float? scale_ub) -> (Tensor, Tensor)",
    quantize_fp8,
    _fake_quantize_fp8,
)
