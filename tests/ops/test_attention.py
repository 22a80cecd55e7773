"""Tests of attention against fp64, and of what a prefill must not do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, cpu

from ..support.attention import DTYPES, NAN, check, cu_seqlens, dtypes, qkv

# ---- against fp64 ----

LENGTHS = [(n, n) for n in (1, 2, 5, 17, 97, 127, 129, 257)] + [(1, 239), (799, 3), (3, 799)]


@dtypes
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{n[0]}x{n[1]}")
def test_f09_lengths_that_no_block_divides(
    isa: str, dtype: torch.dtype, lengths: tuple[int, int]
) -> None:
    q, k, v = qkv(lengths, (4, 2), 32, dtype)
    for causal in (True, False):
        check(q, k, v, causal=causal)


@dtypes
@pytest.mark.parametrize("d", [8, 16, 40, 64, 72, 96, 128, 200, 256])
def test_head_dims(isa: str, dtype: torch.dtype, d: int) -> None:
    check(*qkv((33, 161), (2, 1), d, dtype, batch=2))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24])
def test_f15_f16_every_ratio_of_heads(isa: str, group: int) -> None:
    check(*qkv((30, 50), (2 * group, 2), 16, torch.bfloat16))
    check(*qkv((30, 50), (group, 1), 16, torch.float32))


def test_a_group_of_heads_wider_than_a_tile(isa: str) -> None:
    check(*qkv((3, 9), (400, 1), 8, torch.float32))


@pytest.mark.parametrize("scale", [1e-3, 0.3, 2.0])
def test_softmax_scale(isa: str, scale: float) -> None:
    check(*qkv((20, 40), (2, 2), 64, torch.float32), softmax_scale=scale)


# ---- sums that are exact ----


@dtypes
def test_equal_scores_give_the_exact_mean(isa: str, dtype: torch.dtype) -> None:
    q = torch.zeros(1, 7, 4, 24, dtype=dtype)
    v = torch.randint(-8, 9, (1, 256, 2, 24)).to(dtype)
    mean = v.double().mean(1, keepdim=True).repeat_interleave(2, 2).expand(1, 7, 4, 24)
    assert torch.equal(lf.attention(q, torch.randn_like(v), v, causal=False), mean.to(dtype))


@dtypes
@pytest.mark.parametrize("causal", [True, False])
def test_a_winning_score_copies_its_value(isa: str, dtype: torch.dtype, causal: bool) -> None:
    n = 300
    k = 8.0 * torch.randint(0, 2, (1, n, 2, 64)).mul(2).sub(1).to(dtype)
    v = torch.randn(1, n, 2, 64).to(dtype)
    chosen = (torch.rand(n) * (torch.arange(n) + 1)).long() if causal else torch.randperm(n)
    out = lf.attention(k[:, chosen], k, v, causal=causal, softmax_scale=1.0)
    assert torch.equal(out, v[:, chosen])


# ---- masks ----


@dtypes
@pytest.mark.parametrize("lengths", [(5, 3), (300, 200), (40, 0), (129, 1)])
def test_f07_rows_that_see_nothing_give_zeros(
    isa: str, dtype: torch.dtype, lengths: tuple[int, int]
) -> None:
    q, k, v = qkv(lengths, (4, 2), 64, dtype)
    out = check(q, k, v)
    assert not out[:, : lengths[0] - lengths[1]].any()


def test_no_keys_and_no_mask_give_zeros(isa: str) -> None:
    q, k, v = qkv((3, 0), (2, 1), 16, torch.float32)
    assert torch.equal(lf.attention(q, k, v, causal=False), torch.zeros_like(q))


@dtypes
@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("key", [20, 131, 199])
def test_f08_a_masked_value_never_counts(
    isa: str, dtype: torch.dtype, bad: float, key: int
) -> None:
    q, k, v = qkv((200, 200), (3, 1), 40, dtype)
    clean = lf.attention(q, k, v)
    k[:, key], v[:, key] = bad, bad
    out = lf.attention(q, k, v)
    assert torch.equal(out[:, :key], clean[:, :key])
    assert not out[:, key:].isfinite().any()


@dtypes
@pytest.mark.parametrize("keys", [64, 128, 200])
def test_a_row_that_misses_only_its_last_key(isa: str, dtype: torch.dtype, keys: int) -> None:
    """Give the first of two rows all of a block but its last key, which is NaN."""
    q, k, v = qkv((2, keys), (1, 1), 32, dtype)
    clean = lf.attention(q, k, v)
    k[:, -1], v[:, -1] = NAN, NAN
    out = lf.attention(q, k, v)
    assert torch.equal(out[:, 0], clean[:, 0])
    assert out[:, 1].isnan().all()


@dtypes
def test_a_nan_query_spoils_its_own_row_only(isa: str, dtype: torch.dtype) -> None:
    q, k, v = qkv((40, 140), (4, 2), 64, dtype)
    clean = lf.attention(q, k, v)
    q[0, 11, 2, 5] = NAN
    out = lf.attention(q, k, v)
    assert out[0, 11, 2].isnan().all()
    out[0, 11, 2] = clean[0, 11, 2]
    assert torch.equal(out, clean)


def test_huge_scores_stay_finite(isa: str) -> None:
    q, k, v = qkv((50, 150), (2, 1), 128, torch.float32)
    out = lf.attention(q * 1e4, k * 1e4, v)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 1e-6)


# ---- packed sequences ----


@dtypes
@pytest.mark.parametrize("causal", [True, False])
def test_f10_packed_sequences_with_empty_ones(isa: str, dtype: torch.dtype, causal: bool) -> None:
    lengths_q, lengths_k = [0, 5, 0, 130, 1, 9, 0], [0, 5, 7, 200, 1, 0, 0]
    q, k, v = qkv((sum(lengths_q), sum(lengths_k)), (6, 2), 32, dtype)
    cu_q, cu_k = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    out = lf.attention(q[0], k[0], v[0], causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for (a, b), (c, e) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        alone = lf.attention(q[:, a:b], k[:, c:e], v[:, c:e], causal=causal)
        assert torch.equal(out[None, a:b], alone)
        if c == e:
            assert not alone.any()


def test_a_packed_neighbor_of_nan_changes_nothing(isa: str) -> None:
    q, k, v = (t[0] for t in qkv((90, 90), (2, 1), 64, torch.bfloat16))
    cu = cu_seqlens([25, 40, 25])
    clean = lf.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for t in (q, k, v):
        t[:25], t[65:] = NAN, NAN
    out = lf.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert torch.equal(out[25:65], clean[25:65])


def test_f11_no_queries_then_a_normal_call(isa: str) -> None:
    q, k, v = qkv((4, 4), (2, 1), 16, torch.bfloat16)
    for empty in (q[:, :0], q[:0]):
        batch = empty.shape[0]
        assert lf.attention(empty, k[:batch], v[:batch]).shape == empty.shape
    cu = cu_seqlens([])
    assert lf.attention(q[0, :0], k[0, :0], v[0, :0], cu_seqlens_q=cu, cu_seqlens_k=cu).numel() == 0
    check(q, k, v)


# ---- memory ----


@dtypes
def test_f31_views_of_a_fused_projection(isa: str, dtype: torch.dtype) -> None:
    fused = torch.full((2, 70, 10 * 24), NAN, dtype=dtype)
    fused[..., : 8 * 24] = torch.randn(2, 70, 8 * 24).to(dtype)  # the rest must not be read
    q, k, v = (t.unflatten(-1, (-1, 24)) for t in fused.split([96, 48, 96], dim=-1))
    v = v[:, :, :2]
    expected = lf.attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(lf.attention(q, k, v), expected)
    assert torch.equal(lf.attention(_heads_first(q), k, _heads_first(v)), expected)
    assert torch.equal(lf.attention(q.contiguous(), _heads_first(k), v), expected)


def _heads_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@dtypes
@pytest.mark.parametrize("d", [8, 24, 40, 80])
def test_touches_nothing_outside(isa: str, dtype: torch.dtype, d: int) -> None:
    def framed(t: Tensor) -> Tensor:
        buffer = torch.full([n + 2 for n in t.shape], NAN, dtype=dtype)
        buffer[1:-1, 1:-1, 1:-1, 1:-1] = t
        return buffer[1:-1, 1:-1, 1:-1, 1:-1]

    q, k, v = qkv((37, 141), (4, 2), d, dtype, batch=2)
    out = framed(torch.zeros_like(q))
    cpu.attention(out, framed(q), framed(k), framed(v), True, d**-0.5, None, None)
    assert torch.equal(out, lf.attention(q, k, v))
    base = out._base
    assert base is not None and int((~base.isnan()).sum()) == out.numel()


def test_f02_f05_offsets_beyond_int32(isa: str) -> None:
    tokens, stride = 12, 2**28 + 64  # the last row starts at element 2.9e9; few pages are touched
    q, k, v = (t[0] for t in qkv((tokens, tokens), (2, 1), 16, torch.bfloat16))
    cu = cu_seqlens([5, 7])
    expected = lf.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    pool = torch.empty(tokens * stride, dtype=torch.bfloat16)
    far_q = pool.as_strided((tokens, 2, 16), (stride, 16, 1)).copy_(q)
    far_k = pool.as_strided((tokens, 1, 16), (stride, 16, 1), 32).copy_(k)
    far_v = pool.as_strided((tokens, 1, 16), (stride, 16, 1), 48).copy_(v)
    out = lf.attention(far_q, far_k, far_v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert torch.equal(out, expected)


def test_memory_is_linear_in_the_length(run_python: Callable) -> None:
    # A score matrix would take 1 GiB.
    grown = run_python(
        "import resource, torch, llama_fast as lf\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "q = torch.randn(1, 16384, 1, 8)\n"
        "lf.attention(q[:, :64], q[:, :64], q[:, :64])\n"
        "before = peak()\n"
        "lf.attention(q, q, q)\n"
        "print(peak() - before)"
    ).stdout
    assert int(grown) < 32 * 1024  # KiB


# ---- the same row, the same result ----


@dtypes
def test_f41_a_row_does_not_depend_on_the_batch(
    isa: str, dtype: torch.dtype, threads: None
) -> None:
    q, k, v = qkv((300, 300), (4, 2), 64, dtype, batch=3)
    whole = lf.attention(q, k, v)
    assert torch.equal(lf.attention(q[1:2], k[1:2], v[1:2]), whole[1:2])
    for n in (1, 2, 31, 255, 256):  # the last rows alone, as a chunk of a prefill
        assert torch.equal(lf.attention(q[:, -n:], k, v), whole[:, -n:])
    for n in (1, 100, 257):  # the first rows alone, as a shorter prompt
        assert torch.equal(lf.attention(q[:, :n], k[:, :n], v[:, :n]), whole[:, :n])
    for one in (slice(0, 2), slice(2, 4)):  # a rank's heads under tensor parallelism
        head = one.start // 2
        shard = lf.attention(q[:, :, one], k[:, :, head, None], v[:, :, head, None])
        assert torch.equal(shard, whole[:, :, one])
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(lf.attention(q, k, v), whole)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    isa=st.sampled_from(_cpu.isas()),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    d=st.integers(1, 32).map(lambda n: 8 * n),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    isa: str,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    d: int,
    causal: bool,
    seed: int,
) -> None:
    if not causal:
        lengths = [(sq, max(sk, 1)) for sq, sk in lengths]  # eager's softmax of nothing is NaN
    torch.manual_seed(seed)
    before = _cpu.isa()
    _cpu.set_isa(isa)
    try:
        total = sum(sq for sq, _ in lengths), sum(sk for _, sk in lengths)
        q, k, v = (t[0] for t in qkv(total, (kv_heads * group, kv_heads), d, dtype))
        cu_q, cu_k = (cu_seqlens([pair[i] for pair in lengths]) for i in (0, 1))
        check(q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    finally:
        _cpu.set_isa(before)
