"""Tests of which keys a query of attention sees: masks, and the borders of packed sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import llama_fast as lf

from .attention import INF, NAN, check, cu_seqlens, dtypes, framed, launch, paths, qkv, two_dtypes
from .conftest import launcher

# ---- masks ----


@two_dtypes
@pytest.mark.parametrize("lengths", [(5, 3), (150, 90), (40, 0), (129, 1)])
def test_f07_rows_that_see_nothing_give_zeros(
    device: torch.device, dtype: torch.dtype, lengths: tuple[int, int]
) -> None:
    q, k, v = qkv(device, lengths, (2, 1), 64, dtype)
    out = check(q, k, v)
    assert not out[:, : lengths[0] - lengths[1]].any()


def test_f10_no_keys_and_no_mask_give_zeros(device: torch.device) -> None:
    q, k, v = qkv(device, (3, 0), (2, 1), 16, torch.float32)
    assert torch.equal(lf.attention(q, k, v, causal=False), torch.zeros_like(q))


@dtypes
@pytest.mark.parametrize("d", [16, 64])
def test_scores_that_are_all_minus_infinity_stay_nan(
    device: torch.device, dtype: torch.dtype, d: int
) -> None:
    q, k, v = qkv(device, (3, 5), (1, 1), d, dtype)
    q[:], k[:, :4] = 1.0, -INF
    out = launch(q, k, v)  # the last query also sees the finite key, the others see none
    assert out[:, :2].isnan().all()
    assert torch.equal(out[:, 2], v[:, 4])


def test_a_tile_of_minus_infinity_contributes_nothing(device: torch.device) -> None:
    q, k, v = qkv(device, (3, 200), (1, 1), 16, torch.bfloat16)
    q[:], k[:, :150] = 1.0, -INF
    out = launch(q, k, v, causal=False)
    assert torch.equal(out, launch(q, k[:, 150:], v[:, 150:], causal=False))


@two_dtypes
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("key", [20, 131, 199])
def test_f08_a_masked_key_never_counts(
    device: torch.device, dtype: torch.dtype, bad: float, key: int
) -> None:
    q, k, v = qkv(device, (200, 200), (1, 1), 40, dtype)
    clean = lf.attention(q, k, v)
    k[:, key] = bad
    out = lf.attention(q, k, v)
    assert torch.equal(out[:, :key], clean[:, :key])
    assert not out[:, key:].isfinite().any()


@two_dtypes
@pytest.mark.parametrize("keys", [64, 128, 200])
@pytest.mark.parametrize("d", [40, 64])
def test_a_row_that_misses_only_its_last_key(
    device: torch.device, dtype: torch.dtype, d: int, keys: int
) -> None:
    """Give the first of two rows all of a tile but its last key, whose weight would be largest. In
    CUDA another kernel serves a head_dim of 64 on Hopper."""
    q, k, v = qkv(device, (2, keys), (1, 1), d, dtype)
    clean = lf.attention(q, k, v)
    k[:, -1], v[:, -1] = 8 * q[:, 0], 1e4
    assert torch.equal(lf.attention(q, k, v)[:, 0], clean[:, 0])


@paths
@pytest.mark.parametrize("bad", [NAN, INF])
def test_f08_a_value_past_the_diagonal_tiles_never_counts(
    device: torch.device, bad: float, tma: bool
) -> None:
    q, k, v = qkv(device, (300, 300), (1, 1), 64, torch.bfloat16)
    clean = launch(q, k, v, tma=tma)
    v[:, 260] = bad
    out = launch(q, k, v, tma=tma)
    assert torch.equal(out[:, :256], clean[:, :256])  # BLOCK_M is 128
    assert not out[:, 260:].isfinite().any()


@paths
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("causal", [True, False])
def test_f08_packed_neighbors_never_count(
    device: torch.device, causal: bool, bad: float, tma: bool
) -> None:
    lengths = [25, 150, 25]
    q, k, v = (t[0] for t in qkv(device, (200, 200), (2, 1), 64, torch.bfloat16))
    cu = cu_seqlens(device, lengths)
    clean = launch(q, k, v, causal, cu, cu, tma)
    for t in (q, k, v):
        t[:25], t[175:] = bad, bad
    out = launch(q, k, v, causal, cu, cu, tma)
    assert torch.equal(out[25:175], clean[25:175])
    assert out[25:175].isfinite().all()


@two_dtypes
def test_a_nan_query_spoils_its_own_row_only(device: torch.device, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, (40, 140), (2, 1), 64, dtype)
    clean = lf.attention(q, k, v)
    q[0, 11, 1, 5] = NAN
    out = lf.attention(q, k, v)
    assert out[0, 11, 1].isnan().all()
    out[0, 11, 1] = clean[0, 11, 1]
    assert torch.equal(out, clean)


def test_huge_scores_stay_finite(device: torch.device) -> None:
    q, k, v = qkv(device, (50, 150), (2, 1), 128, torch.float32)
    out = lf.attention(q * 1e4, k * 1e4, v)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 1e-5)


# ---- packed sequences ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tma"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)],
    ids=["tma", "pointers", "float32"],
)
def test_f10_packed_sequences_with_empty_ones(
    device: torch.device, dtype: torch.dtype, causal: bool, tma: bool
) -> None:
    lengths_q, lengths_k = [0, 5, 0, 130, 1, 9, 0], [0, 5, 7, 200, 1, 0, 0]
    q, k, v = qkv(device, (sum(lengths_q), sum(lengths_k)), (2, 1), 32, dtype)
    cu_q, cu_k = cu_seqlens(device, lengths_q), cu_seqlens(device, lengths_k)
    out = launch(q[0], k[0], v[0], causal, cu_q, cu_k, tma)
    for (a, b), (c, e) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        if a == b:
            continue
        alone = launch(q[:, a:b], k[:, c:e], v[:, c:e], causal, tma=tma)
        assert torch.equal(out[None, a:b], alone)
        if c == e:
            assert not alone.any()


def test_many_short_sequences_find_their_tiles(device: torch.device) -> None:
    lengths = [3, 0, 0, 1, 129, 2, 0, 128, 4, 0, 1, 1, 127, 0]
    q, k, v = (t[0] for t in qkv(device, (sum(lengths),) * 2, (1, 1), 16, torch.bfloat16))
    cu = cu_seqlens(device, lengths)
    check(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


@pytest.mark.parametrize(
    "cu",
    [[0, 90, 30, 60], [0, 20, 40, 2**31 - 1], [-(2**31), 20, 40, 60], [50, 60, -5, 2**31 - 1]],
    ids=str,
)
def test_wrong_cu_seqlens_stay_inside(device: torch.device, cu: list[int]) -> None:
    """Pass offsets that no GPU op checks. NaN around the tensors is neither read nor written."""
    q, k, v = (framed(t[0]) for t in qkv(device, (60, 60), (1, 1), 16, torch.bfloat16))
    out = framed(torch.zeros_like(q))
    wrong = torch.tensor(cu, dtype=torch.int32, device=device)
    launcher("attention").attention(out, q, k, v, True, 0.25, wrong, wrong)
    assert out.isfinite().all()
    assert out._base is not None and int((~out._base.isnan()).sum()) == out.numel()


def test_f11_no_queries_then_a_normal_call(device: torch.device) -> None:
    q, k, v = qkv(device, (4, 4), (2, 1), 16, torch.bfloat16)
    for empty in (q[:, :0], q[:0]):
        batch = empty.shape[0]
        assert lf.attention(empty, k[:batch], v[:batch]).shape == empty.shape
    cu = cu_seqlens(device, [])
    assert lf.attention(q[0, :0], k[0, :0], v[0, :0], cu_seqlens_q=cu, cu_seqlens_k=cu).numel() == 0
    check(q, k, v)
