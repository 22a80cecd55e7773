"""Tests of the attention kernels against fp64: values, memory, configurations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llama_fast as lf
from llama_fast.kernels import attention as kernel
from llama_fast.kernels import common

from ..support.tolerances import ulps
from .attention import (
    DTYPES,
    NAN,
    check,
    cu_seqlens,
    dtypes,
    framed,
    heads_first,
    launch,
    qkv,
    two_dtypes,
)
from .conftest import BACKEND, launcher

# ---- against fp64 ----

LENGTHS = [(n, n) for n in (1, 2, 5, 17, 97, 127, 129, 257)] + [(1, 239), (399, 3), (3, 399)]


@dtypes
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{n[0]}x{n[1]}")
def test_f09_lengths_that_no_block_divides(
    device: torch.device, dtype: torch.dtype, lengths: tuple[int, int]
) -> None:
    q, k, v = qkv(device, lengths, (1, 1), 32, dtype)
    for causal in (True, False):
        check(q, k, v, causal=causal)


@two_dtypes
@pytest.mark.parametrize("d", [8, 16, 40, 64, 72, 96, 128, 200, 256])
def test_head_dims(device: torch.device, dtype: torch.dtype, d: int) -> None:
    check(*qkv(device, (33, 70), (1, 1), d, dtype))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24])
def test_f15_f16_every_ratio_of_heads(device: torch.device, group: int) -> None:
    check(*qkv(device, (5, 9), (2 * group, 2), 16, torch.bfloat16, batch=2))


@pytest.mark.parametrize("scale", [1e-3, 0.3, 2.0])
def test_softmax_scale(device: torch.device, scale: float) -> None:
    check(*qkv(device, (20, 40), (2, 2), 64, torch.float32), softmax_scale=scale)


# ---- sums that are exact ----


@dtypes
def test_f37_equal_scores_give_the_exact_mean(device: torch.device, dtype: torch.dtype) -> None:
    """Sum small integers. The interpreter's dot multiplies the bit patterns of bf16, so the kernel
    must widen them there, and an exact sum shows whether it does."""
    q = torch.zeros(1, 7, 4, 24, dtype=dtype, device=device)
    v = torch.randint(-8, 9, (1, 256, 2, 24)).to(device, dtype)
    mean = v.double().mean(1, keepdim=True).repeat_interleave(2, 2).expand(1, 7, 4, 24)
    assert torch.equal(lf.attention(q, torch.randn_like(v), v, causal=False), mean.to(dtype))


@dtypes
@pytest.mark.parametrize("causal", [True, False])
def test_a_winning_score_copies_its_value(
    device: torch.device, dtype: torch.dtype, causal: bool
) -> None:
    n = 200
    k = 8.0 * torch.randint(0, 2, (1, n, 2, 64)).mul(2).sub(1).to(device, dtype)
    v = torch.randn(1, n, 2, 64).to(device, dtype)
    chosen = (torch.rand(n) * (torch.arange(n) + 1)).long() if causal else torch.randperm(n)
    out = lf.attention(k[:, chosen], k, v, causal=causal, softmax_scale=1.0)
    # On a GPU the FMA leaves the largest exponent at its product's rounding error instead of 0.
    # In 16 bits (p v) / p still rounds to v.
    assert ulps(out, v[:, chosen]) <= (4 if dtype == torch.float32 else 0)


def test_f39_fp32_products_are_not_tf32(device: torch.device) -> None:
    """Check values (compiled tf32 would be far off) and source (the interpreter has no tf32)."""
    check(*qkv(device, (60, 200), (2, 1), 128, torch.float32), softmax_scale=0.5)
    source = "".join(path.read_text() for path in Path(kernel.__file__).parent.glob("*.py"))
    dots = re.findall(r"tl\.dot\((.*)\)", source)
    assert dots and all('input_precision="ieee"' in dot for dot in dots)


# ---- memory ----


@two_dtypes
def test_f31_views_of_a_fused_projection(device: torch.device, dtype: torch.dtype) -> None:
    fused = torch.full((2, 40, 10 * 24), NAN, dtype=dtype, device=device)
    fused[..., : 8 * 24] = torch.randn(2, 40, 8 * 24).to(device, dtype)  # the rest must not be read
    q, k, v = (t.unflatten(-1, (-1, 24)) for t in fused.split([96, 48, 96], dim=-1))
    v = v[:, :, :2]
    expected = lf.attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(lf.attention(q, k, v), expected)
    assert torch.equal(lf.attention(heads_first(q), k, heads_first(v)), expected)
    assert torch.equal(lf.attention(q.contiguous(), heads_first(k), v), expected)
    shared = k[:1].expand(2, -1, -1, -1)  # a stride of zero
    assert torch.equal(lf.attention(q, shared, v), lf.attention(q, shared.contiguous(), v))


@two_dtypes
@pytest.mark.parametrize("d", [8, 24, 80])
def test_f29_touches_nothing_outside(device: torch.device, dtype: torch.dtype, d: int) -> None:
    """Frame every tensor in NaN. Rows start at addresses that no vector load is aligned to."""
    q, k, v = qkv(device, (37, 141), (2, 1), d, dtype, batch=2)
    out = framed(torch.zeros_like(q))
    launcher("attention").attention(out, framed(q), framed(k), framed(v), True, d**-0.5, None, None)
    assert torch.equal(out, lf.attention(q, k, v))
    assert out._base is not None and int((~out._base.isnan()).sum()) == out.numel()


def test_tma_descriptors(device: torch.device) -> None:
    t = torch.zeros(2, 70, 3, 64, dtype=torch.bfloat16, device=device)
    assert kernel._descriptor(t, 64, 64) is not None
    assert kernel._descriptor(t[:, 1:, :2], 64, 64) is not None
    assert kernel._descriptor(heads_first(t), 64, 64) is not None
    assert kernel._descriptor(t[..., 1:], 64, 64) is None  # address
    assert kernel._descriptor(framed(t), 64, 64) is None  # strides
    assert kernel._descriptor(t[:1].expand(2, -1, -1, -1), 64, 64) is None  # a stride of zero
    assert kernel._descriptor(t[:, :0], 64, 64) is None


def test_f02_f05_offsets_beyond_int32(device: torch.device) -> None:
    # The second sequence, and its ninth row, start past 2^31. Few pages are touched.
    tokens, stride = 19, 2**28 + 64
    q, k, v = (t[0] for t in qkv(device, (tokens, tokens), (2, 1), 16, torch.bfloat16))
    cu = cu_seqlens(device, [9, 10])
    expected = launch(q, k, v, True, cu, cu)
    pool = torch.empty(tokens * stride, dtype=torch.bfloat16, device=device)
    far_q = pool.as_strided((tokens, 2, 16), (stride, 16, 1)).copy_(q)
    far_k = pool.as_strided((tokens, 1, 16), (stride, 16, 1), 32).copy_(k)
    far_v = pool.as_strided((tokens, 1, 16), (stride, 16, 1), 48).copy_(v)
    far_out = pool.as_strided((tokens, 2, 16), (stride, 16, 1), 64).fill_(NAN)
    for options in ({}, {"tma": False}) if BACKEND == "triton" else ({},):
        launcher("attention").attention(far_out, far_q, far_k, far_v, True, 0.25, cu, cu, **options)
        assert torch.equal(far_out.clone(), expected)
        far_out.fill_(NAN)


@pytest.mark.gpu
@pytest.mark.big
def test_f05_a_packed_batch_past_2_31_elements() -> None:
    tokens, d = 262_145, 128
    cuda = torch.device("cuda")
    q = torch.zeros(tokens, 64, d, dtype=torch.bfloat16, device=cuda)  # rows of 8192 elements
    k = torch.zeros(tokens, 1, d, dtype=torch.bfloat16, device=cuda)
    q[-200:], k[-200:] = torch.randn(200, 64, d), torch.randn(200, 1, d)
    cu = cu_seqlens(cuda, [tokens - 200, 200])
    out = lf.attention(q, k, k, cu_seqlens_q=cu, cu_seqlens_k=cu)
    alone = lf.attention(q[None, -200:], k[None, -200:], k[None, -200:])
    assert torch.equal(out[None, -200:], alone)


# ---- configurations and schedules ----


def _offered(dtype: torch.dtype, d: int) -> list[common.Config]:
    """Return this chip's configurations, or in the interpreter those of every chip."""
    chips = list(common.CHIPS.values())
    if torch.cuda.is_available():
        chips = [common.chip_of(torch.zeros(1, device="cuda"))]
    name = str(dtype).removeprefix("torch.")
    return list(dict.fromkeys(c for chip in chips for c in kernel._configs(chip, name, d)))


CONFIGS = [
    pytest.param(dtype, d, config, id=f"{str(dtype)[6:]}-{d}-{config}".replace(" ", ","))
    for dtype in (torch.bfloat16, torch.float32)
    for d in (64, 96, 128, 256)
    for config in _offered(dtype, d)
]


@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "d", "config"), CONFIGS)
def test_f33_each_configuration_alone(
    device: torch.device, dtype: torch.dtype, d: int, config: common.Config
) -> None:
    lengths_q, lengths_k = [20, 0, 50], [140, 10, 30]
    q, k, v = (t[0] for t in qkv(device, (70, 180), (1, 1), d, dtype))
    cu_q, cu_k = cu_seqlens(device, lengths_q), cu_seqlens(device, lengths_k)
    with common.force("attention", config):
        packed = launch(q, k, v, True, cu_q, cu_k)  # into NaN: every row is written
        assert torch.equal(check(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k), packed)
        assert torch.equal(launch(q, k, v, True, cu_q, cu_k, tma=False), packed)
        check(q[None], k[None], v[None], causal=False)


@pytest.mark.triton
@pytest.mark.parametrize("per_section", [1, 2, 3, 100])
def test_every_section_covers_its_tiles(
    device: torch.device, per_section: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(device, (40, 50), (10, 5), 16, torch.bfloat16, batch=1)
    cu = cu_seqlens(device, [10, 30]), cu_seqlens(device, [20, 30])
    expected, packed = launch(q, k, v), launch(q[0], k[0], v[0], True, *cu)
    stream_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size()
    monkeypatch.setattr(kernel, "_L2_SHARE", per_section * stream_bytes)
    assert torch.equal(launch(q, k, v), expected)
    assert torch.equal(launch(q[0], k[0], v[0], True, *cu), packed)
    check(q, k, v)


# ---- the same row, the same result ----


@dtypes
def test_f41_a_row_does_not_depend_on_the_batch(device: torch.device, dtype: torch.dtype) -> None:
    n = 135  # more than one tile of queries
    q, k, v = qkv(device, (n, n), (2, 2), 32, dtype, batch=2)
    whole = launch(q, k, v)
    if BACKEND == "triton":  # in CUDA another kernel serves tensors that TMA cannot address
        assert torch.equal(launch(q, k, v, tma=False), whole)
    assert torch.equal(launch(q[1:2], k[1:2], v[1:2]), whole[1:2])
    one = [t[:1] for t in (q, k, v)]
    for i in (1, 31, 129):  # the last rows alone, as a chunk of a prefill
        assert torch.equal(launch(one[0][:, -i:], *one[1:]), whole[:1, -i:])
    for i in (1, 100):  # the first rows alone, as a shorter prompt
        assert torch.equal(launch(*(t[:, :i] for t in one)), whole[:1, :i])
    # A rank's heads under tensor parallelism.
    assert torch.equal(launch(*(t[:, :, 1:] for t in one)), whole[:1, :, 1:])
    cu = cu_seqlens(device, [n, n])
    packed = launch(*(t.flatten(0, 1) for t in (q, k, v)), True, cu, cu)
    assert torch.equal(packed.unflatten(0, (2, n)), whole)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    d=st.integers(1, 32).map(lambda n: 8 * n),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    total = sum(sq for sq, _ in lengths), sum(sk for _, sk in lengths)
    q, k, v = (t[0] for t in qkv(device, total, (kv_heads * group, kv_heads), d, dtype))
    cu_q, cu_k = (cu_seqlens(device, [pair[i] for pair in lengths]) for i in (0, 1))
    check(q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


# ---- what only hardware can show ----


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
def test_f42_repeats_give_the_same_bits(d: int) -> None:
    q, k, v = qkv(torch.device("cuda"), (1000, 1500), (8, 2), d, torch.bfloat16, batch=2)
    first = lf.attention(q, k, v)
    assert all(torch.equal(lf.attention(q, k, v), first) for _ in range(250))


@pytest.mark.gpu
def test_f20_a_captured_launch_follows_its_inputs() -> None:
    q, k, v = (t[0] for t in qkv(torch.device("cuda"), (200, 200), (4, 1), 128, torch.bfloat16))
    cu = cu_seqlens(q.device, [80, 120])
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    lf.attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lf.attention(q, k, v, **options)
    q.copy_(torch.randn_like(q))
    cu.copy_(cu_seqlens(q.device, [150, 50]))
    graph.replay()
    assert torch.equal(out, lf.attention(q, k, v, **options))


@pytest.mark.gpu
def test_f17_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = qkv(torch.device("cuda:1"), (100, 100), (4, 2), 128, torch.bfloat16)
    with torch.cuda.device(0):
        check(q, k, v)


@pytest.mark.gpu
def test_long_sequences(device: torch.device) -> None:
    q, k, v = qkv(device, (3000, 4100), (4, 1), 128, torch.bfloat16)
    check(q, k, v)
    check(q, k, v, causal=False)
