"""Tests of attention_with_kvcache against the eager twin in fp64, and of keys it must not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import cpu, reference

from ..support.decode_attention import DTYPES, FP8, lengths, page, poison, queries
from ..support.decode_attention import make as make_plain
from ..support.tolerances import ATTENTION_VALUE_ULPS, assert_close_to_eager, ulp

NAN, INF = float("nan"), float("inf")


# The dtype of q, and of the caches: the same, or e4m3. fp16 and fp32 queries of an FP8 cache share
# their kernels but for loading and storing.
CACHES = [(d, d) for d in DTYPES] + [(torch.bfloat16, FP8), (torch.float32, FP8)]
dtypes = pytest.mark.parametrize(
    ("dtype", "cache"), CACHES, ids=lambda d: str(d).removeprefix("torch.")
)


def make(
    batch: int,
    sq: int,
    capacity: int,
    heads: tuple[int, int],
    d: int,
    dtype: torch.dtype,
    cache: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = make_plain(batch, sq, capacity, heads, d, dtype)
    return q, k.to(cache), v.to(cache)


def scales(k: Tensor) -> dict[str, Tensor]:
    """Return scales for FP8 caches, one of them by head; nothing for others. They are powers of
    two, so that eager rounds no dequantized key or value to 16 bits."""
    if k.dtype != FP8:
        return {}
    by_head = -2.0 * torch.ones(k.shape[-2])
    by_head[1:] = 2.0 ** -torch.arange(k.shape[-2] - 1)
    return {"k_scale": torch.tensor([0.5]), "v_scale": by_head}


def attend(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, **options: Any) -> Tensor:
    return lf.attention_with_kvcache(q, k, v, seqlens, **scales(k), **options)


def _norm(t: Tensor) -> Tensor:
    return t.nan_to_num(0, 0, 0).norm(dim=-1).max()


def check(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, **options: Any) -> Tensor:
    actual = attend(q, k, v, seqlens, **options)
    if k.dtype == FP8:
        k, v = (t.double() * s[:, None] for t, s in zip((k, v), scales(k).values(), strict=True))
    caches = k.to(q.dtype), v.to(q.dtype)
    eager = reference.attention_with_kvcache(q, *caches, seqlens, **options)
    exact = reference.attention_with_kvcache(q.double(), k.double(), v.double(), seqlens, **options)
    allowed = 0.0
    if q.dtype == torch.float32:
        # The allowance is for scores up to 8. A larger score is rounded by larger ulps.
        scale = options.get("softmax_scale") or q.shape[-1] ** -0.5
        largest = scale * (_norm(q) * _norm(k)).item() if q.numel() and k.numel() else 0.0
        value = ulp(v.nan_to_num(0, 0, 0).abs().max(), q.dtype).item() if v.numel() else 0.0
        allowed = ATTENTION_VALUE_ULPS * max(1.0, largest / 8) * value
    assert_close_to_eager(actual, eager, exact, allowed)
    return actual


# ---- against fp64 ----


@dtypes
def test_f09_lengths_that_no_block_divides(
    isa: str, dtype: torch.dtype, cache: torch.dtype
) -> None:
    q, k, v = make(9, 1, 1000, (4, 1), 32, dtype, cache)
    check(q, k, v, lengths(1, 2, 5, 17, 97, 127, 129, 257, 1000))
    q = torch.randn(9, 5, 4, 32).to(dtype)
    k, v, table = page(k, v, 16)
    check(q, k, v, lengths(1, 2, 5, 17, 97, 127, 129, 257, 1000), block_table=table)


@dtypes
@queries(2, 8, 17, 300)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_speculative_decoding_and_chunked_prefill(
    isa: str, dtype: torch.dtype, cache: torch.dtype, sq: int, causal: bool
) -> None:
    q, k, v = make(3, sq, 300, (3, 1), 40, dtype, cache)
    check(q, k, v, lengths(300, 257, sq), causal=causal)


@dtypes
@pytest.mark.parametrize("d", [8, 16, 40, 64, 96, 128, 200, 256])
def test_head_dims(isa: str, dtype: torch.dtype, cache: torch.dtype, d: int) -> None:
    check(*make(1, 1, 161, (4, 1), d, dtype, cache), lengths(161))
    check(*make(1, 40, 90, (2, 1), d, dtype, cache), lengths(87))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24])
def test_f15_f16_every_ratio_of_heads(isa: str, group: int) -> None:
    for dtype in DTYPES:
        check(*make(1, 1, 50, (2 * group, 2), 16, dtype), lengths(50))
        check(*make(2, 3, 50, (2 * group, 2), 16, dtype), lengths(50, 3))


@dtypes
def test_many_chunks(isa: str, dtype: torch.dtype, cache: torch.dtype) -> None:
    check(*make(2, 1, 20000, (2, 1), 16, dtype, cache), lengths(20000, 16385))


@dtypes
def test_exact_sums(isa: str, dtype: torch.dtype, cache: torch.dtype) -> None:
    """Make nothing round: equal scores, integer values, a power of two of keys."""
    q, k = torch.zeros(1, 1, 4, 64, dtype=dtype), torch.randn(1, 256, 2, 64).to(cache)
    v = torch.randint(-4, 5, (1, 256, 2, 64)).to(cache)
    mean = v.double().mean(1) * scales(k).get("v_scale", torch.ones(1))[:, None]
    want = mean.repeat_interleave(2, 1).to(dtype)
    assert torch.equal(attend(q, k, v, lengths(256))[:, 0], want)


def test_one_key_far_above_the_others(isa: str) -> None:
    q, k, v = make(1, 1, 600, (4, 2), 64, torch.float32)
    k[0, 411] = 40 * q[0, 0, ::2]
    out = check(q, k, v, lengths(600), softmax_scale=1.0)
    assert torch.allclose(out[0, 0, ::2], v[0, 411], rtol=1e-5)


# ---- what must not reach a result ----


@dtypes
@queries(1, 4, 40)
def test_f08_what_lies_past_the_lengths_changes_nothing(
    isa: str, dtype: torch.dtype, cache: torch.dtype, sq: int
) -> None:
    seqlens = lengths(41, 0, 257, 300, 64)
    q, k, v = make(5, sq, 300, (4, 2), 72, dtype, cache)
    clean = attend(q, *poison(k, v, seqlens, 0.0), seqlens)
    assert clean.isfinite().all()
    for value in (NAN, INF):
        dirty = poison(k, v, seqlens, value)
        assert torch.equal(attend(q, *dirty, seqlens), clean)
        paged_k, paged_v, table = page(*dirty, 16)
        out = attend(q, paged_k, paged_v, seqlens, block_table=table)
        assert torch.equal(out, clean)


@dtypes
@queries(5, 40)
def test_a_nan_key_or_value_reaches_the_queries_that_see_it(
    isa: str, dtype: torch.dtype, cache: torch.dtype, sq: int
) -> None:
    q, k, v = make(1, sq, 100, (3, 1), 32, dtype, cache)
    clean = attend(q, k, v, lengths(100))
    for name in ("k", "v"):
        dirty = {"k": k.clone(), "v": v.clone()}
        dirty[name][0, 98] = NAN
        out = attend(q, dirty["k"], dirty["v"], lengths(100))
        assert torch.equal(out[:, : sq - 2], clean[:, : sq - 2])
        assert out[:, sq - 2 :].isnan().all()


@queries(2, 40)
def test_a_nan_in_a_query_stays_in_its_head(isa: str, sq: int) -> None:
    q, k, v = make(1, sq, 40, (8, 2), 64, torch.bfloat16)
    clean = attend(q, k, v, lengths(40))
    q[0, 1, 3, 5] = NAN
    out = attend(q, k, v, lengths(40))
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(out, clean)


@dtypes
@queries(1, 3, 60)
def test_f10_zero_lengths(isa: str, dtype: torch.dtype, cache: torch.dtype, sq: int) -> None:
    q, k, v = make(4, sq, 65, (4, 2), 32, dtype, cache)
    want = check(q, k, v, lengths(0, 65, 0, 64))
    k[0], v[2] = NAN, NAN
    out = attend(q, k, v, lengths(0, 65, 0, 64))
    assert torch.equal(out, want) and not out[0].any() and not out[2].any()
    assert not attend(q, k, v, lengths(0, 0, 0, 0)).any()


@queries(7, 50)
def test_f07_queries_that_see_no_key_give_zeros(isa: str, sq: int) -> None:
    out = check(*make(2, sq, 9, (4, 2), 16, torch.float32), lengths(3, 1))
    assert not out[0, : sq - 3].any() and not out[1, : sq - 1].any()
    q, k, v = make(1, sq, 3, (4, 2), 16, torch.float32)
    v.fill_(float("nan"))  # reaches those alone that see a key
    for attention in (lf.attention_with_kvcache, reference.attention_with_kvcache):
        out = attention(q, k, v, lengths(3))
        assert not out[0, : sq - 3].any() and out[0, sq - 3 :].isnan().all()


def test_f11_nothing_to_do(isa: str) -> None:
    for batch, sq in ((0, 1), (2, 0), (0, 0)):
        q, k, v = make(batch, sq, 33, (4, 2), 32, torch.bfloat16)
        assert attend(q, k, v, lengths(*[33] * batch)).shape == q.shape
    check(*make(1, 1, 33, (4, 2), 32, torch.bfloat16), lengths(33))


# ---- layouts ----


@dtypes
@pytest.mark.parametrize("splits", [1, 2, 7, 33, 64, 5000])
def test_f13_forced_splits_of_strided_queries(
    isa: str, dtype: torch.dtype, cache: torch.dtype, splits: int
) -> None:
    _, k, v = make(2, 1, 300, (6, 2), 32, dtype, cache)
    q = torch.randn(2, 3, 6, 96).to(dtype)[:, 1:2, :, 32:64]
    seqlens = lengths(300, 61)
    memory = torch.full((4, 1, 6, 32), 7.0, dtype=dtype)  # canaries first: a crash would say less
    rest = (None, True, 0.2, splits, *(scales(k).values() or (None, None)))
    cpu.decode_attention(memory[1:3], q, k, v, seqlens, *rest)
    assert (memory[[0, 3]] == 7).all()
    check(q, k, v, seqlens, num_splits=splits)
    options: dict[str, Any] = {"softmax_scale": 0.2, "num_splits": splits}
    want = attend(q.contiguous(), k, v, seqlens, **options)
    assert torch.equal(memory[1:3], want)


@dtypes
@queries(1, 4, 60)
def test_every_layout_gives_the_same_bits(
    isa: str, dtype: torch.dtype, cache: torch.dtype, sq: int
) -> None:
    def head_major(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in (k, v))
        return k, v

    q, k, v = make(2, sq, 150, (8, 2), 32, dtype, cache)
    seqlens = lengths(143, 90)
    want = attend(q, k, v, seqlens)
    assert torch.equal(attend(q, *head_major(k, v), seqlens), want)
    for block_size in (1, 5, 16, 128):
        paged_k, paged_v, table = page(k, v, block_size)
        for caches in ((paged_k, paged_v), head_major(paged_k, paged_v)):
            out = attend(q, *caches, seqlens, block_table=table)
            assert torch.equal(out, want)


@dtypes
def test_f04_keys_and_values_interleaved_in_one_pool(
    isa: str, dtype: torch.dtype, cache: torch.dtype
) -> None:
    q, k, v = make(2, 1, 128, (4, 2), 64, dtype, cache)
    seqlens = lengths(128, 77)
    want = attend(q, k, v, seqlens)
    pool = k.new_full((2, 128, 5, 2, 192), NAN)
    caches = pool[:, :, 1, :, 64:128], pool[:, :, 3, :, :64]
    for cache, rows in zip(caches, (k, v), strict=True):
        cache.copy_(rows)
    assert torch.equal(attend(q, *caches, seqlens), want)
    blocks = torch.stack([t.view(16, 16, 2, 64) for t in (k, v)], 1)  # [block, k or v, offset, ...]
    table = torch.arange(16, dtype=torch.int32).view(2, 8)
    out = attend(q, blocks[:, 0], blocks[:, 1], seqlens, block_table=table)
    assert torch.equal(out, want)


@dtypes
@queries(1, 60)
def test_caches_of_different_strides(
    isa: str, dtype: torch.dtype, cache: torch.dtype, sq: int
) -> None:
    """Lay out keys token by token and values head by head, and the reverse."""
    q, k, v = make(2, sq, 90, (4, 2), 32, dtype, cache)
    seqlens = lengths(90, 71)
    want = attend(q, k, v, seqlens)

    def head_major(cache: Tensor) -> Tensor:
        memory = cache.new_full((3, 3, 97, 40), NAN)
        memory[:2, :2, :90, :32] = cache.transpose(1, 2)
        return memory[:2, :2, :90, :32].transpose(1, 2)

    for keys, values in ((k, head_major(v)), (head_major(k), v)):
        assert all(a != b for a, b in zip(keys.stride()[:3], values.stride()[:3], strict=True))
        assert torch.equal(attend(q, keys, values, seqlens), want)


@queries(1, 64)
def test_f03_highest_block_of_a_pool_past_2_to_the_31(isa: str, sq: int) -> None:
    """Use only a few blocks of the pool: untouched memory costs nothing."""
    q, k, v = make(1, sq, 512, (8, 4), 128, torch.bfloat16)
    pools = [torch.empty(20000, 256, 4, 128, dtype=torch.bfloat16) for _ in range(2)]
    assert pools[0].numel() > 2**31
    for pool, cache in zip(pools, (k, v), strict=True):
        pool[-1], pool[-2] = cache[0, :256], cache[0, 256:]
    table = lengths(19999, 19998)[None]
    out = attend(q, pools[0], pools[1], lengths(500), block_table=table)
    assert torch.equal(out, attend(q, k, v, lengths(500)))


def test_f22_at_and_past_the_capacity() -> None:
    q, k, v = make(2, 1, 48, (4, 2), 32, torch.bfloat16)
    paged_k, paged_v, table = page(k, v, 16)
    paged: dict[str, Any] = {"block_table": table}
    for keys, values, options in ((k, v, {}), (paged_k, paged_v, paged)):
        check(q, keys, values, lengths(48, 1), **options)
        for bad in (49, -1):
            with pytest.raises(ValueError, match=f"cache_seqlens: got {bad}"):
                attend(q, keys, values, lengths(1, bad), **options)
    table[1, 2] = paged_k.shape[0]
    attend(q, paged_k, paged_v, lengths(48, 32), **paged)  # not read
    with pytest.raises(ValueError, match=r"block_table: got block 9 at \[1, 2\]"):
        attend(q, paged_k, paged_v, lengths(48, 33), **paged)


# ---- what a result may depend on ----


def test_more_chunks_than_one_wave_holds(isa: str) -> None:
    """Attend 9 x 16 heads in 1024 chunks each: over 80 MB of partial results, 64 to a wave."""
    q, k, v = make(9, 1, 1024, (16, 16), 8, torch.bfloat16)
    seqlens = lengths(1024, 1023, 1024, 1022, 1024, 1024, 1024, 1024, 1024)
    out = attend(q, k, v, seqlens, num_splits=1024)
    for i in range(9):
        one = slice(i, i + 1)
        alone = attend(q[one], k[one], v[one], seqlens[one], num_splits=1024)
        assert torch.equal(out[one], alone), i
    check(q, k, v, seqlens, num_splits=1024)


@dtypes
@queries(1, 3, 50)
def test_f41_alone_or_in_a_batch_on_any_threads(
    isa: str, dtype: torch.dtype, cache: torch.dtype, sq: int, threads: None
) -> None:
    q, k, v = make(33, sq, 600, (4, 2), 16, dtype, cache)
    seqlens = torch.randint(0, 601, (33,), dtype=torch.int32)
    seqlens[7] = 600
    torch.set_num_threads(1)
    alone = attend(q[7:8], k[7:8], v[7:8], seqlens[7:8])[0]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for first, last in ((7, 8), (6, 8), (2, 9), (0, 33)):
            some = slice(first, last)
            out = attend(q[some], k[some], v[some], seqlens[some])
            assert torch.equal(out[7 - first], alone), (count, some)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_property(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    (dtype, cache), d = draw(st.sampled_from(CACHES)), 8 * draw(st.integers(1, 17))
    batch, sq, hkv = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    capacity, group = draw(st.integers(1, 400)), draw(st.integers(1, 9))
    q, k, v = make(batch, sq, capacity, (group * hkv, hkv), d, dtype, cache)
    seqlens = lengths(*(draw(st.integers(0, capacity)) for _ in range(batch)))
    options: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "num_splits": draw(st.integers(0, 9)),
        "softmax_scale": draw(st.sampled_from([None, 0.05, 1.0])),
    }
    want = check(q, k, v, seqlens, **options)
    k, v, table = page(*poison(k, v, seqlens, NAN), draw(st.integers(1, 70)))
    out = attend(q, k, v, seqlens, block_table=table, **options)
    assert torch.equal(out, want)
