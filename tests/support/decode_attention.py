"""Inputs of attention_with_kvcache, for its tests on a CPU, on GPUs and in the emulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def queries(*n: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sq", n, ids=lambda n: f"{n}_queries")


def lengths(*n: int) -> Tensor:
    return torch.tensor(n, dtype=torch.int32)


def make(
    batch: int, sq: int, capacity: int, heads: tuple[int, int], d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, Sq, H, D], k and v [B, capacity, Hkv, D]. v has a mean, as activations do."""
    h, hkv = heads
    q, k = torch.randn(batch, sq, h, d), torch.randn(batch, capacity, hkv, d)
    return q.to(dtype), k.to(dtype), (torch.randn(batch, capacity, hkv, d) + 0.25).to(dtype)


def page(k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same cache in shuffled blocks, and the block table. Three more blocks, and the
    rows that k and v leave free, are NaN. FP8 is indexed as bytes."""
    batch, capacity, *row = k.shape
    n = -(-capacity // block_size)
    ids = torch.randperm(batch * n + 3)[: batch * n]
    pools = []
    for cache in (k, v):
        padded = torch.full((batch, n * block_size, *row), torch.nan).to(cache.dtype)
        padded[:, :capacity] = cache
        pools.append(torch.full((batch * n + 3, block_size, *row), torch.nan).to(cache.dtype))
        blocks = padded.view(batch * n, block_size, *row)
        pools[-1].view(torch.uint8)[ids] = blocks.view(torch.uint8)
    return pools[0], pools[1], ids.view(batch, n).int()


def poison(k: Tensor, v: Tensor, seqlens: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """Return copies of k and v with value after each sequence's end: FP8's NaN for Inf."""
    bad = torch.tensor([value, -value]).to(k.dtype)
    k, v = k.clone(), v.clone()
    for i, n in enumerate(seqlens.tolist()):
        k[i, n:], v[i, n:] = bad[0], bad[1]
    return k, v
