"""Tests of the attention_with_kvcache kernels against fp64, and of keys that they must not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast import reference
from llama_fast.kernels import common, decode_plan
from llama_fast.kernels.decode_tile import splits_of

from ..support.decode_attention import DTYPES, dtypes, poison, queries
from .conftest import launcher
from .decode_attention import BF16, FP8, attend, check, paged

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN, INF = float("nan"), float("inf")

# ---- against fp64 ----


@dtypes
@pytest.mark.parametrize("block_size", [0, 16], ids=["contiguous", "paged"])
def test_f09_lengths_that_no_block_divides(
    make: Any, lengths: Any, dtype: torch.dtype, block_size: int
) -> None:
    seqlens = lengths(1, 2, 5, 17, 97, 127, 129, 257, 300)
    q, k, v = make(9, 1, 300, (4, 1), 32, dtype)
    options = {}
    if block_size:
        k, v, options["block_table"] = paged(k, v, block_size)
    check(q, k, v, seqlens, **options)


@dtypes
@queries(2, 8, 30)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_speculative_decoding_and_chunked_prefill(
    make: Any, lengths: Any, dtype: torch.dtype, sq: int, causal: bool
) -> None:
    # 156 + 2 - 30 is a multiple of every tile, so a tile begins with the first key that the first
    # query may not see.
    check(*make(2, sq, 160, (3, 1), 48, dtype), lengths(156, sq), causal=causal)


@pytest.mark.parametrize("d", [8, 16, 40, 64, 96, 128, 200, 256])
def test_head_dims(make: Any, lengths: Any, d: int) -> None:
    for dtype in DTYPES:
        check(*make(1, 1, 70, (4, 1), d, dtype), lengths(70))
    check(*make(1, 20, 70, (4, 1), d, BF16), lengths(67))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24])
def test_f15_f16_every_ratio_of_heads(make: Any, lengths: Any, group: int) -> None:
    check(*make(1, 1, 50, (2 * group, 2), 16, BF16), lengths(50))
    check(*make(1, 3, 50, (2 * group, 2), 16, torch.float16), lengths(50))


@dtypes
@queries(1, 3)
def test_automatic_splits(make: Any, lengths: Any, dtype: torch.dtype, sq: int) -> None:
    check(*make(3, sq, 1600, (2, 1), 16, dtype), lengths(1600, 1030, 0))


@dtypes
def test_exact_sums(device: torch.device, lengths: Any, dtype: torch.dtype) -> None:
    """Make nothing round, split or not: equal scores, integer values, a power of two of keys."""
    q, k = torch.zeros(1, 1, 4, 64, dtype=dtype), torch.randn(1, 256, 2, 64).to(dtype)
    v = torch.randint(-4, 5, (1, 256, 2, 64)).to(dtype)
    mean = v.double().mean(1).repeat_interleave(2, 1).to(device, dtype)
    q, k, v = (t.to(device) for t in (q, k, v))
    for splits in (0, 1, 2, 3):
        assert torch.equal(attend(q, k, v, lengths(256), num_splits=splits)[:, 0], mean)


def test_one_key_far_above_the_others(make: Any, lengths: Any) -> None:
    q, k, v = make(1, 1, 600, (4, 2), 64, torch.float32)
    k[0, 411] = 40 * q[0, 0, ::2]
    for splits in (1, 3):
        out = check(q, k, v, lengths(600), softmax_scale=1.0, num_splits=splits)
        assert torch.allclose(out[0, 0, ::2], v[0, 411], rtol=1e-5)


# ---- what must not reach a result ----


@pytest.mark.parametrize(
    ("dtype", "sq"), [(BF16, 1), (BF16, 20), (torch.float16, 20), (torch.float32, 2)], ids=str
)
def test_f08_what_lies_past_the_lengths_changes_nothing(
    make: Any, lengths: Any, dtype: torch.dtype, sq: int
) -> None:
    seqlens = lengths(41, 0, 129, 64)
    q, k, v = make(4, sq, 140, (4, 1), 48, dtype)
    clean = attend(q, *poison(k, v, seqlens, 0.0), seqlens)
    assert clean.isfinite().all()
    for value in (NAN, INF):
        dirty = poison(k, v, seqlens, value)
        assert torch.equal(attend(q, *dirty, seqlens), clean)
        paged_k, paged_v, table = paged(*dirty, 16)
        assert torch.equal(attend(q, paged_k, paged_v, seqlens, block_table=table), clean)


@dtypes
@queries(5, 30)
def test_nan_stays_nan(make: Any, lengths: Any, dtype: torch.dtype, sq: int) -> None:
    """Let a NaN key reach only the queries that see it, and a NaN value at least those."""
    q, k, v = make(1, sq, 100, (3, 1), 32, dtype)
    for splits in (1, 3) if sq == 5 else (1,):
        clean = attend(q, k, v, lengths(100), num_splits=splits)
        for name in ("k", "v"):
            dirty = {"k": k.clone(), "v": v.clone()}
            dirty[name][0, 98] = NAN
            out = attend(q, dirty["k"], dirty["v"], lengths(100), num_splits=splits)
            assert out[:, sq - 2 :].isnan().all()
            if name == "k":
                assert torch.equal(out[:, : sq - 2], clean[:, : sq - 2])


@queries(2, 17)
@pytest.mark.parametrize("cache", [BF16, FP8], ids=["bf16", "fp8"])
def test_a_nan_in_a_query_stays_in_its_head(
    make: Any, lengths: Any, sq: int, cache: torch.dtype
) -> None:
    q, k, v = make(1, sq, 40, (8, 2), 64, BF16)
    options: dict[str, Any] = {}
    if cache == FP8:
        k, v = k.to(FP8), v.to(FP8)
        options = {"k_scale": torch.ones(1, device=q.device), "v_scale": torch.ones(1).to(q.device)}
    clean = attend(q, k, v, lengths(40), **options)
    q[0, 1, 3, 5] = NAN
    out = attend(q, k, v, lengths(40), **options)
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(out, clean)


@dtypes
@queries(1, 17)
def test_f10_zero_lengths(make: Any, lengths: Any, dtype: torch.dtype, sq: int) -> None:
    q, k, v = make(4, sq, 65, (4, 1), 32, dtype)
    want = check(q, k, v, lengths(0, 65, 0, 64))
    k[0], v[2] = NAN, NAN
    out = attend(q, k, v, lengths(0, 65, 0, 64))
    assert torch.equal(out, want) and not out[0].any() and not out[2].any()
    assert not attend(q, k, v, lengths(0, 0, 0, 0)).any()


@queries(7, 20)
def test_f07_queries_that_see_no_key_give_zeros(make: Any, lengths: Any, sq: int) -> None:
    out = check(*make(2, sq, 9, (4, 2), 16, torch.float32), lengths(3, 1))
    assert not out[0, : sq - 3].any() and not out[1, : sq - 1].any()


@dtypes
@pytest.mark.parametrize("splits", [1, 3])
def test_scores_that_are_all_minus_infinity_stay_nan(
    make: Any, lengths: Any, dtype: torch.dtype, splits: int
) -> None:
    """Follow eager: the first query sees nothing else, the second one finite score too."""
    q, k, v = make(1, 2, 300, (2, 1), 32, dtype)
    q[:], k[:, :299] = 1.0, float("-inf")
    out = attend(q, k, v, lengths(300), num_splits=splits)
    assert out[0, 0].isnan().all()
    assert torch.equal(out[0, 1], v[0, 299].expand(2, -1))


def test_f11_nothing_to_do_then_a_normal_call(make: Any, lengths: Any) -> None:
    for batch, sq in ((0, 1), (2, 0), (0, 0)):
        q, k, v = make(batch, sq, 33, (4, 2), 32, BF16)
        assert attend(q, k, v, lengths(*[33] * batch)).shape == q.shape
    check(*make(1, 1, 33, (4, 2), 32, BF16), lengths(33))
    q, k, v = make(2, 3, 16, (4, 2), 32, BF16)
    no_table = torch.empty(2, 0, dtype=torch.int32, device=q.device)
    assert not attend(q, k, v, lengths(0, 0), block_table=no_table).any()


# ---- layouts ----


@pytest.mark.parametrize(
    ("dtype", "splits"),
    [*((BF16, n) for n in (1, 2, 7, 33, 64, 5000)), (torch.float16, 7), (torch.float32, 7)],
    ids=str,
)
def test_f13_f31_forced_splits_of_strided_queries(
    make: Any, lengths: Any, dtype: torch.dtype, splits: int
) -> None:
    _, k, v = make(2, 1, 700, (6, 2), 16, dtype)
    q = torch.randn(2, 3, 6, 96).to(k.device, dtype)[:, 1:2, :, 32:48]
    seqlens = lengths(700, 61)
    want = check(q, k, v, seqlens, num_splits=splits, softmax_scale=0.2)
    memory = torch.full((4, 3, 8, 48), 7.0, dtype=dtype, device=q.device)
    out = memory[1:3, 1:2, 1:7, 16:32]
    launcher("attention_with_kvcache").decode_attention(
        out, q, k, v, seqlens, None, True, 0.2, splits, None, None
    )
    assert torch.equal(out, want)
    out.fill_(7.0)
    assert (memory == 7).all()


@pytest.mark.parametrize("cache", [BF16, FP8], ids=["bf16", "fp8"])
@queries(1, 20)
def test_every_layout_gives_the_same_bits(
    make: Any, lengths: Any, cache: torch.dtype, sq: int
) -> None:
    def head_major(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in (k, v))
        return k, v

    q, k, v = make(2, sq, 150, (8, 2) if sq == 1 else (4, 2), 32, BF16)
    options: dict[str, Any] = {"num_splits": 2 if sq == 1 else 1}
    if cache == FP8:
        k, v = k.to(FP8), v.to(FP8)
        options["k_scale"] = options["v_scale"] = torch.full((1,), 0.5, device=q.device)
    seqlens = lengths(143, 90)
    want = check(q, k, v, seqlens, **options)
    assert torch.equal(attend(q, *head_major(k, v), seqlens, **options), want)
    for block_size in (1, 16, 48, 128) if cache == BF16 else (16, 128):
        paged_k, paged_v, table = paged(k, v, block_size)
        out = attend(q, paged_k, paged_v, seqlens, block_table=table, **options)
        assert torch.equal(out, want)
        caches = head_major(paged_k, paged_v)
        assert block_size != 16 or torch.equal(
            attend(q, *caches, seqlens, block_table=table, **options), want
        )
    wide = torch.full((2, table.shape[1] + 3), 2**30, dtype=torch.int32, device=q.device)
    wide[:, : table.shape[1]] = table
    out = attend(q, paged_k, paged_v, seqlens, block_table=wide[:, : table.shape[1]], **options)
    assert torch.equal(out, want)


def test_f04_keys_and_values_interleaved_in_one_pool(make: Any, lengths: Any) -> None:
    q, k, v = make(2, 1, 128, (4, 2), 64, BF16)
    seqlens = lengths(128, 77)
    want = attend(q, k, v, seqlens)
    pool = k.new_full((2, 128, 5, 2, 192), NAN)
    caches = pool[:, :, 1, :, 64:128], pool[:, :, 3, :, :64]
    for cache, rows in zip(caches, (k, v), strict=True):
        cache.copy_(rows)
    assert torch.equal(attend(q, *caches, seqlens), want)
    of_another_layout = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(q, k, of_another_layout, seqlens), want)
    blocks = torch.stack([t.view(16, 16, 2, 64) for t in (k, v)], 1)  # [block, k or v, offset, ...]
    table = torch.arange(16, dtype=torch.int32, device=q.device).view(2, 8)
    assert torch.equal(attend(q, blocks[:, 0], blocks[:, 1], seqlens, block_table=table), want)


@queries(1, 32)
def test_f03_highest_block_of_a_pool_past_2_to_the_31(make: Any, lengths: Any, sq: int) -> None:
    """Use only a few blocks of the pool. On a CPU untouched memory costs nothing."""
    torch.use_deterministic_algorithms(False)  # it would touch all of the pool
    q, k, v = make(1, sq, 512, (8, 4), 128, BF16)
    pools = [torch.empty(20000, 256, 4, 128, dtype=BF16, device=q.device) for _ in range(2)]
    assert pools[0].numel() > 2**31
    for pool, cache in zip(pools, (k, v), strict=True):
        pool[-1], pool[-2] = cache[0, :256], cache[0, 256:]
    want = attend(q, k, v, lengths(500))
    out = attend(q, *pools, lengths(500), block_table=lengths(19999, 19998)[None])
    assert torch.equal(out, want)
    small = [p.view(-1, 16, 4, 128) for p in pools]  # ids per key, not per tile
    table = torch.arange(32, dtype=torch.int32, device=q.device)
    table = torch.where(table < 16, 319984 + table, 319968 + table - 16)[None]
    assert torch.equal(attend(q, *small, lengths(500), block_table=table), want)


def test_f02_tokens_far_apart(make: Any, lengths: Any) -> None:
    torch.use_deterministic_algorithms(False)
    q, k, v = make(1, 1, 600, (2, 1), 32, BF16)
    pool = torch.empty(600, 1, 2**22, dtype=BF16, device=q.device)[None]
    assert pool.numel() > 2**31
    caches = pool[..., :32], pool[..., 32:64]
    for cache, rows in zip(caches, (k, v), strict=True):
        cache.copy_(rows)
    assert torch.equal(attend(q, *caches, lengths(600)), attend(q, k, v, lengths(600)))


def test_f22_lengths_out_of_range_count_as_the_nearest(make: Any, lengths: Any) -> None:
    """Pass lengths that the op refuses on a CPU. On a GPU only the kernel can see them."""
    q, k, v = make(4, 1, 48, (4, 1), 32, BF16)
    want = attend(q, k, v, lengths(48, 0, 48, 0))
    paged_k, paged_v, table = paged(k, v, 16)
    for keys, values, ids in ((k, v, None), (paged_k, paged_v, table)):
        out = torch.empty_like(q)
        wrong = lengths(49, -1, 2**31 - 1, -(2**31))
        launcher("attention_with_kvcache").decode_attention(
            out, q, keys, values, wrong, ids, True, 32**-0.5, 0, None, None
        )
        assert torch.equal(out, want)


@pytest.mark.parametrize("block_size", [16, 128])
@queries(1, 20)
def test_f19_f22_blocks_that_do_not_exist_are_not_seen(
    make: Any, lengths: Any, block_size: int, sq: int
) -> None:
    """Use ids of -1 and past the pool: their keys count as absent, and nothing is written."""
    n = 384 // block_size
    q, k, v = make(1, sq, 384, (4, 1), 32, BF16)
    paged_k, paged_v, table = paged(k, v, block_size)
    for bad in (-1, paged_k.shape[0], 2**31 - 1, -(2**31)):
        ids = table.clone()
        ids[0, n // 3 : 2 * n // 3] = bad
        before = paged_k.clone(), paged_v.clone()
        for splits in (1, 3) if sq == 1 else (1,):
            out = torch.empty_like(q)
            launcher("attention_with_kvcache").decode_attention(
                out, q, paged_k, paged_v, lengths(384), ids, False, 32**-0.5, splits, None, None
            )
            kept = [torch.cat((t[:, :128], t[:, 256:]), 1) for t in (k, v)]
            want = reference.attention_with_kvcache(q, *kept, lengths(256), causal=False)
            torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)
        for now, then in zip((paged_k, paged_v), before, strict=True):
            assert torch.equal(now.view(torch.int16), then.view(torch.int16))


# ---- what a result may depend on ----


@queries(1, 17)
def test_f41_alone_or_in_any_batch_and_any_capacity(make: Any, lengths: Any, sq: int) -> None:
    q, k, v = make(5, sq, 1600, (4 if sq == 1 else 2, 1), 16, BF16)
    seqlens = lengths(3, 0, 700, 64, 1600)
    whole = attend(q, k, v, seqlens)
    for i in (2, 4):
        one = slice(i, i + 1)
        for first, last in ((i, i + 1), (i - 1, i + 1)):
            some = slice(first, last)
            out = attend(q[some], k[some], v[some], seqlens[some])
            assert torch.equal(out[i - first], whole[i]), (i, some)
        n = int(seqlens[i])
        assert torch.equal(attend(q[one], k[one, :n], v[one, :n], seqlens[one])[0], whole[i])


CONFIGURATIONS = [
    (d, dtype, fp8_cache, rows)
    for d, dtype, fp8_cache, rows in (
        (64, "bfloat16", False, 16),
        (128, "float16", False, 32),
        (40, "bfloat16", False, 64),
        (128, "bfloat16", False, 128),
        (256, "bfloat16", False, 64),
        (128, "bfloat16", True, 16),
        (128, "bfloat16", True, 64),
        (32, "float32", False, 64),
        (32, "float32", True, 16),
    )
]


@pytest.mark.triton
@pytest.mark.parametrize("key", CONFIGURATIONS, ids=str)
def test_f33_each_configuration_alone(
    make: Any, lengths: Any, key: tuple[int, str, bool, int]
) -> None:
    d, dtype, fp8_cache, rows = key
    q, k, v = make(1, rows // 4, 200, (4, 1), d, getattr(torch, dtype))
    options: dict[str, Any] = {}
    if fp8_cache:
        k, v = k.to(FP8), v.to(FP8)
        options = {"k_scale": torch.ones(1).to(q.device), "v_scale": torch.ones(1).to(q.device)}
    k, v, table = paged(k, v, 128)
    configurations = decode_plan.configs(common.chip_of(q), *key)
    assert len(set(map(str, configurations))) == len(configurations) > 0
    for config in configurations:
        with common.force("attention_with_kvcache", config):
            for splits in (1, 2) if rows == 16 else (1,):
                check(q, k, v, lengths(191), block_table=table, num_splits=splits, **options)


@triton.jit
def _count(out, keys, num_splits, most):
    at = tl.program_id(0)
    tl.store(out + at, splits_of(tl.load(keys + at), num_splits, most, 64))


@pytest.mark.triton
def test_splits_are_short_while_they_are_few(device: torch.device, lengths: Any) -> None:
    """Apply the host's rule on the device: a sequence of 1,000 keys has three splits, not one."""
    counts = (0, 1, 63, 64, 255, 256, 511, 512, 1000, 1023, 1024, 2047, 2048, 4095, 4096, 9000)
    keys = lengths(*counts)
    for num_splits, most in ((0, 100), (0, 5), (1, 4), (4, 4)):
        out = torch.zeros_like(keys)
        _count[(len(counts),)](out, keys, num_splits, most)
        for n, splits in zip(counts, out.tolist(), strict=True):
            wanted = num_splits or decode_plan.splits_wanted(n)
            assert splits == max(1, min(wanted, most, -(-n // 64))), (n, num_splits, most)
    assert decode_plan.splits_wanted(1000) == 3


# ---- what only hardware shows ----


@pytest.mark.gpu
def test_f20_a_graph_captured_small_replays_after_larger_calls(make: Any, lengths: Any) -> None:
    q, k, v = make(2, 1, 8192, (8, 2), 128, BF16)
    seqlens = lengths(100, 50)
    want = attend(q, k, v, seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, seqlens)
    large = make(32, 1, 8192, (32, 8), 128, BF16)
    for _ in range(3):
        attend(*large, lengths(*[8192] * 32))
        trash = [torch.full((1 << 20,), NAN, device=q.device) for _ in range(50)]
        graph.replay()
        assert torch.equal(out, want)
        del trash
    seqlens.copy_(lengths(8192, 5000))
    graph.replay()
    assert torch.equal(out, attend(q, k, v, seqlens))
    seqlens.copy_(lengths(100, 50))
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.gpu
@queries(1, 4, 64)
@pytest.mark.parametrize("cache", [BF16, FP8], ids=["bf16", "fp8"])
def test_f42_250_repeats(make: Any, lengths: Any, sq: int, cache: torch.dtype) -> None:
    q, k, v = make(8, sq, 4096, (32, 8), 128, BF16)
    options: dict[str, Any] = {}
    if cache == FP8:
        k, v = k.to(FP8), v.to(FP8)
        options["k_scale"] = options["v_scale"] = torch.ones(1, device=q.device)
    k, v, options["block_table"] = paged(k, v, 128)
    seqlens = lengths(4096, 1, 0, 129, 2000, 4095, 513, 3000)
    want = attend(q, k, v, seqlens, **options)
    for _ in range(250):
        assert torch.equal(attend(q, k, v, seqlens, **options), want)
