"""What every op's registration uses: the way into torch.library, outputs, a check of values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _cpu

_lib = torch.library.Library("llama_fast", "DEF")


def register(schema: str, impl: Any, fake: Any) -> None:
    """impl serves CPU and CUDA tensors; fake gives empty outputs of the same shapes and strides."""
    _lib.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    name = schema.split("(", 1)[0]
    _lib.impl(name, impl, "CPU")
    _lib.impl(name, impl, "CUDA")
    torch.library.register_fake(f"llama_fast::{name}", fake, lib=_lib)


def as_rows(t: Tensor) -> Tensor:
    """[..., n] -> [rows, n]: a view where strides allow, else a copy."""
    return t.reshape(-1, t.shape[-1])


def new(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty, contiguous, of t's shape, and of its dtype unless another is given."""
    return torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device)


# From here on the C library maps every allocation anew (glibc's M_MMAP_THRESHOLD at its highest).
_MAPPED = 32 << 20  # bytes


def with_huge_pages(out: Tensor) -> Tensor:
    """out, just allocated and not written yet. The system hands out a large one page by page as it
    is written, at a fault each, which takes longer than the op: on a CPU huge pages are asked for.
    """
    if out.is_cpu and out.nbytes >= _MAPPED:
        _cpu.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def new_scale(t: Tensor) -> Tensor:
    """Empty fp32 [rows, 1]."""
    return t.new_empty((t.numel() // t.shape[-1], 1), dtype=torch.float32)


def check_range(name: str, t: Tensor, low: int, high: int) -> None:
    """t's integers, contiguous, are low to high; on a CPU only, since elsewhere it would wait."""
    if t.device.type != "cpu":
        return
    bad = _cpu.first_outside(t.data_ptr(), t.numel(), t.dtype == torch.int64, low, high)
    if bad >= 0:
        raise ValueError(
            f"{name}: got {t.reshape(-1)[bad].item()} at index {bad}, want {low} to {high}"
        )
