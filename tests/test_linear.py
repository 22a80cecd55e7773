"""linear, fp8_linear and fp8_gemm: every layout, granularity and instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from .tolerances import assert_close_to_eager

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
ROWS = (1, 2, 3, 5, 6, 7, 15, 16, 17, 31, 64, 255)


def integers(*shape: int) -> Tensor:
    """Small integers: exact in e4m3 and bf16, and so is every fp32 sum of their products."""
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize("m", ROWS)
def test_integers_are_exact(m: int, isa: str) -> None:
    x, w = integers(m, 190), integers(70, 190)
    exact = x @ w.t()
    one = torch.ones(1)
    for dtype in DTYPES:
        got = lf.linear(x.to(dtype), w.to(dtype))
        assert torch.equal(got, exact.to(dtype))
        assert torch.equal(lf.fp8_linear(x.to(dtype), w.to(FP8), one), exact.to(dtype))
    gemm = lf.fp8_gemm(x.to(FP8), w.to(FP8), one, one, out_dtype=torch.float32)
    assert torch.equal(gemm, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 17, 100])
def test_packed_is_plain_bit_for_bit(m: int, dtype: torch.dtype, isa: str) -> None:
    x, w = torch.randn(m, 1034).to(dtype), torch.randn(192, 1034).to(dtype)
    bias = torch.randn(192).to(dtype)
    assert torch.equal(lf.linear(x, w, bias), lf.linear(x, lf.pack_weight(w), bias))
    for granularity in ("tensor", "row", "block", "block_2d"):
        q, scale = lf.quantize_fp8(w, granularity)
        plain, packed = (lf.fp8_linear(x, t, scale, bias) for t in (q, lf.pack_weight(q)))
        assert torch.equal(plain, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row", "block", "block_2d"])
@pytest.mark.parametrize("shape", [(1, 130, 769), (3, 1, 1), (5, 127, 128), (33, 257, 515)])
def test_fp8_linear(
    shape: tuple[int, int, int], granularity: str, dtype: torch.dtype, isa: str
) -> None:
    m, n, k = shape
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    q, scale = lf.quantize_fp8(torch.randn(n, k), granularity)
    dense = reference.dequantize_fp8(q, scale, torch.float64)
    exact = x.double() @ dense.t() + bias.double()
    eager = (x.float() @ dense.float().t() + bias.float()).to(dtype)
    if dtype == torch.float32:
        # fp32 sums in another order: bounded by k roundings of the sum of magnitudes.
        bound = k * 2.0**-24 * (x.abs().double() @ dense.abs().t() + bias.abs().double())
        assert ((lf.fp8_linear(x, q, scale, bias).double() - exact).abs() <= bound + 1e-30).all()
    else:
        assert_close_to_eager(lf.fp8_linear(x, q, scale, bias), eager, exact)


@pytest.mark.parametrize("granularities", [("tensor", "tensor"), ("row", "row"), ("row", "tensor"),
                                           ("block", "block_2d"), ("block", "block")])  # fmt: skip
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_fp8_gemm(granularities: tuple[str, str], out_dtype: torch.dtype, isa: str) -> None:
    a, scale_a = lf.quantize_fp8(torch.randn(19, 515), granularities[0])
    b, scale_b = lf.quantize_fp8(torch.randn(131, 515), granularities[1])
    bias = torch.randn(131).to(out_dtype)
    dense = [
        reference.dequantize_fp8(*p, dtype=torch.float64) for p in ((a, scale_a), (b, scale_b))
    ]
    exact = dense[0] @ dense[1].t() + bias.double()
    got = lf.fp8_gemm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
    bound = 515 * 2.0**-24 * (dense[0].abs() @ dense[1].abs().t() + 4)
    bound = bound + exact.abs() * torch.finfo(out_dtype).eps
    assert ((got.double() - exact).abs() <= bound).all()


def test_quantised_activations_are_the_gemm_of_quantised_rows(isa: str) -> None:
    x = torch.randn(5, 256).bfloat16()
    for granularity, by in (("row", "row"), ("block_2d", "block")):
        w, scale = lf.quantize_fp8(torch.randn(128, 256), granularity)
        a, scale_a = lf.quantize_fp8(x, by, scale_ub=2.0)
        got = lf.fp8_linear(x, w, scale, quantize_activation=True, scale_ub=2.0)
        assert torch.equal(got, lf.fp8_gemm(a, w, scale_a, scale))


def test_f37_every_e4m3_code(isa: str) -> None:
    """Each of the 256 codes comes through the product with 1 unchanged, subnormals and NaN too."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    weight = torch.zeros(256, 64).to(FP8)
    weight[:, 5] = codes
    for dtype in DTYPES:
        for m in (1, 40):
            x = torch.zeros(m, 64, dtype=dtype)
            x[:, 5] = 1
            for w in (weight, lf.pack_weight(weight)):
                got = lf.fp8_linear(x, w, torch.ones(1))
                want = codes.to(dtype).expand(m, 256)
                assert ((got == want) | (got.isnan() & want.isnan())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f41_a_row_does_not_depend_on_the_batch(
    dtype: torch.dtype, isa: str, threads: None
) -> None:
    x, w = torch.randn(512, 640).to(dtype), torch.randn(192, 640).to(dtype)
    q, scale = lf.quantize_fp8(w)
    block, block_scale = lf.quantize_fp8(w, "block_2d")
    packed, packed_q = lf.pack_weight(w), lf.pack_weight(q)
    ops = (
        lambda x: lf.linear(x, w),
        lambda x: lf.linear(x, packed),
        lambda x: lf.fp8_linear(x, q, scale),
        lambda x: lf.fp8_linear(x, packed_q, scale),
        lambda x: lf.fp8_linear(x, block, block_scale),
        lambda x: lf.fp8_linear(x, q, scale, quantize_activation=True),
    )
    for op in ops:
        torch.set_num_threads(1)
        alone = op(x[:1])
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (2, 16, 255, 256, 512):
                assert torch.equal(op(x[:rows])[:1], alone)


def test_f31_strides(isa: str) -> None:
    x = torch.randn(9, 400).bfloat16()[::2, 7:207]
    w = torch.randn(80, 300).bfloat16()[:, 50:250]
    assert torch.equal(lf.linear(x, w), lf.linear(x.contiguous(), w.contiguous()))
    cube = torch.randn(3, 4, 200).bfloat16().transpose(0, 1)
    assert torch.equal(lf.linear(cube, w), lf.linear(cube.contiguous(), w))


@pytest.mark.parametrize("value", [1e3, 6e4])
def test_f48_large_fp16(value: float, isa: str) -> None:
    """Products of 6e4 squared pass fp16 by far on their way to a sum that fits it."""
    x = torch.full((1, 128), value, dtype=torch.float16)
    x[:, 64:] = -value
    w = torch.full((64, 128), 256.0, dtype=torch.float16)
    assert (lf.linear(x, w) == 0).all()


@pytest.mark.big
def test_f01_weight_past_2_to_31_elements() -> None:
    """Rows on either side of element 2^31 of an e4m3 weight."""
    n, k = 2**19 + 64, 4096
    weight = torch.zeros(n, k, dtype=torch.uint8).view(FP8)
    boundary = 2**31 // k
    chosen = (0, boundary - 1, boundary, boundary + 1, n - 1)
    x, rows = integers(2, k), integers(len(chosen), k)
    for i, row in enumerate(chosen):
        weight[row] = rows[i].to(FP8)
    out = lf.fp8_linear(x, weight, torch.ones(1))
    assert torch.equal(out[:, list(chosen)], x @ rows.t())
    assert out.count_nonzero() == (x @ rows.t()).count_nonzero()


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    extra=st.integers(0, 3),
)
def test_property(m: int, n: int, k: int, dtype: torch.dtype, extra: int) -> None:
    x, w = integers(m, k + extra)[:, :k].to(dtype), integers(n, k)
    exact = x.float() @ w.t()
    assert torch.equal(lf.linear(x, w.to(dtype)), exact.to(dtype))
    assert torch.equal(lf.fp8_linear(x, w.to(FP8), torch.full((n, 1), 0.5)), (exact / 2).to(dtype))
