"""Tests of csrc/cuda/attention.cu in the emulator: instances, tile paths, orders of threads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast import reference

from ..support.attention import qkv
from ..support.tolerances import ATTENTION_VALUE_ULPS, assert_close_to_eager, ulp
from .native import SEEDS, emulated

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
dtypes = pytest.mark.parametrize(
    "dtype", [BF16, F16, F32], ids=lambda d: str(d).removeprefix("torch.")
)
NAN = float("nan")


@pytest.fixture
def cuda() -> Any:
    return emulated()


def run(cuda: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, **options: Any) -> Tensor:
    out = torch.full(q.shape, NAN, dtype=q.dtype)
    cu = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    cuda.attention(out, q, k, v, causal, options.get("softmax_scale") or q.shape[-1] ** -0.5, *cu)
    return out


def check(cuda: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    actual = run(cuda, q, k, v, **options)
    eager = reference.attention(q, k, v, **options)
    exact = reference.attention(q.double(), k.double(), v.double(), **options)
    allowed = 0.0
    if q.dtype == F32 and v.numel():
        allowed = ATTENTION_VALUE_ULPS * ulp(v.abs().max(), F32).item()
    assert_close_to_eager(actual, eager, exact, allowed)
    return actual


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@dtypes
@pytest.mark.parametrize("d", [8, 64, 72, 128, 136, 256])
def test_every_instance_on_every_order_of_threads(cuda: Any, dtype: torch.dtype, d: int) -> None:
    q, k, v = qkv((70, 131), (2, 1), d, dtype)
    first = check(cuda, q, k, v)
    for seed in SEEDS[1:]:
        cuda.set_seed(seed)
        assert torch.equal(run(cuda, q, k, v), first)


@dtypes
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (1, 65), (17, 17), (63, 64), (65, 63), (129, 129), (3, 200), (200, 3), (150, 257)],
    ids=lambda n: f"{n[0]}x{n[1]}",
)
def test_f09_ragged_tiles_with_and_without_a_mask(
    cuda: Any, dtype: torch.dtype, lengths: tuple[int, int]
) -> None:
    q, k, v = qkv(lengths, (2, 1), 32, dtype)
    check(cuda, q, k, v)
    check(cuda, q, k, v, causal=False)


@pytest.mark.parametrize(
    "lengths",
    [(1, 129), (64, 384), (129, 129), (130, 513), (200, 447), (256, 256), (300, 200)],
    ids=lambda n: f"{n[0]}x{n[1]}",
)
def test_f09_wgmma_tiles_with_and_without_a_mask(cuda: Any, lengths: tuple[int, int]) -> None:
    """Cover tiles of 128 keys: none, one or three with a mask, and up to four without."""
    q, k, v = qkv(lengths, (2, 1), 64, BF16)
    check(cuda, q, k, v)
    check(cuda, q, k, v, causal=False)


@pytest.mark.parametrize("lengths", [(300, 300), (400, 140)], ids=lambda n: f"{n[0]}x{n[1]}")
def test_persistent_blocks_on_any_chip(cuda: Any, lengths: tuple[int, int]) -> None:
    """Give a block twelve tiles of queries, or one. The last blocks may see nothing."""
    q, k, v = qkv(lengths, (2, 1), 64, BF16, batch=2)
    expected = check(cuda, q, k, v)
    for multiprocessors, seed in ((1, 0), (1, 1), (2, 2), (5, 3), (132, 4)):
        cuda.module.set_multiprocessors(multiprocessors)
        cuda.set_seed(seed)
        out = run(cuda, q, k, v)
        cuda.module.set_multiprocessors(3)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_f16_heads_of_a_group_and_sequences(cuda: Any, group: int) -> None:
    check(cuda, *qkv((20, 70), (2 * group, 2), 16, BF16, batch=3))


@dtypes
def test_f07_rows_that_see_nothing_give_zeros(cuda: Any, dtype: torch.dtype) -> None:
    for lengths in ((150, 20), (40, 0)):
        out = check(cuda, *qkv(lengths, (2, 1), 64, dtype))
        assert not out[:, : lengths[0] - lengths[1]].any()
    assert not run(cuda, *qkv((5, 0), (2, 1), 64, dtype), causal=False).any()


@dtypes
def test_equal_scores_give_the_exact_mean(cuda: Any, dtype: torch.dtype) -> None:
    q = torch.zeros(1, 7, 2, 24, dtype=dtype)
    v = torch.randint(-8, 9, (1, 256, 1, 24)).to(dtype)
    mean = v.double().mean(1, keepdim=True).expand(1, 7, 2, 24)
    assert torch.equal(run(cuda, q, torch.randn_like(v), v, causal=False), mean.to(dtype))


@dtypes
@pytest.mark.parametrize("size", [8.0, 3072.0])
@pytest.mark.parametrize("d", [64, 72], ids=["wgmma", "mma"])
def test_a_winning_score_copies_its_value(
    cuda: Any, dtype: torch.dtype, d: int, size: float
) -> None:
    """Cover scores up to 9 * 2^26, whose rounding error in base 2 exceeds what exp2 can take."""
    k = size * torch.randint(0, 2, (1, 150, 2, d)).mul(2).sub(1).to(dtype)
    v = torch.randn(1, 150, 2, d).to(dtype)
    chosen = (torch.rand(150) * (torch.arange(150) + 1)).long()
    assert torch.equal(run(cuda, k[:, chosen], k, v, softmax_scale=1.0), v[:, chosen])


@dtypes
def test_f10_packed_sequences_with_empty_ones(cuda: Any, dtype: torch.dtype) -> None:
    lengths_q, lengths_k = [0, 5, 0, 130, 1, 9, 0, 127], [0, 5, 7, 200, 1, 0, 0, 127]
    q, k, v = qkv((sum(lengths_q), sum(lengths_k)), (2, 1), 32, dtype)
    cu_q, cu_k = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    for causal in (True, False):
        out = run(cuda, q[0], k[0], v[0], causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        for (a, b), (c, e) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            if b > a:
                assert torch.equal(
                    out[None, a:b], run(cuda, q[:, a:b], k[:, c:e], v[:, c:e], causal)
                )


def test_packed_sequences_in_sections_of_heads(cuda: Any) -> None:
    """Pretend that there are many keys, so that no two key/value heads share the L2 cache."""
    q, k, v = (t[0] for t in qkv((9, 9), (6, 3), 64, BF16))
    cu = cu_seqlens([4, 5])
    expected = run(cuda, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    many_k, many_v = torch.full((2, 40000, 3, 64), NAN, dtype=BF16)
    many_k[:9], many_v[:9] = k, v
    assert torch.equal(run(cuda, q, many_k, many_v, cu_seqlens_q=cu, cu_seqlens_k=cu), expected)


@dtypes
def test_invalid_offsets_stay_in_bounds(cuda: Any, dtype: torch.dtype) -> None:
    q, k, v = (t[0] for t in qkv((20, 20), (2, 1), 64, dtype))
    for bad in ([-5, 30, 10], [0, 50, -3], [7, 7, 2**30]):
        cu = torch.tensor(bad, dtype=torch.int32)
        run(cuda, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


@dtypes
def test_tokens_of_no_sequence_are_not_written(cuda: Any, dtype: torch.dtype) -> None:
    q, k, v = (t[0] for t in qkv((20, 20), (2, 1), 64, dtype))
    cu = cu_seqlens([5, 7])
    out = run(cuda, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert out[:12].isfinite().all() and out[12:].isnan().all()


@dtypes
@pytest.mark.parametrize("d", [8, 72, 200])
def test_touches_nothing_outside_of_unaligned_views(cuda: Any, dtype: torch.dtype, d: int) -> None:
    def framed(t: Tensor) -> Tensor:
        buffer = torch.full([n + 2 for n in t.shape], NAN, dtype=dtype)
        buffer[1:-1, 1:-1, 1:-1, 1:-1] = t
        return buffer[1:-1, 1:-1, 1:-1, 1:-1]

    q, k, v = qkv((37, 91), (4, 2), d, dtype, batch=2)
    out = framed(torch.zeros_like(q))
    cuda.attention(out, framed(q), framed(k), framed(v), True, d**-0.5, None, None)
    assert torch.equal(out, run(cuda, q, k, v))
    base = out._base
    assert base is not None and int((~base.isnan()).sum()) == out.numel()


@dtypes
def test_f31_views_of_a_fused_projection(cuda: Any, dtype: torch.dtype) -> None:
    fused = torch.full((2, 70, 10 * 24), NAN, dtype=dtype)
    fused[..., : 8 * 24] = torch.randn(2, 70, 8 * 24).to(dtype)  # the rest must not be read
    q, k, v = (t.unflatten(-1, (-1, 24)) for t in fused.split([96, 48, 96], dim=-1))
    v = v[:, :, :2]
    expected = run(cuda, q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(run(cuda, q, k, v), expected)


@dtypes
def test_f08_neighbors_and_masked_keys_of_nan_change_nothing(cuda: Any, dtype: torch.dtype) -> None:
    q, k, v = (t[0] for t in qkv((90, 90), (2, 1), 64, dtype))
    cu = cu_seqlens([25, 40, 25])
    clean = run(cuda, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    k[45] = NAN  # seen by the last 20 rows of the second sequence
    for t in (q, k, v):
        t[:25], t[65:] = NAN, NAN
    out = run(cuda, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert torch.equal(out[25:45], clean[25:45])
    assert out[45:65].isnan().all()


@dtypes
def test_f41_a_row_does_not_depend_on_the_batch(cuda: Any, dtype: torch.dtype) -> None:
    q, k, v = qkv((200, 200), (4, 2), 64, dtype, batch=2)
    whole = run(cuda, q, k, v)
    assert torch.equal(run(cuda, q[1:], k[1:], v[1:]), whole[1:])
    for n in (1, 65, 130):
        assert torch.equal(run(cuda, q[:, -n:], k, v), whole[:, -n:])  # a chunk of a prefill
        assert torch.equal(run(cuda, q[:, :n], k[:, :n], v[:, :n]), whole[:, :n])
    assert torch.equal(run(cuda, q[:, :, 2:], k[:, :, 1:], v[:, :, 1:]), whole[:, :, 2:])
