"""Tests of quantize_fp8: it must have the eager twin's bits on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import cpu, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRANULARITIES = ("tensor", "row", "block", "block_2d")
FP8 = torch.float8_e4m3fn


def assert_same(x: Tensor, granularity: str, scale_ub: float | None = None) -> None:
    q, scale = lf.quantize_fp8(x, granularity, scale_ub=scale_ub)
    want_q, want_scale = reference.quantize_fp8(x, granularity, scale_ub=scale_ub)
    assert torch.equal(scale, want_scale) or scale.isnan().equal(want_scale.isnan())
    same = (q.view(torch.uint8) == want_q.view(torch.uint8)) | (
        q.float().isnan() & want_q.float().isnan()
    )
    assert same.all(), f"{(~same).sum()} codes differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 127), (3, 128), (130, 129), (257, 769)], ids=str)
def test_bitwise(shape: tuple[int, int], granularity: str, dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(shape).mul(3).to(dtype)
    assert_same(x, granularity)
    assert_same(x, granularity, scale_ub=1.0)


def test_a_tensors_largest_element_may_be_anywhere(isa: str, threads: None) -> None:
    """Put the largest into first and last rows of parts: rows are divided into 64 parts of 32."""
    x = torch.randn(2048, 512)
    for count in (1, 2):
        torch.set_num_threads(count)
        for row, column in ((0, 0), (31, 511), (32, 7), (1000, 300), (2016, 1), (2047, 511)):
            before, x[row, column] = x[row, column].item(), -100.0
            assert lf.quantize_fp8(x, "tensor")[1].item() == torch.tensor(100.0).div(448).item()
            x[row, column] = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_f37_every_16_bit_value(dtype: torch.dtype, isa: str) -> None:
    """Cast all values that fit e4m3 with a scale of exactly 1."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.abs() <= 448]
    x = torch.cat((x, torch.full((1,), 448.0, dtype=dtype)))[None]
    q, scale = lf.quantize_fp8(x)
    assert scale.item() == 1.0
    assert torch.equal(q.view(torch.uint8), x.to(FP8).view(torch.uint8))


def test_f38_ties_round_to_even(isa: str) -> None:
    """Check ties between neighbors: normals, the first normal, subnormals, half of the smallest (to
    zero) and one and a half times it."""
    ties = {
        17.0: 16.0, 19.0: 20.0, 21.0: 20.0, 23.0: 24.0, 1.0625: 1.0, 1.1875: 1.25,
        432.0: 448.0, 2.0**-6 * 1.0625: 2.0**-6, 7.5 * 2.0**-9: 8 * 2.0**-9,
        0.5 * 2.0**-9: 0.0, 1.5 * 2.0**-9: 2 * 2.0**-9, 2.5 * 2.0**-9: 2 * 2.0**-9,
    }  # fmt: skip
    x = torch.tensor([[*ties, *(-t for t in ties), 448.0]])
    q, scale = lf.quantize_fp8(x)
    assert scale.item() == 1.0
    want = torch.tensor([*ties.values(), *(-t for t in ties.values()), 448.0])
    assert torch.equal(q.float()[0], want)


def test_f38_quotients_about_every_tie(isa: str) -> None:
    """Quantize x where x / scale is a tie between two codes, or one step of fp32 beside it, for any
    mantissa of scale, also beside powers of two: one bit of the quotient decides."""
    near_powers = 1 + torch.arange(-4, 5) * 2.0**-23
    scale = torch.cat((torch.rand(400) + 1, near_powers))[:, None] * 2.0**-4
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    ties = (codes[1:] + codes[:-1]) / 2
    x = scale * torch.cat((ties, -ties))
    up, down = (torch.nextafter(x, torch.full_like(x, end)) for end in (1e9, -1e9))
    assert_same(torch.cat((x, up, down, scale * 448), dim=1), "row")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_f27_zero_and_tiny_rows(granularity: str, isa: str) -> None:
    x = torch.randn(6, 256)
    x[2] = 0
    x[4] = 1e-30
    for rows in (x, x[2:3], torch.zeros(130, 256), x[4:5].bfloat16()):
        q, scale = lf.quantize_fp8(rows, granularity)
        assert scale.isfinite().all() and (scale > 0).all() and not q.float().isnan().any()
        assert_same(rows, granularity)
    q, _ = lf.quantize_fp8(x, "row")
    assert (q[2].float() == 0).all() and (q[4].float() == 448).all()


@pytest.fixture
def flush_to_zero() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode")
    yield
    torch.set_flush_denormal(False)


def check_zeros(granularity: str) -> None:
    x = torch.cat((torch.zeros(130, 256), torch.full((2, 256), 1e-37), torch.ones(1, 256)))
    for rows in (x, x[:130], x[130:132], x[:130].bfloat16()):
        q, scale = lf.quantize_fp8(rows, granularity)
        assert (scale >= torch.finfo(torch.float32).tiny).all()
        assert not q.float().isnan().any() and not q[(rows == 0).all(1)].float().any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_f27_zeros_under_flush_to_zero(granularity: str, flush_to_zero: None, isa: str) -> None:
    """Another library may set it. A subnormal scale would then be read as 0, and 0 / 0 is NaN."""
    check_zeros(granularity)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_f27_zeros_of_others_under_flush_to_zero(
    granularity: str, backend: str, flush_to_zero: None
) -> None:
    with lf.use_backend(backend, "quantize_fp8"):
        check_zeros(granularity)


@pytest.mark.parametrize("fused", ["rms_norm_fp8", "silu_and_mul_fp8"])
def test_f27_fused_zeros_under_flush_to_zero(fused: str, flush_to_zero: None, isa: str) -> None:
    x = torch.zeros(3, 256)
    out = lf.rms_norm_fp8(x, torch.ones(256)) if "norm" in fused else lf.silu_and_mul_fp8(x)
    assert (out[1] >= torch.finfo(torch.float32).tiny).all() and not out[0].float().any()


@pytest.mark.parametrize("scale_ub", [5e-324, 1e-40, 1e-36, 2, 3.4e38], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bounds_at_the_ends_of_the_range(granularity: str, scale_ub: float, isa: str) -> None:
    """Below the smallest amax they act as that; above every amax they change only infinite ones."""
    x = torch.randn(4, 300)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    assert_same(x, granularity, scale_ub)


@pytest.mark.parametrize("value", [448, 449, 464, 465, 480, 1200, 1201, float("inf")])
@pytest.mark.parametrize("scale_ub", [None, 448.0, 1200.0])
def test_f28_the_cast_is_clamped(value: float, scale_ub: float | None, isa: str) -> None:
    """Clamp before the cast: e4m3 has no infinity, and 465 and more would become NaN."""
    x = torch.tensor([[value, -value, 1.0, 0.0]])
    assert_same(x, "row", scale_ub)
    if scale_ub is not None or value != float("inf"):
        q, _ = lf.quantize_fp8(x, scale_ub=scale_ub)
        assert q[0, :2].float().tolist() == [448.0, -448.0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_is_never_a_number(granularity: str, isa: str) -> None:
    x = torch.randn(3, 300)
    x[1, 200] = float("nan")
    q, _ = lf.quantize_fp8(x, granularity)
    assert q[1, 200].float().isnan()
    assert_same(x, granularity)


def test_f31_strides_and_canaries(isa: str) -> None:
    x = torch.randn(80, 400)[:5, 3:303]  # leave room to see work past the last row
    canary = torch.full((80, 300), 7.0).to(FP8)
    scale = torch.empty(80, 1)[:5]
    cpu.quantize(canary[1:6], scale, x, "row", None)
    assert (canary[0].float() == 7).all() and (canary[6:].float() == 7).all()
    want, _ = reference.quantize_fp8(x)
    assert torch.equal(canary[1:6].view(torch.uint8), want.view(torch.uint8))


@pytest.mark.big
def test_f06_more_than_2_to_31_elements() -> None:
    """Quantize 1,900,000 x 1152, which is past 2^31. One row stands for all but the last few."""
    rows, cols = 1_900_000, 1152
    x = torch.randn(1, cols).bfloat16().expand(rows, cols)
    q, scale = lf.quantize_fp8(x)
    want, want_scale = reference.quantize_fp8(x[:1])
    for row in (0, 2**31 // cols - 1, 2**31 // cols, 2**31 // cols + 1, rows - 1):
        assert torch.equal(q[row].view(torch.uint8), want[0].view(torch.uint8)), row
        assert torch.equal(scale[row], want_scale[0])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 140),
    cols=st.integers(1, 300),
    granularity=st.sampled_from(GRANULARITIES),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.floats(-20, 8),
)
def test_property(
    rows: int, cols: int, granularity: str, dtype: torch.dtype, magnitude: float
) -> None:
    assert_same((torch.randn(rows, cols) * 2.0**magnitude).to(dtype), granularity)
