"""The op quantize_fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..dispatch import kernels
from ..reference import FP8_BLOCK, FP8_DTYPE
from . import checks
from .common import as_rows, new, register

_GRANULARITIES = ("tensor", "row", "block", "block_2d")


@checks.public
def quantize_fp8(
    x: Tensor, granularity: str = "row", *, scale_ub: float | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize x [..., cols] -> q e4m3 like x and fp32 scales, so that x is about q * scale.

    scale = max(min(amax|x|, scale_ub), tiny) / 448; q = e4m3(clamp(x / scale, -448, 448)). amax is
    over the whole tensor ("tensor", scale [1]), a row ("row", [rows, 1]), 128 columns of a row
    ("block", [rows, ceil(cols / 128)], for activations) or a 128 x 128 block ("block_2d",
    [ceil(rows / 128), ceil(cols / 128)], for weights). A zero row gives zeros and a finite scale; a
    NaN makes its whole group NaN. Source: Micikevicius et al., FP8 Formats, arXiv:2209.05433.
    """
    checks.activation("x", x)
    if not isinstance(granularity, str) or granularity not in _GRANULARITIES:
        got = checks.shown(granularity)
        raise ValueError(f"granularity: got {got}, want one of {_GRANULARITIES}")
    checks.bound("scale_ub", scale_ub)
    return _quantize_fp8_op(x, granularity, scale_ub)


def quantize(x: Tensor, granularity: str, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    """Return quantize_fp8 of arguments that are already checked."""
    on = kernels("quantize_fp8", x)
    if on is None:
        return reference.quantize_fp8(x, granularity, scale_ub=scale_ub)
    q, scale = _fake(x, granularity, scale_ub)
    if x.numel() or granularity == "tensor":
        on.quantize(q, scale, as_rows(x), granularity, scale_ub)
    return q, scale


def _fake(x: Tensor, granularity: str, scale_ub: float | None) -> tuple[Tensor, Tensor]:
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


_quantize_fp8_op = register(
    "quantize_fp8(Tensor x, str granularity, float? scale_ub) -> (Tensor, Tensor)", quantize, _fake
)
