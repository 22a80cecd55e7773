"""Tests of attention_with_kvcache over e4m3 caches with scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..support.decode_attention import dtypes, queries
from .decode_attention import BF16, FP8, attend, check, paged

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    ("dtype", "sq"),
    [(BF16, 1), (BF16, 3), (BF16, 20), (torch.float16, 20), (torch.float32, 1)],
    ids=str,
)
def test_fp8_cache(make: Any, lengths: Any, dtype: torch.dtype, sq: int) -> None:
    q, k, v = make(3, sq, 140, (8, 2), 64, dtype)
    k, v = k.to(FP8), v.to(FP8)
    one, two = torch.tensor([0.37], device=q.device), torch.tensor([1.7, 0.02], device=q.device)
    seqlens = lengths(140, 0, 97)
    check(q, k, v, seqlens, k_scale=two, v_scale=one)
    table = paged(k, v, 16)
    options = {"k_scale": one, "v_scale": two, "block_table": table[2]}
    check(q, *table[:2], seqlens, num_splits=3 if sq < 20 else 1, **options)


# CUDA wants a multiple of 8.
@pytest.mark.parametrize("d", [pytest.param(12, marks=pytest.mark.triton), 24, 72, 256])
def test_head_dims(make: Any, lengths: Any, d: int) -> None:
    for sq in (1, 20):
        q, k, v = make(1, sq, 70, (4, 2), d, BF16)
        one = torch.ones(1, device=q.device)
        check(q, k.to(FP8), v.to(FP8), lengths(67), k_scale=one, v_scale=one)


@queries(1, 20)
def test_k_scale_below_and_at_zero(make: Any, lengths: Any, sq: int) -> None:
    """Use negative, zero and tiny scales. The kernel finds the largest score before it scales."""
    q, k, v = make(1, sq, 140, (8, 2), 64, BF16)
    k, v, one = k.to(FP8), v.to(FP8), torch.ones(1, device=q.device)
    for value in (-0.7, 0.0, 1e-44):
        check(q, k, v, lengths(131), k_scale=value * one, v_scale=one)


@dtypes
def test_every_e4m3_value_comes_back(
    device: torch.device, lengths: Any, dtype: torch.dtype
) -> None:
    """Attend to one key: the result is its values times v_scale."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(FP8).view(1, 1, 2, 128)
    q = torch.randn(1, 1, 2, 128).to(device, dtype)
    scales = {"k_scale": torch.ones(1, device=device), "v_scale": torch.ones(1, device=device) / 4}
    out = attend(q, torch.zeros_like(codes), codes, lengths(1), **scales)
    assert torch.equal(out.float().nan_to_num(1e9), (codes.float() / 4).nan_to_num(1e9))
    keys = codes.view(1, 256, 1, 1).repeat(1, 1, 1, 8)  # the codes as keys: their scores
    keys = torch.where(keys.view(torch.uint8) % 128 == 127, 0, keys.view(torch.uint8)).view(FP8)
    check(q[..., :8], keys, keys, lengths(256), softmax_scale=1e-3, **scales)


@pytest.mark.parametrize("power", [-100, -60, 40, 126])
def test_fp8_cache_queries_of_any_size(make: Any, lengths: Any, power: int) -> None:
    """Scale bf16 queries by powers of two. As fp16 they give the same bits at any size."""
    q, k, v = make(1, 1, 100, (4, 2), 32, BF16)
    q = q / q.abs().max() * 3.5  # 2^126 times that is finite and has the largest exponent
    q[0, 0, 1] = 0.0
    k, v, one = k.to(FP8), v.to(FP8), torch.ones(1, device=q.device)
    want = attend(q, k, v, lengths(100), k_scale=one, v_scale=one)
    scaled = q * 2.0**power, one * 2.0**-power
    out = attend(scaled[0], k, v, lengths(100), k_scale=scaled[1], v_scale=one)
    assert torch.equal(out, want)


def test_fp8_cache_past_the_lengths(make: Any, lengths: Any) -> None:
    q, k, v = make(3, 1, 100, (4, 2), 32, BF16)
    k, v, seqlens = k.to(FP8), v.to(FP8), lengths(100, 33, 0)
    scale = torch.ones(1, device=q.device)
    clean = attend(q, k, v, seqlens, k_scale=scale, v_scale=scale)
    for t in (k, v):
        for i, n in enumerate(seqlens.tolist()):
            t.view(torch.uint8)[i, n:] = 0x7F
    assert torch.equal(attend(q, k, v, seqlens, k_scale=scale, v_scale=scale), clean)
