"""Inputs, launches and the check of attention, for its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from ..support.tolerances import ATTENTION_VALUE_ULPS, assert_close_to_eager, ulp
from .conftest import BACKEND, launcher

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# fp16 takes the code paths of bf16. Where the values do not matter, two dtypes are enough.
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[::2], ids=["bfloat16", "float32"])
paths = pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
NAN, INF = float("nan"), float("inf")


def qkv(
    device: torch.device,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    d: int,
    dtype: torch.dtype,
    batch: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, Sq, H, D], k and v [B, Sk, Hkv, D]. v has a mean, as activations do."""
    (sq, sk), (h, hkv) = lengths, heads
    q, k = torch.randn(batch, sq, h, d), torch.randn(batch, sk, hkv, d)
    v = torch.randn(batch, sk, hkv, d) + 0.25
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    actual = lf.attention(q, k, v, **options)
    exact = reference.attention(q.double(), k.double(), v.double(), **options)
    allowed = 0.0
    if q.dtype == torch.float32 and v.numel():
        allowed = ATTENTION_VALUE_ULPS * ulp(v.abs().max(), q.dtype).item()
    assert_close_to_eager(actual, reference.attention(q, k, v, **options), exact, allowed)
    return actual


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
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def framed(t: Tensor) -> Tensor:
    """Return t inside a larger tensor full of NaN."""
    buffer = torch.full([n + 2 for n in t.shape], NAN, dtype=t.dtype, device=t.device)
    inside = buffer[tuple(slice(1, -1) for _ in t.shape)]
    return inside.copy_(t)


def heads_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)
