"""Inputs and the check of attention, for its tests on a CPU, on GPUs and in the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from .tolerances import ATTENTION_VALUE_ULPS, assert_close_to_eager, ulp

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
NAN = float("nan")


def qkv(
    lengths: tuple[int, int], heads: tuple[int, int], d: int, dtype: torch.dtype, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, Sq, H, D], k and v [B, Sk, Hkv, D]. v has a mean, as activations do."""
    (sq, sk), (h, hkv) = lengths, heads
    q, k = torch.randn(batch, sq, h, d), torch.randn(batch, sk, hkv, d)
    return q.to(dtype), k.to(dtype), (torch.randn(batch, sk, hkv, d) + 0.25).to(dtype)


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    actual = lf.attention(q, k, v, **options)
    exact = reference.attention(q.double(), k.double(), v.double(), **options)
    allowed = 0.0
    if q.dtype == torch.float32 and v.numel():
        # A score is a sum of D products, whose error grows with the root of D.
        allowed = ATTENTION_VALUE_ULPS * max(1.0, (q.shape[-1] / 64) ** 0.5)
        allowed *= ulp(v.abs().max(), q.dtype).item()
    assert_close_to_eager(actual, reference.attention(q, k, v, **options), exact, allowed)
    return actual


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
