"""Tests of linear, fp8_linear and pack_weight: packed weights and any batch give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import cpu, reference

from ..support.tolerances import assert_close_to_eager

FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (0, 1, 2, 3, 5, 6, 7, 15, 16, 17, 31, 64, 255)
ONE = torch.ones(1)


def integers(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-4, 5, (rows, cols)).float().to(dtype)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().t()


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_integers_are_exact(rows: int, dtype: torch.dtype, isa: str) -> None:
    """Cover 16-bit and FP8 weights, plain and packed, with more columns than one decoded block."""
    x, bias = integers(rows, 1100, dtype), torch.randint(-9, 10, (192,)).to(dtype)
    weight = integers(192, 1100, dtype)
    want = (exact(x, weight) + bias.double()).to(dtype)
    for w in (weight, lf.pack_weight(weight)):
        assert torch.equal(lf.linear(x, w, bias), want)
    for w in (weight.to(FP8), lf.pack_weight(weight.to(FP8))):
        assert torch.equal(lf.fp8_linear(x, w, ONE, bias), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (1, 769), (65, 2), (63, 33), (127, 770), (130, 769)])
def test_f29_any_shape_of_a_plain_weight(n: int, k: int, dtype: torch.dtype, isa: str) -> None:
    weight = integers(n, k, dtype)
    for rows in (1, 2, 7, 17):
        x = integers(rows, k, dtype)
        assert torch.equal(lf.linear(x, weight), exact(x, weight).to(dtype))
        assert torch.equal(lf.fp8_linear(x, weight.to(FP8), ONE), exact(x, weight).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_error_is_within_eagers_bound(rows: int, dtype: torch.dtype, isa: str) -> None:
    x, weight = torch.randn(rows, 2048).to(dtype), (torch.randn(128, 2048) * 0.05).to(dtype)
    bias = torch.randn(128).to(dtype)
    want = exact(x, weight) + bias.double()
    assert_close_to_eager(lf.linear(x, weight, bias), F.linear(x, weight, bias), want)
    for granularity in ("tensor", "row", "block_2d"):
        q, scale = reference.quantize_fp8(weight, granularity)
        want = x.double() @ reference.dequantize_fp8(q, scale).double().t() + bias.double()
        eager = reference.fp8_linear(x, q, scale, bias)
        assert_close_to_eager(lf.fp8_linear(x, q, scale, bias), eager, want)
        eager = reference.fp8_linear(x, q, scale, bias, quantize_activation=True)
        ours = lf.fp8_linear(x, lf.pack_weight(q), scale, bias, quantize_activation=True)
        x8 = reference.quantize_fp8(x, "block" if granularity == "block_2d" else "row")
        want = exact(*(reference.dequantize_fp8(*t).double() for t in (x8, (q, scale))))
        assert_close_to_eager(ours, eager, want + bias.double())


@pytest.mark.parametrize("granularity", ["row", "block_2d"])
def test_scale_ub_bounds_what_is_quantized(granularity: str, isa: str) -> None:
    x, (q, scale) = 10 * torch.randn(5, 256), reference.quantize_fp8(torch.randn(128, 256), "row")
    if granularity == "block_2d":
        q, scale = reference.quantize_fp8(torch.randn(128, 256), granularity)
    bound: dict[str, Any] = {"quantize_activation": True, "scale_ub": 2.0}
    eager = reference.fp8_linear(x, q, scale, **bound)
    weight = reference.dequantize_fp8(q, scale).double()
    x8 = reference.quantize_fp8(x, "row" if granularity == "row" else "block", scale_ub=2.0)
    want = reference.dequantize_fp8(*x8).double() @ weight.t()
    assert_close_to_eager(lf.fp8_linear(x, q, scale, **bound), eager, want)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_of_the_weight(dtype: torch.dtype, rows: int, isa: str) -> None:
    """Multiply one column: each output is one weight. Subnormals (2^-9 and up) and NaN survive."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).view(256, 1)
    out = lf.fp8_linear(torch.ones(rows, 1, dtype=dtype), codes, ONE)
    want = codes.float().view(1, 256).expand(rows, 256).to(dtype)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f41_a_row_does_not_depend_on_the_batch(
    dtype: torch.dtype, fp8: bool, isa: str, threads: None
) -> None:
    """Require that a row depends on neither batch, threads nor the weight's layout: every row of
    batches on either side of a tile's rows, of a pass's and of 512, with an odd number of columns
    and a panel that is not full."""
    x, weight = torch.randn(513, 390).to(dtype), torch.randn(130, 390).to(dtype)
    op: Callable[[Tensor, Tensor], Tensor] = lf.linear
    scale = ONE
    if fp8:
        weight, scale = reference.quantize_fp8(weight, "tensor")

        def op(x: Tensor, w: Tensor) -> Tensor:
            return lf.fp8_linear(x, w, scale)

    for k in (390, 389):
        w, a = weight[:, :k], x[:, :k]
        torch.set_num_threads(1)
        alone = torch.cat([op(a[i : i + 1], w) for i in range(513)])
        for count, batches in (
            (1, (*range(2, 19), 131, 132, 133, 511, 512, 513)),
            (2, (2, 18, 255, 513)),
        ):
            torch.set_num_threads(count)
            for rows in batches:
                assert torch.equal(op(a[:rows], w), alone[:rows])
                if k % 2 == 0:
                    packed = lf.pack_weight(w[:128])
                    assert torch.equal(op(a[:rows], packed), alone[:rows, :128])


def test_f41_block_scales(isa: str) -> None:
    x = torch.randn(64, 1030).bfloat16()
    q, scale = reference.quantize_fp8(torch.randn(128, 1030), "block_2d")
    alone = lf.fp8_linear(x[1:2], q, scale)
    for w in (q, lf.pack_weight(q)):
        for rows in (1, 2, 7, 63):
            assert torch.equal(lf.fp8_linear(x[1 : rows + 1], w, scale)[:1], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f31_strides_and_canaries(dtype: torch.dtype, isa: str) -> None:
    """Put rows inside wider tensors that are otherwise NaN, and the output between canaries."""
    for rows in (1, 3, 20):
        wide = torch.full((rows + 70, 300), float("nan"), dtype=dtype)
        x, weight = wide[:rows, 3:132], wide[rows:, 5:134]
        x.copy_(integers(rows, 129, dtype))
        weight.copy_(integers(70, 129, dtype))
        canary = torch.full((rows + 2, 70), 7.0, dtype=dtype)
        cpu.linear(canary[1:-1], x, weight, None, None, None)
        assert (canary[0] == 7).all() and (canary[-1] == 7).all()
        assert torch.equal(canary[1:-1], exact(x, weight).to(dtype))
        cube = x.unsqueeze(0).expand(2, rows, 129)
        assert torch.equal(lf.linear(cube, weight)[1], canary[1:-1])


@pytest.mark.parametrize("value", [1e3, 1e4, 6e4])
def test_f48_large_fp16(value: float, isa: str) -> None:
    """Let partial sums pass fp16's 65504 by far. Only the result has to fit."""
    x = torch.full((2, 512), value, dtype=torch.float16)
    weight = torch.ones(64, 512)
    weight[:, 256:] = -1.0
    weight[:, 0] = 0.0
    for ours in (lf.linear(x, weight.half()), lf.fp8_linear(x, weight.to(FP8), ONE)):
        assert torch.equal(ours, torch.full((2, 64), -value, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_codes_anywhere_in_a_weight(dtype: torch.dtype, isa: str, one_thread: None) -> None:
    """Put NaN into first, last and tail features and columns. Other features keep their bits."""
    x, weight = torch.randn(40, 389).to(dtype), integers(130, 389, torch.float32).to(FP8)
    for w in (weight, weight[:128, :388]):
        n, k = w.shape
        for rows in (1, 3, 6, 40):
            a = x[:rows, :k]
            clean = lf.fp8_linear(a, w, ONE)
            for feature, column, code in (
                (0, 0, 0x7F),
                (1, k - 1, 0xFF),
                (14, 127, 0xFF),
                (63, 1, 0x7F),
                (64, 128, 0xFF),
                (n - 1, k - 1, 0x7F),
                (n - 1, 0, 0xFF),
            ):
                bad = w.clone()
                bad.view(torch.uint8)[feature, column] = code
                for b in (bad, lf.pack_weight(bad)) if n == 128 else (bad,):
                    out = lf.fp8_linear(a, b, ONE)
                    assert out[:, feature].isnan().all()
                    out[:, feature] = clean[:, feature]
                    assert torch.equal(out, clean)


@pytest.mark.parametrize("value", [1e-39, 1e-30, 1.0, 300.0, 1e32])
def test_x_of_any_size(value: float, isa: str, one_thread: None) -> None:
    """Cover fp32's range with denormals against e4m3's smallest and largest weights. One row has
    large and small values, and rows that share a tile with Inf must not change."""
    codes = torch.randint(0, 127, (128, 300), dtype=torch.uint8)
    codes[:, ::2] %= 8  # subnormal
    codes[:, 7] = 0
    weight = (codes | torch.randint(0, 2, codes.shape, dtype=torch.uint8) << 7).view(FP8)
    x = torch.randn(20, 300) * value
    x[3, 7], x[4] = 3e38, float("inf")
    want = exact(x, weight.float())
    for w in (weight, lf.pack_weight(weight)):
        for rows in (1, 3, 4, 20):
            out = lf.fp8_linear(x[:rows], w, ONE)
            finite = [i for i in range(rows) if i != 4]
            bound = x[finite].abs().double() @ weight.double().abs().t() * 2.0**-21 + 1e-44
            assert ((out[finite].double() - want[finite]).abs() <= bound).all()
            assert not out[4:5].isfinite().any()
            assert torch.equal(out[:1], lf.fp8_linear(x[:1], weight, ONE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flushed_denormals_change_nothing(dtype: torch.dtype, isa: str, one_thread: None) -> None:
    """Flush denormals to zero, as another library may have set the CPU to do."""
    codes = torch.arange(128 * 300).view(128, 300) % 8 + torch.arange(300) % 2 * 128
    weight = codes.to(torch.uint8).view(FP8)
    x = torch.randn(40, 300).to(dtype)
    if dtype == torch.float32:
        x[::2] *= 1e-38
    for w in (weight, lf.pack_weight(weight)):
        for rows in (1, 4, 40):
            kept = lf.fp8_linear(x[:rows], w, ONE)
            torch.set_flush_denormal(True)
            try:
                flushed = lf.fp8_linear(x[:rows], w, ONE)
            finally:
                torch.set_flush_denormal(False)
            assert kept.count_nonzero() > 0.9 * kept.numel()
            assert torch.equal(bits(flushed), bits(kept))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(bad: float, isa: str) -> None:
    x, weight = torch.randn(9, 200).bfloat16(), torch.randn(64, 200).bfloat16()
    clean = lf.linear(x, weight)
    x[4, 199] = bad
    out = lf.linear(x, weight)
    kept = [i for i in range(9) if i != 4]
    assert not out[4].isfinite().any() and torch.equal(out[kept], clean[kept])


def test_f11_zero_rows_then_a_normal_call(isa: str) -> None:
    weight = integers(64, 32, torch.bfloat16)
    for w in (weight, lf.pack_weight(weight)):
        assert lf.linear(torch.empty(2, 0, 32).bfloat16(), w).shape == (2, 0, 64)
        x = integers(3, 32, torch.bfloat16)
        assert torch.equal(lf.linear(x, w), exact(x, weight).bfloat16())


@pytest.mark.parametrize("dtype", (FP8, *DTYPES), ids=str)
@pytest.mark.parametrize("k", [2, 62, 64, 130, 770])
def test_pack_weight_moves_bits(k: int, dtype: torch.dtype, isa: str) -> None:
    weight = torch.randn(192, k + 6).to(dtype)[:, 3 : 3 + k]
    packed = lf.pack_weight(weight)
    assert torch.equal(bits(packed), bits(reference.pack_weight(weight)))
    assert torch.equal(bits(reference.unpack_weight(packed)), bits(weight.contiguous()))


@pytest.mark.big
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_f01_weight_past_2_to_31_elements(packed: bool) -> None:
    """Use features on either side of element 2^31, each with its own value."""
    k = 8192
    n = 2**31 // k + 128
    weight = torch.zeros((n // 64, k // 2, 64, 2) if packed else (n, k), dtype=FP8)
    x = torch.ones(1, k, dtype=torch.bfloat16)
    for i, feature in enumerate((0, n - 129, n - 128, n - 1)):
        row = weight[feature // 64, :, feature % 64, :] if packed else weight[feature]
        row.fill_(2.0**i)
    out = lf.fp8_linear(x, weight, ONE)[0]
    assert out[[0, n - 129, n - 128, n - 1]].tolist() == [k * 2.0**i for i in range(4)]
    assert out.count_nonzero() == 4


def test_f02_row_stride_past_2_to_31(isa: str) -> None:
    """Put two rows 2^31 + 64 elements apart. Untouched pages cost nothing."""
    stride = 2**31 + 64
    memory = torch.empty(stride + 64, dtype=torch.bfloat16)
    rows = memory.as_strided((2, 64), (stride, 1))
    rows.copy_(integers(2, 64, torch.bfloat16))
    other = integers(3, 64, torch.bfloat16)
    assert torch.equal(lf.linear(rows, other), exact(rows, other).bfloat16())
    assert torch.equal(lf.linear(other, rows), exact(other, rows).bfloat16())


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 200),
    k=st.integers(1, 700),
    gap=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    fp8=st.booleans(),
    packed=st.booleans(),
)
def test_any_shape_stride_and_dtype(
    m: int, n: int, k: int, gap: int, dtype: torch.dtype, fp8: bool, packed: bool
) -> None:
    if packed:
        n, k = -(-n // 64) * 64, k + k % 2
    x, weight = integers(m, k + gap, dtype)[:, gap:], integers(n, k + gap, dtype)[:, :k]
    want = exact(x, weight).to(dtype)
    w = weight.to(FP8) if fp8 else weight
    w = lf.pack_weight(w) if packed else w
    assert torch.equal(lf.fp8_linear(x, w, ONE) if fp8 else lf.linear(x, w), want)
