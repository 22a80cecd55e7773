"""Tests of the Triton rope: the eager twin's bits, caches of every layout, indices out of range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference, triton_backend
from llama_fast.kernels import common, rope
from llama_fast.ops.rope import inv_freq

from .conftest import launcher

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1, 1, 2), (5, 3, 1, 6), (3, 8, 8, 128), (2, 5, 2, 80), (2, 40, 8, 128)]
SCALING = lf.RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def make(
    t: int, h: int, hkv: int, d: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return q, k, v as views of a fused projection, positions and a table."""
    qkv = torch.randn(t, h + 2 * hkv, d).to(dtype).to(device)
    table = lf.rope_table(1e4, 64, head_dim=d, device=device)
    return *qkv.split((h, hkv, hkv), dim=1), torch.randint(0, 64, (t,), device=device), table


def poisoned(t: int, h: int, d: int, like: Tensor) -> Tensor:
    return torch.full((t, h, d), float("nan"), dtype=like.dtype, device=like.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_eager(
    shape: tuple[int, ...], interleaved: bool, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, _, positions, table = make(*shape, dtype, device)
    for index in (positions, positions.int()):
        ours = lf.apply_rope(q, k, index, table, interleaved=interleaved)
        eager = reference.apply_rope(q, k, index, table, interleaved=interleaved)
        for a, b in zip(ours, eager, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("position", [257, 8192, 131071])
def test_f24_angles_are_not_in_16_bits(position: int, device: torch.device) -> None:
    """Compare with fp64 angles, all else in bf16 (tests/ops/test_rope.py explains the bound)."""
    d = 128
    table = lf.rope_table(5e5, position + 1, head_dim=d, scaling=SCALING, device=device)
    q = torch.randn(1, 2, d).bfloat16().to(device)
    ours, _ = lf.apply_rope(q, q, torch.tensor([position], device=device), table)
    angles = position * inv_freq(5e5, d, SCALING).double().cpu()
    a, b = q.double().cpu().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    exact = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    allowed = (2.0**-8 + position * 2.0**-23) * q.abs().max().item() * 2**0.5
    assert (ours.double().cpu() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("shape", [(9, 4, 2, 32), (9, 5, 1, 6), (9, 40, 8, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f04_append_into_one_pool(
    dtype: torch.dtype, shape: tuple[int, ...], interleaved: bool, device: torch.device
) -> None:
    """Append into a pool that k and v share. Only the slots change, to apply_rope's result."""
    q, k, v, positions, table = make(*shape, dtype, device)
    want_q, want_k = reference.apply_rope(q, k, positions, table, interleaved=interleaved)
    slots = torch.tensor([3, 17, 0, 5, 22, 9, 11, 1, 23], device=device)
    hkv, d = k.shape[1:]
    pool = torch.full((3, 2, hkv, 8, d), 7.0, dtype=dtype, device=device)
    k_cache, v_cache = (pool[:, i].transpose(1, 2) for i in (0, 1))
    for index in (slots, slots.int()):
        pool.fill_(7)
        got = lf.apply_rope_and_append(
            q, k, v, positions, table, k_cache, v_cache, index, interleaved=interleaved
        )
        assert torch.equal(got, want_q)
        assert torch.equal(k_cache[slots // 8, slots % 8], want_k)
        assert torch.equal(v_cache[slots // 8, slots % 8], v)
        assert (pool == 7).sum() == pool.numel() - k.numel() - v.numel()


@pytest.mark.parametrize("per_head", [False, True], ids=["one scale", "scale a head"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_append_to_an_fp8_cache(interleaved: bool, per_head: bool, device: torch.device) -> None:
    """Compare with clamp(k / k_scale) as e4m3, also beyond 448 scales."""
    q, k, v, positions, table = make(5, 6, 3, 48, torch.bfloat16, device)
    count = 3 if per_head else 1
    k_scale, v_scale = torch.rand(2, count, device=device) * 0.01 + 0.001
    slots = torch.tensor([3, -1, 0, 5, 7], device=device)
    caches = torch.full((2, 2, 4, 3, 48), 7, dtype=torch.uint8, device=device)
    k_cache, v_cache = caches.view(torch.float8_e4m3fn)
    got = lf.apply_rope_and_append(
        q, k, v, positions, table, k_cache, v_cache, slots, interleaved=interleaved,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    want_q, want_k = reference.apply_rope(q, k, positions, table, interleaved=interleaved)
    assert torch.equal(got, want_q)
    kept = slots >= 0
    for cache, x, scale in ((caches[0], want_k, k_scale), (caches[1], v, v_scale)):
        y = x.float().cpu() / scale.cpu()[:, None]  # [T, Hkv, D] / [Hkv or 1, 1]
        want = y.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(cache.view(-1, 3, 48)[slots[kept]].cpu(), want[kept.cpu()])
        assert (cache == 7).all(-1).all(-1).sum() == 8 - kept.sum()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_16_bit_value_to_an_fp8_cache(dtype: torch.dtype, device: torch.device) -> None:
    """Compare with v / v_scale by IEEE division, for scales of every magnitude."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    v = every.view(8, 64, 128).to(device)
    positions, table = torch.arange(8, device=device), lf.rope_table(1e4, 8, head_dim=128)
    caches = torch.empty(2, 8, 1, 64, 128, dtype=torch.uint8, device=device)
    q_out, v_scale = torch.empty_like(v), torch.empty(1, device=device)
    far = [2.0**-149, 3e38, float("inf"), float("nan")]
    step = 60 if common.INTERPRETED else 20
    for scale in (*far, *(1.2345 * 2.0**e for e in range(-140, 120, step))):
        v_scale.fill_(scale)
        arguments = (positions, table.to(device), False, v, *caches, positions, v_scale, v_scale)
        launcher("apply_rope").rope(q_out, None, v, v, *arguments)
        got = caches[1].cpu().view(torch.float8_e4m3fn).float().flatten()
        want = (every.float() / v_scale.cpu()).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        differ = (got != want) | (got.signbit() != want.signbit())
        assert not (differ & ~(got.isnan() & want.isnan())).any(), scale


def test_f31_append_takes_v_of_other_strides_than_k(device: torch.device) -> None:
    q, k, v, positions, table = make(5, 4, 2, 32, torch.bfloat16, device)
    view = poisoned(5, 4, 43, v)[:, 1:3, 8:40].copy_(v)
    slots = torch.tensor([5, 0, 2, 7, 3], device=device)
    # k is token by token and v head by head, with room for a v that is read by k's strides.
    memory = torch.full((4, 2, 9, 40), 7.0, dtype=q.dtype, device=device)
    k_cache, v_cache = memory.new_zeros(2, 4, 2, 32), memory[:2, :, :4, :32].transpose(1, 2)
    lf.apply_rope_and_append(q, k, view, positions, table, k_cache, v_cache, slots)
    assert torch.equal(v_cache[slots // 4, slots % 4], v)
    assert (memory != 7).sum() <= v.numel()
    want = reference.apply_rope(q, k, positions, table)[1]
    assert torch.equal(k_cache[slots // 4, slots % 4], want)


def test_f19_slot_minus_one_writes_nothing(device: torch.device) -> None:
    q, k, v, positions, table = make(4, 4, 2, 32, torch.bfloat16, device)
    caches = torch.randn(2, 2, 8, 2, 32).bfloat16().to(device)
    before = caches.clone()
    nowhere = torch.full((4,), -1, device=device)
    lf.apply_rope_and_append(q, k, v, positions, table, *caches, nowhere)
    assert torch.equal(caches, before)
    slots = torch.tensor([-1, 2, -1, -1], device=device)
    lf.apply_rope_and_append(q, k, v, positions, table, *caches, slots)
    changed = (caches != before).any(-1).any(-1).nonzero().tolist()
    assert changed == [[0, 0, 2], [1, 0, 2]]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_f23_indices_out_of_range_stay_in_bounds(index: torch.dtype, device: torch.device) -> None:
    """Pass indices that the op does not check on a GPU. A position outside the table, which lies
    between sevens, makes its token NaN. A slot outside the cache writes nothing."""
    q, k, v, _, table = make(6, 4, 2, 32, torch.bfloat16, device)
    memory = torch.full((68, 32), 7.0, device=device)
    table = memory[2:-2].copy_(table)
    far = 2**31 - 1 if index == torch.int32 else 2**62
    positions = torch.tensor([64, -1, 63, far, -far, 0], dtype=index, device=device)
    pool = torch.full((2, 4, 8, 2, 32), 7.0, dtype=torch.bfloat16, device=device)
    caches = pool[:, 1:3]  # a block before them and one after
    q_out = torch.empty(6, 4, 32, dtype=q.dtype, device=device)
    bad = torch.tensor([True, True, False, True, True, False], device=device)
    want_q, want_k = reference.apply_rope(q[~bad].clone(), k[~bad].clone(), positions[~bad], table)
    for outside in ((20, -3), (far, -far)):  # near first, where a wrong write shows
        pool.fill_(7)
        slots = torch.tensor([0, 1, 16, *outside, 15], dtype=index, device=device)
        launcher("apply_rope").rope(
            q_out, None, q, k, positions, table, False, v, *caches, slots, None, None
        )
        assert q_out[bad].isnan().all()
        assert torch.equal(q_out[~bad], want_q)
        written = (pool != 7).any(-1).any(-1).nonzero().tolist()  # NaN != 7
        assert written == [[c, 1 + s // 8, s % 8] for c in (0, 1) for s in (0, 1, 15)]
        assert torch.equal(caches[0, 1, 7], want_k[1]) and caches[0, 0, :2].isnan().all()
        assert torch.equal(caches[1, 0, :2], v[:2]) and torch.equal(caches[1, 1, 7], v[5])
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    launcher("apply_rope").rope(q_out, k_out, q, k, positions, table, False, *[None] * 6)
    assert k_out[bad].isnan().all() and torch.equal(k_out[~bad], want_k)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("d", [6, 80, 128])
def test_f29_f30_f31_offsets_strides_and_canaries(
    d: int, interleaved: bool, device: torch.device
) -> None:
    """Put heads off alignment with NaN around them, and sevens around what may be written."""
    q, k, _, positions, table = make(3, 4, 2, d, torch.bfloat16, device)
    want = reference.apply_rope(q, k, positions, table, interleaved=interleaved)
    views = []
    for x in (q, k):
        fenced = poisoned(5, x.shape[1] + 2, d + 3, x)
        views.append(fenced[1:4, 1:-1, 1 : 1 + d].copy_(x))
    outs = [torch.full((5, x.shape[1], d), 7.0, dtype=x.dtype, device=device) for x in (q, k)]
    launcher("apply_rope").rope(
        outs[0][1:4], outs[1][1:4], *views, positions, table, interleaved, *[None] * 6
    )
    for out, expected in zip(outs, want, strict=True):
        assert (out[[0, 4]] == 7).all() and torch.equal(out[1:4], expected)


def test_f02_f03_strides_past_2_to_31(device: torch.device) -> None:
    """Use strides of tokens and of the cache's blocks that fit 32 bits but not times 2, and some
    that themselves do not fit."""
    memory = torch.empty(2**31 + 512, dtype=torch.bfloat16, device=device)
    table = lf.rope_table(1e4, 16, head_dim=64, device=device)
    for n, stride in ((3, 2**30 + 128), (2, 2**31 + 128)):
        values = torch.randn(n, 2, 64).bfloat16().to(device)
        q = memory.as_strided((n, 2, 64), (stride, 64, 1)).copy_(values)
        positions = torch.arange(3, 3 + n, device=device)
        want = reference.apply_rope(values, values, positions, table)
        for a, b in zip(lf.apply_rope(q, q, positions, table), want, strict=True):
            assert torch.equal(a, b)
        cache = memory.as_strided((n, 1, 2, 64), (stride, 128, 64, 1))
        slots, other = torch.arange(n, device=device).flip(0), torch.empty_like(cache.contiguous())
        lf.apply_rope_and_append(values, values, values, positions, table, cache, other, slots)
        assert torch.equal(cache[slots, 0], want[1])


@pytest.mark.gpu
@pytest.mark.big
def test_f01_more_than_2_to_31_elements(device: torch.device) -> None:
    heads, d = 32, 128
    tokens = 2**31 // (heads * d) + 3
    q = torch.randn(1, heads, d).bfloat16().to(device)
    table = lf.rope_table(1e4, 16, head_dim=d, device=device)
    positions = torch.full((tokens,), 3, device=device)
    wide = q.expand(tokens, heads, d)
    got, _ = lf.apply_rope(wide, wide[:, :1], positions, table)
    want, _ = lf.apply_rope(q, q[:, :1], positions[:1], table)
    for i in (0, tokens - 5, tokens - 4, tokens - 3, tokens - 1):
        assert torch.equal(got[i], want[0]), i


def test_f11_no_tokens_and_f41_batches(device: torch.device) -> None:
    q, k, v, positions, table = make(33, 4, 2, 64, torch.bfloat16, device)
    empty_q, empty_k = lf.apply_rope(q[:0], k[:0], positions[:0], table)
    assert empty_q.shape == (0, 4, 64) and empty_k.shape == (0, 2, 64)
    alone = lf.apply_rope(q[:1], k[:1], positions[:1], table)
    for t in (2, 33):
        many = lf.apply_rope(q[:t], k[:t], positions[:t], table)
        assert torch.equal(many[0][:1], alone[0]) and torch.equal(many[1][:1], alone[1])


@pytest.mark.triton
@pytest.mark.parametrize("heads", [(4, 2), (40, 8)], ids=str)
def test_f33_every_configuration(heads: tuple[int, int], device: torch.device) -> None:
    """Force each configuration into poisoned outputs. The first call equals the second (f32)."""
    q, k, v, positions, table = make(3, *heads, 128, torch.bfloat16, device)
    want_q, want_k = reference.apply_rope(q, k, positions, table)
    slots = torch.tensor([5, 0, 2], device=device)
    for config in rope._configs(common.chip_of(q), heads[0], 128):
        with common.force("rope", config):
            for _ in range(2):
                q_out, k_out = poisoned(3, heads[0], 128, q), poisoned(3, heads[1], 128, q)
                triton_backend.rope(q_out, k_out, q, k, positions, table, False)
                assert torch.equal(q_out, want_q) and torch.equal(k_out, want_k), config
                caches = torch.zeros(2, 2, 4, heads[1], 128, dtype=q.dtype, device=device)
                triton_backend.rope(q_out, None, q, k, positions, table, False, v, *caches, slots)
                assert torch.equal(caches[0].flatten(0, 1)[slots], want_k), config
                assert torch.equal(caches[1].flatten(0, 1)[slots], v), config
