"""attention_with_kvcache against the eager twin in fp64: contiguous and paged caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import cpu, reference

from .tolerances import ATTENTION_VALUE_ULPS, assert_close_to_eager, ulp

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAN = float("nan")


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cache(batch: int, size: int, heads: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, size, heads, d).to(dtype)
    return k, v


def check(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, **options: object) -> Tensor:
    """Against fp64; what lies past the lengths is NaN for the kernel and left out of the truth."""
    exact = reference.attention_with_kvcache(q.double(), k.double(), v.double(), seqlens, **options)
    eager = reference.attention_with_kvcache(q, k, v, seqlens, **options)
    ours = lf.attention_with_kvcache(q, k, v, seqlens, **options)
    allowed = 0.0
    if q.dtype == torch.float32 and q.numel():
        allowed = ATTENTION_VALUE_ULPS * ulp(torch.tensor(4.0), q.dtype).item()
    assert_close_to_eager(ours, eager, exact, allowed)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24])
def test_f15_f16_every_group(group: int, dtype: torch.dtype, isa: str) -> None:
    k, v = cache(2, 70, 2, 32, dtype)
    for queries in (1, 3):
        check(torch.randn(2, queries, 2 * group, 32).to(dtype), k, v, lengths(70, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 5, 17, 97, 127, 129, 257, 1000])
def test_f09_any_length(size: int, dtype: torch.dtype, isa: str) -> None:
    k, v = cache(1, size, 2, 64, dtype)
    for queries in (1, 5):
        check(torch.randn(1, queries, 8, 64).to(dtype), k, v, lengths(size))


@pytest.mark.parametrize("d", [8, 64, 96, 128, 200, 256])
def test_head_dims(d: int, isa: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        k, v = cache(1, 100, 2, d, dtype)
        check(torch.randn(1, 1, 8, d).to(dtype), k, v, lengths(100))
        check(torch.randn(1, 40, 8, d).to(dtype), k, v, lengths(90))


@pytest.mark.parametrize("queries", [2, 17, 64, 130, 300])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_many_queries(queries: int, causal: bool, isa: str) -> None:
    """Speculative decoding and chunked prefill."""
    k, v = cache(2, 400, 2, 64, torch.bfloat16)
    q = torch.randn(2, queries, 8, 64).bfloat16()
    check(q, k, v, lengths(400, 301), causal=causal)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_f08_what_lies_past_the_length_is_never_used(bad: float, isa: str) -> None:
    k, v = cache(3, 200, 2, 64, torch.bfloat16)
    seqlens = lengths(37, 128, 0)
    for queries in (1, 4, 40):
        q = torch.randn(3, queries, 8, 64).bfloat16()
        clean = lf.attention_with_kvcache(q, k, v, seqlens)
        poisoned_k, poisoned_v = k.clone(), v.clone()
        for i, n in enumerate(seqlens.tolist()):
            poisoned_k[i, n:] = bad
            poisoned_v[i, n:] = bad
        assert torch.equal(lf.attention_with_kvcache(q, poisoned_k, poisoned_v, seqlens), clean)


def test_f07_f10_queries_that_see_nothing_give_zeros(isa: str) -> None:
    k, v = cache(2, 8, 2, 32, torch.bfloat16)
    out = lf.attention_with_kvcache(torch.randn(2, 5, 4, 32).bfloat16(), k, v, lengths(0, 2))
    assert (out[0] == 0).all() and (out[1, :3] == 0).all() and out[1, 3:].abs().sum() > 0


@pytest.mark.parametrize("head_major", [False, True], ids=["token-major", "head-major"])
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_paged_is_contiguous_bit_for_bit(block_size: int, head_major: bool, isa: str) -> None:
    k, v = cache(3, 256, 2, 64, torch.bfloat16)
    seqlens, per = lengths(256, 131, 1), 256 // block_size
    table = torch.randperm(3 * per + 2)[: 3 * per].view(3, per).int()
    shape = (3 * per + 2, 2, block_size, 64) if head_major else (3 * per + 2, block_size, 2, 64)
    pools = [torch.full(shape, NAN).bfloat16() for _ in range(2)]
    paged = [p.transpose(1, 2) if head_major else p for p in pools]
    for pool, full in zip(paged, (k, v), strict=True):
        pool[table.flatten().long()] = full.reshape(3 * per, block_size, 2, 64)
    for queries in (1, 7, 70):
        q = torch.randn(3, queries, 8, 64).bfloat16()
        want = lf.attention_with_kvcache(q, k, v, seqlens)
        assert torch.equal(lf.attention_with_kvcache(q, *paged, seqlens, block_table=table), want)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 64])
def test_f13_forced_splits_and_canary(splits: int, isa: str) -> None:
    k, v = cache(2, 700, 2, 64, torch.bfloat16)
    q = torch.randn(2, 4, 8, 64).bfloat16().transpose(0, 1)[1:3].contiguous().transpose(0, 1)
    q = torch.randn(1, 2, 16, 64).bfloat16()[:, :, ::2].transpose(0, 1)
    seqlens = lengths(700, 65)
    check(q, k, v, seqlens, num_splits=splits)
    canary = torch.full((4, 1, 8, 64), 7.0).bfloat16()
    cpu.attention_with_kvcache(canary[1:3], q, k, v, seqlens, None, True, 0.125, splits)
    assert (canary[[0, 3]] == 7).all()
    want = lf.attention_with_kvcache(q, k, v, seqlens, softmax_scale=0.125, num_splits=splits)
    assert torch.equal(canary[1:3], want)


def test_f04_one_interleaved_pool(isa: str) -> None:
    pool = torch.randn(2, 90, 2, 2, 64).bfloat16()
    k, v = pool[:, :, 0], pool[:, :, 1]
    q = torch.randn(2, 1, 8, 64).bfloat16()
    got = lf.attention_with_kvcache(q, k, v, lengths(90, 50))
    want = lf.attention_with_kvcache(q, k.contiguous(), v.contiguous(), lengths(90, 50))
    assert torch.equal(got, want)


def test_f03_block_past_2_to_31_elements(isa: str) -> None:
    """The last block of a pool of more than 2^31 elements; pages that are not touched cost
    nothing."""
    blocks = 2**31 // (16 * 2 * 64) + 3
    pool = torch.empty(2, blocks, 16, 2, 64, dtype=torch.bfloat16)
    k, v = cache(1, 16, 2, 64, torch.bfloat16)
    pool[0, -1], pool[1, -1] = k[0], v[0]
    table = lengths(blocks - 1)[None]
    q = torch.randn(1, 1, 8, 64).bfloat16()
    got = lf.attention_with_kvcache(q, pool[0], pool[1], lengths(16), block_table=table)
    assert torch.equal(got, lf.attention_with_kvcache(q, k, v, lengths(16)))


def test_f22_capacity_and_one_more() -> None:
    k, v = cache(1, 32, 2, 64, torch.float32)
    q = torch.randn(1, 1, 4, 64)
    paged = [t.view(2, 16, 2, 64) for t in (k, v)]
    table = lengths(0, 1)[None]
    check(q, k, v, lengths(32))
    check(q, *paged, lengths(32), block_table=table)
    for options, caches in (({}, (k, v)), ({"block_table": table}, paged)):
        with pytest.raises(ValueError, match="cache_seqlens: got 33"):
            lf.attention_with_kvcache(q, *caches, lengths(33), **options)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_f41_a_sequence_does_not_depend_on_the_batch(queries: int, isa: str, threads: None) -> None:
    k, v = cache(33, 600, 2, 64, torch.bfloat16)
    q = torch.randn(33, queries, 8, 64).bfloat16()
    seqlens = torch.randint(queries, 600, (33,)).int()
    torch.set_num_threads(1)
    alone = lf.attention_with_kvcache(q[:1], k[:1], v[:1], seqlens[:1])
    for count in (1, 2):
        torch.set_num_threads(count)
        for n in (1, 2, 7, 33):
            batch = lf.attention_with_kvcache(q[:n], k[:n], v[:n], seqlens[:n])
            assert torch.equal(batch[:1], alone)


def test_nan_in_a_query_stays_in_its_head(isa: str) -> None:
    k, v = cache(1, 40, 2, 64, torch.bfloat16)
    q = torch.randn(1, 2, 8, 64).bfloat16()
    clean = lf.attention_with_kvcache(q, k, v, lengths(40))
    q[0, 1, 3, 5] = NAN
    out = lf.attention_with_kvcache(q, k, v, lengths(40))
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(out, clean)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    queries=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    d=st.sampled_from([8, 24, 64, 128]),
    size=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
)
def test_property(
    batch: int, queries: int, kv_heads: int, group: int, d: int, size: int, dtype: torch.dtype
) -> None:
    k, v = cache(batch, size, kv_heads, d, dtype)
    seqlens = torch.randint(0, size + 1, (batch,)).int()
    check(torch.randn(batch, queries, kv_heads * group, d).to(dtype), k, v, seqlens)
