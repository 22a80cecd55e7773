"""What every family uses: registration with torch.library, outputs, a check of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _cpu

_lib = torch.library.Library("llama_fast", "DEF")


def register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Return the op. impl serves CPU and CUDA tensors; fake gives empty outputs of the same shapes.

    Library.define and impl cost about 2 us a call, torch.library.custom_op 5 to 15.
    """
    _lib.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    name = schema.split("(", 1)[0]
    _lib.impl(name, impl, "CPU")
    _lib.impl(name, impl, "CUDA")
    torch.library.register_fake(f"llama_fast::{name}", fake, lib=_lib)
    return getattr(torch.ops.llama_fast, name).default


def as_rows(t: Tensor) -> Tensor:
    """[..., n] -> [rows, n]: a view where strides allow, else a copy."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def new(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty, contiguous, of t's shape, and of its dtype unless another is given."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def new_scale(t: Tensor) -> Tensor:
    """Empty fp32 [rows, 1]."""
    return t.new_empty((t.numel() // t.shape[-1], 1), dtype=torch.float32)


_MAPPED = 32 << 20  # bytes: from here on glibc maps every allocation (M_MMAP_THRESHOLD's maximum)


def with_huge_pages(out: Tensor) -> Tensor:
    """Return out, just allocated, having asked for huge pages where it is large and on a CPU.

    The system hands out memory page by page as it is first written, at a fault each, which for a
    large output takes longer than the op.
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
