"""Tests of fp8_gemm against fp64: every granularity of scales, every e4m3 code, ragged shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import cpu, reference

from ..support.tolerances import assert_close_to_eager

FP8 = torch.float8_e4m3fn
OUT = (torch.bfloat16, torch.float16, torch.float32)
SCALES = ("tensor", "row", "block", "block_2d")


def integers(rows: int, cols: int) -> Tensor:
    return torch.randint(-4, 5, (rows, cols)).to(torch.float32).to(FP8)


def scale_shape(granularity: str, rows: int, cols: int) -> tuple[int, ...]:
    blocks = -(-cols // 128)
    return {
        "tensor": (1,),
        "row": (rows, 1),
        "block": (rows, blocks),
        "block_2d": (-(-rows // 128), blocks),
    }[granularity]


def powers_of_two(granularity: str, rows: int, cols: int) -> Tensor:
    """Return scales that keep integer sums exact in fp32."""
    return torch.exp2(torch.randint(-2, 3, scale_shape(granularity, rows, cols)).float())


def exact(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    left, right = (reference.dequantize_fp8(*p).double() for p in ((a, scale_a), (b, scale_b)))
    return left @ right.t()


@pytest.mark.parametrize("scale_b", SCALES)
@pytest.mark.parametrize("scale_a", SCALES[:3])
@pytest.mark.parametrize("m, n, k", [(1, 64, 128), (3, 1, 1), (7, 130, 769), (67, 257, 640)])
def test_integers_are_exact(m: int, n: int, k: int, scale_a: str, scale_b: str, isa: str) -> None:
    a, b = integers(m, k), integers(n, k)
    scales = powers_of_two(scale_a, m, k), powers_of_two(scale_b, n, k)
    bias = torch.randint(-9, 10, (n,)).float()
    out = lf.fp8_gemm(a, b, *scales, bias=bias, out_dtype=torch.float32)
    assert torch.equal(out.double(), exact(a, b, *scales) + bias.double())


@pytest.mark.parametrize("out_dtype", OUT, ids=str)
@pytest.mark.parametrize("granularity", SCALES)
def test_error_is_within_eagers_bound(granularity: str, out_dtype: torch.dtype, isa: str) -> None:
    x, w = torch.randn(19, 1000), torch.randn(200, 1000)
    a, scale_a = reference.quantize_fp8(x, "block" if granularity == "block_2d" else granularity)
    b, scale_b = reference.quantize_fp8(w, granularity)
    bias = torch.randn(200).to(out_dtype)
    ours = lf.fp8_gemm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
    eager = reference.fp8_gemm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
    assert_close_to_eager(ours, eager, exact(a, b, scale_a, scale_b) + bias.double())


@pytest.mark.parametrize("rows", [1, 16])
def test_every_code_on_either_side(rows: int, isa: str) -> None:
    """Multiply by an identity matrix: a code comes out as its value, also subnormals and NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    one = torch.ones(1)
    eye = torch.eye(256).to(FP8)
    finite = codes.float().nan_to_num(0.0).to(FP8)
    a = finite.expand(rows, 256).contiguous()
    assert torch.equal(
        lf.fp8_gemm(a, eye, one, one, out_dtype=torch.float32), finite.float().expand(rows, 256)
    )
    column = codes.view(256, 1).contiguous()
    single = torch.ones(rows, 1).to(FP8)
    out = lf.fp8_gemm(single, column, one, one, out_dtype=torch.float32)
    torch.testing.assert_close(out, codes.float().expand(rows, 256), rtol=0, atol=0, equal_nan=True)


def test_a_nan_stays_in_its_row_and_column(isa: str) -> None:
    a, b, one = integers(9, 70), integers(70, 70), torch.ones(1)
    clean = lf.fp8_gemm(a, b, one, one)
    a.view(torch.uint8)[4, 69], b.view(torch.uint8)[65, 0] = 0x7F, 0xFF
    out = lf.fp8_gemm(a, b, one, one)
    assert out[4].isnan().all() and out[:, 65].isnan().all()
    rows, cols = [i for i in range(9) if i != 4], [j for j in range(70) if j != 65]
    assert torch.equal(out[rows][:, cols], clean[rows][:, cols])


def test_f27_zero_rows(isa: str) -> None:
    x = torch.randn(5, 256)
    x[2] = 0.0
    a, scale_a = reference.quantize_fp8(x)
    b, scale_b = reference.quantize_fp8(torch.randn(64, 256))
    out = lf.fp8_gemm(a, b, scale_a, scale_b)
    assert out.isfinite().all() and (out[2] == 0).all()


@pytest.mark.parametrize("granularity", SCALES)
def test_f41_a_row_does_not_depend_on_the_batch(granularity: str, isa: str, threads: None) -> None:
    blockwise = granularity.startswith("block")
    a, scale_a = reference.quantize_fp8(torch.randn(514, 769), "block" if blockwise else "row")
    b, scale_b = reference.quantize_fp8(torch.randn(130, 769), granularity)
    torch.set_num_threads(1)
    some = (1, 253, 511, 513)  # on either side of the rows that share a pass over the weight
    alone = {i: lf.fp8_gemm(a[i : i + 1], b, scale_a[i : i + 1], scale_b)[0] for i in some}
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in (2, 16, 255, 256, 514):
            out = lf.fp8_gemm(a[:rows], b, scale_a[:rows], scale_b)
            assert all(torch.equal(out[i], alone[i]) for i in some if i < rows)


def test_f31_strides_and_canaries(isa: str) -> None:
    """Put rows inside wider tensors that are otherwise NaN, and the output between canaries."""
    wide = torch.full((40, 300), float("nan")).to(FP8)
    a, b = wide[:10, 7:136], wide[10:, 31:160]
    a.copy_(integers(10, 129))
    b.copy_(integers(30, 129))
    one = torch.ones(1)
    canary = torch.full((12, 30), 7.0, dtype=torch.bfloat16)
    cpu.linear(canary[1:11], a, b, None, one, one)
    assert (canary[0] == 7).all() and (canary[11] == 7).all()
    assert torch.equal(canary[1:11], exact(a, b, one, one).bfloat16())


def test_f11_zero_rows_then_a_normal_call(isa: str) -> None:
    b, one = integers(64, 32), torch.ones(1)
    assert lf.fp8_gemm(integers(0, 32), b, one, one).shape == (0, 64)
    assert lf.fp8_gemm(integers(3, 32), b[:0], one, one).shape == (3, 0)
    a = integers(3, 32)
    assert torch.equal(lf.fp8_gemm(a, b, one, one), exact(a, b, one, one).bfloat16())


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 400),
    scale_a=st.sampled_from(SCALES[:3]),
    scale_b=st.sampled_from(SCALES),
    gap=st.integers(0, 5),
    out_dtype=st.sampled_from(OUT),
)
def test_any_shape_stride_and_scale(
    m: int, n: int, k: int, scale_a: str, scale_b: str, gap: int, out_dtype: torch.dtype
) -> None:
    a, b = integers(m, k + gap)[:, gap:], integers(n, k + 2 * gap)[:, gap : gap + k]
    scales = powers_of_two(scale_a, m, k), powers_of_two(scale_b, n, k)
    out = lf.fp8_gemm(a, b, *scales, out_dtype=out_dtype)
    assert torch.equal(out, exact(a, b, *scales).to(out_dtype))
