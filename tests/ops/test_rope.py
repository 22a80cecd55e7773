"""Tests of apply_rope and apply_rope_and_append: the eager twin's bits, fp64, Meta's pairing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import reference
from llama_fast.ops.rope import inv_freq

from ..support.tolerances import assert_close_to_eager

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALING = lf.RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def make(t: int, h: int, hkv: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(t, n, d).to(dtype) for n in (h, hkv, hkv))
    return q, k, v, torch.randint(0, 64, (t,)), lf.rope_table(1e4, 64, head_dim=d)


def rotate_fp64(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.double().chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (5, 3, 1, 6), (7, 4, 2, 64), (3, 8, 8, 128)])
def test_matches_eager(
    shape: tuple[int, ...], interleaved: bool, dtype: torch.dtype, isa: str
) -> None:
    q, k, _, positions, table = make(*shape, dtype)
    for index in (positions, positions.int()):
        ours = lf.apply_rope(q, k, index, table, interleaved=interleaved)
        eager = reference.apply_rope(q, k, index, table, interleaved=interleaved)
        for a, b in zip(ours, eager, strict=True):
            assert torch.equal(a, b)


def test_pairings_are_a_permutation_of_each_other(isa: str) -> None:
    """Permute as Hugging Face permutes rows of wq and wk: both pairings give the same scores."""
    q, k, _, positions, table = make(6, 4, 2, 32, torch.float32)
    to_halves = torch.cat((torch.arange(0, 32, 2), torch.arange(1, 32, 2)))
    pairs, _ = lf.apply_rope(q, k, positions, table, interleaved=True)
    halves, _ = lf.apply_rope(q[..., to_halves], k[..., to_halves], positions, table)
    torch.testing.assert_close(pairs[..., to_halves], halves, rtol=0, atol=1e-6)


@pytest.mark.parametrize("position", [257, 4097, 8191, 8192, 20000, 65535, 131071])
def test_f24_angles_are_not_in_16_bits(position: int, isa: str) -> None:
    """Compare with fp64 angles, everything else in bf16. The table forms its angles in fp32, so
    they are off by up to position * 2^-23 radians; bf16 angles would be off by hundreds."""
    d = 128
    table = lf.rope_table(5e5, position + 1, head_dim=d, scaling=SCALING)
    q = torch.randn(1, 2, d).bfloat16()
    ours, _ = lf.apply_rope(q, q, torch.tensor([position]), table)
    angles = position * inv_freq(5e5, d, SCALING).double()[None]
    exact = rotate_fp64(q, angles)
    allowed = (2.0**-8 + position * 2.0**-23) * q.abs().max().item() * 2**0.5
    assert (ours.double() - exact).abs().max().item() <= allowed


def test_f25_llama_3_1_frequencies() -> None:
    plain, scaled = (inv_freq(5e5, 128, s).double() for s in (None, SCALING))
    ratio = scaled / plain
    assert torch.equal(ratio[:29], torch.ones(29, dtype=torch.float64))
    between = torch.tensor([0.82817, 0.64374, 0.49351, 0.37112, 0.27143, 0.19021])
    torch.testing.assert_close(ratio[29:35], between.double(), rtol=0, atol=6e-6)
    torch.testing.assert_close(ratio[35:], torch.full((29,), 0.125).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_writes_what_apply_rope_gives(dtype: torch.dtype, isa: str) -> None:
    q, k, v, positions, table = make(9, 4, 2, 32, dtype)
    want_q, want_k = lf.apply_rope(q, k, positions, table)
    slots = torch.tensor([3, 17, 0, 5, 22, 9, 11, 1, 23])
    pool = torch.full((3, 2, 2, 8, 32), 7.0).to(dtype)  # block, k | v, head, offset, D
    k_cache, v_cache = (pool[:, i].transpose(1, 2) for i in (0, 1))
    got = lf.apply_rope_and_append(q, k, v, positions, table, k_cache, v_cache, slots.int())
    assert torch.equal(got, want_q)
    assert torch.equal(k_cache[slots // 8, slots % 8], want_k)
    assert torch.equal(v_cache[slots // 8, slots % 8], v)
    assert (pool == 7).sum() == pool.numel() - k.numel() - v.numel()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_caches_of_different_strides(interleaved: bool, isa: str) -> None:
    """Lay out v token by token and k head by head, with gaps. Each goes by its own strides."""
    q, k, v, positions, table = make(9, 4, 2, 32, torch.bfloat16)
    _, want = lf.apply_rope(q, k, positions, table, interleaved=interleaved)
    slots = torch.tensor([3, 17, 0, 5, 22, 9, 11, 1, 23])
    pools = torch.full((3, 3, 9, 40), 7.0).bfloat16(), torch.full((4, 11, 3, 48), 7.0).bfloat16()
    k_cache, v_cache = pools[0][:, :2, :8, :32].transpose(1, 2), pools[1][:3, :8, :2, :32]
    caches = k_cache, v_cache
    lf.apply_rope_and_append(q, k, v, positions, table, *caches, slots, interleaved=interleaved)
    assert torch.equal(k_cache[slots // 8, slots % 8], want)
    assert torch.equal(v_cache[slots // 8, slots % 8], v)
    for pool in pools:
        assert (pool != 7).sum() <= k.numel() < pool.numel()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001], ids=["largest", "negative", "least"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_any_nan_of_the_table_stays_nan(interleaved: bool, bits: int, isa: str) -> None:
    """Fill the table with NaN. Rounding by an addition would carry out of its low bits."""
    q, k, _, positions, table = make(3, 4, 2, 128, torch.bfloat16)
    table = torch.full_like(table, 0).view(torch.int32).fill_(bits).view(torch.float32)
    for out in lf.apply_rope(q, k, positions, table, interleaved=interleaved):
        assert out.isnan().all()


def test_f19_slot_minus_one_writes_nothing(isa: str) -> None:
    q, k, v, positions, table = make(4, 4, 2, 32, torch.bfloat16)
    memory = torch.randn(2, 4, 8, 2, 32).bfloat16()
    caches, before = memory[:, 1:3], memory.clone()  # slot -1 may write before the first one
    lf.apply_rope_and_append(q, k, v, positions, table, *caches, torch.full((4,), -1))
    assert torch.equal(memory, before)
    lf.apply_rope_and_append(q, k, v, positions, table, *caches, torch.tensor([-1, 2, -1, -1]))
    changed = (memory != before).any(-1).any(-1).nonzero().tolist()
    assert changed == [[0, 1, 2], [1, 1, 2]]


def test_f31_views_of_a_fused_projection(isa: str) -> None:
    qkv = torch.randn(5, 8, 64).bfloat16()
    q, k, v = qkv.split((4, 2, 2), dim=1)
    table, positions = lf.rope_table(1e4, 16, head_dim=64), torch.arange(5)
    views = lf.apply_rope(q, k, positions, table)
    dense = lf.apply_rope(q.contiguous(), k.contiguous(), positions, table)
    assert all(torch.equal(a, b) for a, b in zip(views, dense, strict=True))
    # k is a view of the projection; v is token by token and head by head with other gaps.
    apart = torch.full((5, 3, 80), float("nan")).bfloat16()[:, :2, :64].copy_(v)
    caches = torch.zeros(2, 1, 8, 2, 64).bfloat16()
    lf.apply_rope_and_append(q, k, apart, positions, table, *caches, positions)
    assert torch.equal(caches[0, 0, :5], dense[1]) and torch.equal(caches[1, 0, :5], v)


def test_f02_token_stride_past_2_to_31(isa: str) -> None:
    stride = 2**31 + 128
    memory = torch.empty(stride + 128, dtype=torch.bfloat16)
    q = memory.as_strided((2, 2, 64), (stride, 64, 1))
    values = torch.randn(2, 2, 64).bfloat16()
    q.copy_(values)
    table, positions = lf.rope_table(1e4, 16, head_dim=64), torch.tensor([3, 9])
    views = lf.apply_rope(q, q, positions, table)
    dense = lf.apply_rope(values, values, positions, table)
    assert all(torch.equal(a, b) for a, b in zip(views, dense, strict=True))


def test_error_is_at_most_twice_eager_transformers(isa: str) -> None:
    """Compare with transformers, which rounds cos, sin and every product to bf16."""
    q, k, _, positions, table = make(32, 4, 2, 128, torch.bfloat16)
    cos, sin = (torch.cat((t, t), -1)[:, None].bfloat16() for t in table[positions].chunk(2, -1))
    a, b = q.chunk(2, -1)
    eager = q * cos + torch.cat((-b, a), -1) * sin
    freqs = inv_freq(1e4, 128).double()
    exact = rotate_fp64(q, positions[:, None] * freqs)
    assert_close_to_eager(lf.apply_rope(q, k, positions, table)[0], eager, exact)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 9),
    half=st.integers(1, 70),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_property(
    tokens: int, heads: int, half: int, interleaved: bool, dtype: torch.dtype
) -> None:
    q, k, _, positions, table = make(tokens, heads, heads, 2 * half, dtype)
    ours = lf.apply_rope(q, k, positions, table, interleaved=interleaved)
    eager = reference.apply_rope(q, k, positions, table, interleaved=interleaved)
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a, b)
