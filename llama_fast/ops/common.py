"""Shared by all families: registration with torch.library, output allocation, a check of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _cpu

_lib = torch.library.Library("llama_fast", "DEF")


def register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register and return the op. impl serves CPU and CUDA tensors; fake returns empty outputs.

    A call through Library.define and impl costs about 2 us; torch.library.custom_op costs 5 to 15.
    """
    _lib.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    name = schema.split("(", 1)[0]
    _lib.impl(name, impl, "CPU")
    _lib.impl(name, impl, "CUDA")
    torch.library.register_fake(f"llama_fast::{name}", fake, lib=_lib)
    return getattr(torch.ops.llama_fast, name).default


def as_rows(t: Tensor) -> Tensor:
    """Return t [..., n] as [rows, n]: a view where strides allow, else a copy."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def new(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty contiguous tensor of t's shape, of t's dtype unless another is given."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def new_scale(t: Tensor) -> Tensor:
    """Return an empty fp32 [rows, 1]."""
    return t.new_empty((t.numel() // t.shape[-1], 1), dtype=torch.float32)


_MAPPED = 32 << 20  # bytes: above this glibc maps every allocation (M_MMAP_THRESHOLD's maximum)


def with_huge_pages(out: Tensor) -> Tensor:
    """Request huge pages for out, newly allocated, if it is large and on a CPU, and return it.

    The first write to each page is a page fault; for a large output these take longer than the op.
    """
    if out.nbytes >= _MAPPED and out.is_cpu:
        _cpu.advise_huge_pages(out)
    return out


def check_range(name: str, t: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless every integer in t, contiguous, is in [low, high]. CPU only: on a GPU
    this would synchronize."""
    if not t.is_cpu:
        return
    bad = _cpu.first_outside(t, low, high)
    if bad >= 0:
        raise ValueError(
            f"{name}: got {t.reshape(-1)[bad].item()} at index {bad}, want {low} to {high}"
        )
