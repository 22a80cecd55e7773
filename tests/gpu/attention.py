"""Inputs and launches of attention on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ..support import attention
from ..support.attention import DTYPES, NAN
from ..support.attention import check as check
from ..support.attention import dtypes as dtypes
from .conftest import BACKEND, launcher

# fp16 takes the code paths of bf16. Where the values do not matter, two dtypes are enough.
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[::2], ids=["bfloat16", "float32"])
paths = pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
INF = float("inf")


def qkv(
    device: torch.device,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    d: int,
    dtype: torch.dtype,
    batch: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attention.qkv(lengths, heads, d, dtype, batch)
    return q.to(device), k.to(device), v.to(device)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    tma: bool = True,
) -> Tensor:
    """Launch the backend's kernel into an output full of NaN. tma=False avoids the TMA unit, in
    CUDA by tensors that it cannot address."""
    out = torch.full(q.shape, NAN, dtype=q.dtype, device=q.device)
    options: dict[str, Any] = {}
    if not tma and BACKEND == "triton":
        options["tma"] = False
    elif not tma:
        q, k, v = map(framed, (q, k, v))
    launcher("attention").attention(
        out, q, k, v, causal, q.shape[-1] ** -0.5, cu_q, cu_k, **options
    )
    return out


def cu_seqlens(device: torch.device, lengths: list[int]) -> Tensor:
    return attention.cu_seqlens(lengths).to(device)


def framed(t: Tensor) -> Tensor:
    """Return t inside a larger tensor full of NaN."""
    buffer = torch.full([n + 2 for n in t.shape], NAN, dtype=t.dtype, device=t.device)
    inside = buffer[tuple(slice(1, -1) for _ in t.shape)]
    return inside.copy_(t)


def heads_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)
