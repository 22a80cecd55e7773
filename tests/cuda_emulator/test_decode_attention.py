"""Tests of csrc/cuda/decode_attention.cu in the emulator: every instance, layout and split, FP8
caches, arguments that the host cannot check, and any order of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast import reference

from ..support.decode_attention import dtypes, lengths, make, page
from ..support.tolerances import ATTENTION_VALUE_ULPS, assert_close_to_eager, ulp
from .native import emulated

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
fp8_or_not = pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
NAN = float("nan")


@pytest.fixture
def cuda() -> Any:
    return emulated()


def to_fp8(k: Tensor, v: Tensor, per_head: bool = True) -> dict[str, Tensor]:
    """Return k and v in e4m3 and their scales. NaN stays NaN."""
    made = {}
    for name, cache in (("k", k), ("v", v)):
        scale = cache.float().nan_to_num(0, 0, 0).abs().amax((0, 1, 3)).clamp(min=1e-3) / 448
        scale = scale if per_head else scale.max()[None]
        made[f"{name}_scale"] = scale
        made[f"{name}_cache"] = (cache.float() / scale[:, None]).to(E4M3)
    return made


def run(
    cuda: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    num_splits: int = 0,
    **scales: Tensor,
) -> Tensor:
    out = torch.full(q.shape, NAN, dtype=q.dtype)
    scale = q.shape[-1] ** -0.5
    both = (scales.get("k_scale"), scales.get("v_scale"))
    cuda.decode_attention(out, q, k, v, seqlens, block_table, causal, scale, num_splits, *both)
    return out


def check(cuda: Any, q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, **options: Any) -> Tensor:
    actual = run(cuda, q, k, v, seqlens, **options)
    if "k_scale" in options:
        k, v = (t.float() * options.pop(f"{n}_scale")[:, None] for n, t in (("k", k), ("v", v)))
    eager = reference.attention_with_kvcache(q, k.to(q.dtype), v.to(q.dtype), seqlens, **options)
    exact = reference.attention_with_kvcache(q.double(), k.double(), v.double(), seqlens, **options)
    allowed = 0.0
    if q.dtype == F32:
        allowed = ATTENTION_VALUE_ULPS * ulp(v.double().nan_to_num(0, 0, 0).abs().max(), F32).item()
    assert_close_to_eager(actual, eager, exact, allowed)
    return actual


@dtypes
@fp8_or_not
@pytest.mark.parametrize("d", [8, 64, 72, 128, 136, 256])
def test_every_instance_in_two_orders_of_threads(
    cuda: Any, dtype: torch.dtype, fp8: bool, d: int
) -> None:
    for sq in (1, 9):  # 16 rows of queries per warp, or 32
        q, k, v = make(2, sq, 150, (4, 2), d, dtype)
        options: dict[str, Any] = {}
        if fp8:
            options = to_fp8(k, v, per_head=sq == 1)
            k, v = options.pop("k_cache"), options.pop("v_cache")
        first = check(cuda, q, k, v, lengths(150, 77), num_splits=2, **options)
        cuda.set_seed(1)  # test_seeds.py has more, and longer caches
        assert torch.equal(run(cuda, q, k, v, lengths(150, 77), num_splits=2, **options), first)


@dtypes
def test_f09_ragged_lengths_and_queries(cuda: Any, dtype: torch.dtype) -> None:
    for sq in (1, 5, 17):
        for causal in (True, False):
            q, k, v = make(6, sq, 260, (2, 1), 32, dtype)
            check(cuda, q, k, v, lengths(1, 15, 64, 65, 129, 257), causal=causal)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16, 24])
def test_f15_f16_every_ratio_of_heads(cuda: Any, group: int) -> None:
    for dtype in (BF16, F32):
        check(cuda, *make(2, 3, 50, (2 * group, 2), 16, dtype), lengths(50, 3))


@dtypes
@fp8_or_not
@pytest.mark.parametrize("sq", [1, 20])
def test_every_layout_gives_the_same_bits(
    cuda: Any, dtype: torch.dtype, fp8: bool, sq: int
) -> None:
    q, k, v = make(2, sq, 150, (4, 2), 48, dtype)
    options: dict[str, Any] = {}
    if fp8:
        options = to_fp8(k, v)
        k, v = options.pop("k_cache"), options.pop("v_cache")
    seqlens = lengths(143, 90)
    want = run(cuda, q, k, v, seqlens, **options)
    for block_size in (1, 5, 16, 128):
        paged_k, paged_v, table = page(k, v, block_size)
        out = run(cuda, q, paged_k, paged_v, seqlens, table, **options)
        assert torch.equal(out, want)
    wide = torch.full((2, 2, 150, 53), NAN).to(k.dtype)  # heads first, rows at any address
    far_k, far_v = wide.clone(), wide.clone()
    for far, cache in ((far_k, k), (far_v, v)):
        far.view(k.dtype if not fp8 else torch.uint8)[..., 3:51] = cache.transpose(1, 2).view(
            k.dtype if not fp8 else torch.uint8
        )
    far_k, far_v = (t[..., 3:51].transpose(1, 2) for t in (far_k, far_v))
    assert torch.equal(run(cuda, q, far_k, far_v, seqlens, **options), want)


@dtypes
@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_f13_forced_splits_of_strided_queries(cuda: Any, dtype: torch.dtype, splits: int) -> None:
    _, k, v = make(2, 1, 300, (6, 2), 32, dtype)
    q = torch.randn(2, 3, 6, 97).to(dtype)[:, 1:2, :, 33:65]
    seqlens = lengths(300, 61)
    check(cuda, q, k, v, seqlens, num_splits=splits)
    memory = torch.full((4, 1, 6, 35), 7.0, dtype=dtype)
    out = memory[1:3, :, :, 1:33]
    rest = (None, True, 32**-0.5, splits, None, None)
    cuda.decode_attention(out, q, k, v, seqlens, *rest)
    assert (memory[[0, 3]] == 7).all() and (memory[..., 33:] == 7).all()
    assert torch.equal(out, run(cuda, q.contiguous(), k, v, seqlens, num_splits=splits))


@dtypes
@fp8_or_not
def test_f08_f10_what_lies_past_the_lengths_changes_nothing(
    cuda: Any, dtype: torch.dtype, fp8: bool
) -> None:
    seqlens = lengths(41, 0, 257, 64)
    for sq in (1, 20):
        q, k, v = make(4, sq, 300, (4, 2), 64, dtype)
        options: dict[str, Any] = {}
        if fp8:
            options = to_fp8(k, v)
            k, v = options.pop("k_cache"), options.pop("v_cache")
        clean = run(cuda, q, k, v, seqlens, **options)
        assert clean.isfinite().all() and not clean[1].any()
        for i, n in enumerate(seqlens.tolist()):
            k[i, n:], v[i, n:] = NAN, NAN
        assert torch.equal(run(cuda, q, k, v, seqlens, **options), clean)


@dtypes
@fp8_or_not
def test_a_nan_reaches_the_rows_that_see_it(cuda: Any, dtype: torch.dtype, fp8: bool) -> None:
    q, k, v = make(1, 8, 200, (2, 1), 64, dtype)
    options: dict[str, Any] = {}
    if fp8:
        options = to_fp8(k, v)
        k, v = options.pop("k_cache"), options.pop("v_cache")
    clean = run(cuda, q, k, v, lengths(200), **options)
    k[0, 197, 0, 9] = NAN
    out = run(cuda, q, k, v, lengths(200), **options)
    assert torch.equal(out[:, :5], clean[:, :5]) and out[:, 5:].isnan().all()


def test_fp8_is_exact_where_eager_is(cuda: Any) -> None:
    """Put every code into a column of the value whose key wins."""
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    codes = torch.cat([codes, codes[:2]]).view(E4M3)
    k = torch.ones(2, 20, 1, 128).to(E4M3)
    k[:, 7] = 448.0
    v = torch.ones(2, 20, 1, 128).to(E4M3)
    v.view(torch.uint8)[:, 7, 0] = codes.view(2, 128).view(torch.uint8)
    one = torch.ones(1)
    for dtype in (BF16, F16, F32):
        q = torch.full((2, 1, 3, 128), 1.0, dtype=dtype)
        out = run(cuda, q, k, v, lengths(20, 20), k_scale=one, v_scale=one)
        assert torch.equal(out[:, 0], v[:, 7].to(dtype).expand(2, 3, 128))


def test_fp8_with_bf16_queries_beyond_the_range_of_fp16(cuda: Any) -> None:
    q, k, v = make(2, 1, 100, (4, 2), 64, BF16)
    options: dict[str, Any] = to_fp8(k, v)
    k, v = options.pop("k_cache"), options.pop("v_cache")
    for size in (2.0**30, 2.0**-30, 2.0**-120, 0.0):
        options["k_scale"] = options["k_scale"] / size if size else options["k_scale"]
        check(cuda, q * size, k, v, lengths(100, 33), **options)
        options["k_scale"] = options["k_scale"] * size if size else options["k_scale"]


@dtypes
def test_f22_lengths_and_blocks_that_do_not_exist(cuda: Any, dtype: torch.dtype) -> None:
    """Require what a kernel does where the host cannot look: a length counts as the nearest
    possible one, and keys of a block that does not exist are not seen."""
    q, k, v = make(3, 2, 96, (4, 2), 32, dtype)
    want = run(cuda, q, k, v, lengths(96, 0, 50))
    assert torch.equal(run(cuda, q, k, v, lengths(2**31 - 1, -7, 50)), want)
    paged_k, paged_v, table = page(k, v, 16)
    assert torch.equal(run(cuda, q, paged_k, paged_v, lengths(97, -(2**31), 50), table), want)
    for bad in (-1, paged_k.shape[0], 2**31 - 1):
        table[0, 2] = bad
        out = run(cuda, q, paged_k, paged_v, lengths(96, 0, 50), table, causal=False)
        keys = torch.cat([k[:1, :32], k[:1, 48:]], 1), torch.cat([v[:1, :32], v[:1, 48:]], 1)
        exact = reference.attention_with_kvcache(
            q[:1].double(), *(t.double() for t in keys), lengths(80), causal=False
        )
        assert (out[:1] - exact).abs().max() < (1e-5 if dtype == F32 else 2e-2)


@dtypes
def test_f41_alone_or_in_a_batch(cuda: Any, dtype: torch.dtype) -> None:
    for sq in (1, 9):
        q, k, v = make(5, sq, 600, (4, 2), 16, dtype)
        seqlens = lengths(3, 600, 0, 599, 300)
        whole = run(cuda, q, k, v, seqlens)
        for i in range(5):
            alone = run(cuda, q[i : i + 1], k[i : i + 1], v[i : i + 1], seqlens[i : i + 1])
            assert torch.equal(alone, whole[i : i + 1])
        more = torch.cat([k, k, k], 1), torch.cat([v, v, v], 1)  # a larger cache
        assert torch.equal(run(cuda, q, *more, seqlens), whole)


@pytest.mark.parametrize("key", [3, 100, 4159], ids=["first warp", "last warp", "last split"])
@pytest.mark.parametrize("splits", [1, 64])
def test_a_winning_score_copies_its_value(cuda: Any, splits: int, key: int) -> None:
    """Put one score 184 above the others in base 2: relative to another maximum it overflows."""
    q, k = torch.full((1, 1, 2, 64), 8.0).to(BF16), torch.full((1, 4160, 1, 64), -1.0).to(BF16)
    v = torch.randn(1, 4160, 1, 64).to(BF16)
    k[:, key] = 1.0
    out = run(cuda, q, k, v, lengths(4160), num_splits=splits)
    assert torch.equal(out, v[:, key : key + 1].expand_as(out))


@pytest.fixture
def h100(cuda: Any) -> Iterator[Any]:
    """Return the module, set to 132 multiprocessors."""
    cuda.module.set_multiprocessors(132)
    yield cuda.module
    cuda.module.set_multiprocessors(3)


def test_workspace_fits_the_splits_of_a_capacity(h100: Any) -> None:
    """Count splits for Llama 3.1 8B: up to eight of 128 keys, beyond that of 512, up to the 32 that
    fill the chip. At batch 32 x 4,096 keys this is a workspace of 4 MB and 2,048 blocks. One split
    per tile took 17 MB and 8,192."""
    q = torch.empty(1, 1, 32, 128, dtype=BF16)
    for dtype in (BF16, E4M3):
        pool = torch.empty(1, 1, 1, 128, dtype=dtype)
        splits = {
            capacity: h100.decode_attention_splits(q, pool.expand(1, capacity, 8, 128), None, 0)
            for capacity in (1, 255, 256, 512, 1024, 4096, 8192, 16384, 131072)
        }
        assert list(splits.values()) == [1, 1, 2, 4, 8, 8, 16, 32, 32]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("capacity", "num_splits", "splits"), [(120, 0, 1), (400, 0, 3), (1100, 0, 8), (700, 5, 5)]
)
def test_full_sequences_leave_no_block_idle(
    cuda: Any, h100: Any, dtype: torch.dtype, capacity: int, num_splits: int, splits: int
) -> None:
    q, k, v = make(2, 1, capacity, (4, 2), 64, dtype)
    before = h100.blocks()
    run(cuda, q, k, v, lengths(capacity, capacity), num_splits=num_splits)
    warps = 4 if dtype == F32 else 1  # a block of fp32 takes four rows
    parts = (2 * 4 if dtype == F32 else 2 * 2) // warps
    combined = 2 * 4 if splits > 1 else 0
    assert h100.blocks() - before == parts * splits + combined


def test_many_splits_of_a_long_sequence(cuda: Any) -> None:
    q, k, v = make(1, 1, 9000, (2, 1), 16, BF16)
    for seqlen in (9000, 2100, 500):
        check(cuda, q, k, v, lengths(seqlen))
