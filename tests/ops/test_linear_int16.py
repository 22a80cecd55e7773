"""Tests of fp8_linear by integer products: when it makes them, their error, and what is exact."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, cpu, reference

pytestmark = pytest.mark.skipif("avx2" not in _cpu.isas(), reason="int16 products are AVX2's")
FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ONE = torch.ones(1)
ROWS = cpu.INT16_ROWS


@pytest.fixture(autouse=True)
def on_avx2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "int16", True)
    before = _cpu.isa()
    _cpu.set_isa("avx2")
    yield
    _cpu.set_isa(before)


def error_bound(x: Tensor, weight: Tensor, scale: Tensor = ONE) -> Tensor:
    """Return the most that rounding can add: in each 64 columns half a step of x, its largest /
    4369 / 2, times the weight, and half a step of the weight, at most its largest / 2^12 / 2, times
    x; both at once once more. fp32 sums of up to 64 chunks and their scales add 2^-17."""
    x, weight = x.double(), reference.dequantize_fp8(weight, scale).double()
    bound = 0.0
    for a, b in zip(x.split(64, -1), weight.split(64, -1), strict=True):
        step_a = (a.abs().amax(-1, keepdim=True) / 8738).expand_as(a)
        step_b = (b.abs().amax(-1, keepdim=True) / 8192).expand_as(b)
        bound += step_a @ b.abs().t() + (a.abs() + step_a) @ step_b.t()
        bound += a.abs() @ b.abs().t() * 2.0**-17
    return torch.as_tensor(bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row", "block_2d"])
@pytest.mark.parametrize("n, k", [(1, 1), (130, 389), (192, 1030)])
def test_error(n: int, k: int, granularity: str, dtype: torch.dtype) -> None:
    x, bias = torch.randn(40, k).to(dtype), torch.randn(n).to(dtype)
    q, scale = reference.quantize_fp8(
        torch.randn(n, k) * torch.logspace(-2, 2, n)[:, None], granularity
    )
    want = x.double() @ reference.dequantize_fp8(q, scale).double().t() + bias.double()
    out = lf.fp8_linear(x, q, scale, bias)
    bound = error_bound(x, q, scale) + want.abs() * torch.finfo(dtype).eps
    assert ((out.double() - want).abs() <= bound).all()
    if k > 1:
        assert not torch.equal(out, lf.fp8_linear(x, q, scale, bias, quantize_activation=False))


def test_relative_error_is_far_below_the_weights_own() -> None:
    """Normal values: the largest of 64 is 2.4 sigma, so x is off by 2.4 / 4369 / sqrt(12) = 1.6e-4
    of its norm, the weight by at most as much, together by at most 2.3e-4; e4m3 by 2.6e-2."""
    x, weight = torch.randn(64, 4096), torch.randn(256, 4096)
    q, scale = reference.quantize_fp8(weight, "row")
    exact = x.double() @ reference.dequantize_fp8(q, scale).double().t()
    own = (exact - x.double() @ weight.double().t()).norm() / exact.norm()
    rounded = (lf.fp8_linear(x, q, scale).double() - exact).norm() / exact.norm()
    assert own > 0.02 and rounded < own / 100


def test_integers_are_exact() -> None:
    """Take x whose largest is 4369, so that its scale is 1, and weights of four exponents: nothing
    is rounded."""
    x = torch.randint(-256, 257, (ROWS, 200)).float()
    x[:, ::64], x[:, 63::64] = 4369.0, -4369.0
    weight = torch.randint(-15, 16, (192, 200)).float().to(FP8)
    want = (x.double() @ weight.double().t()).float()
    for w in (weight, lf.pack_weight(weight)):
        assert torch.equal(lf.fp8_linear(x, w, ONE), want)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_every_code_of_the_weight(packed: bool) -> None:
    """Put each code beside a largest weight of each exponent: what is rounded, and to what."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 127) != 127]
    largest = torch.arange(0, 127, dtype=torch.uint8)
    weight = torch.zeros(128, 64 * 256, dtype=torch.uint8)
    weight[:127, ::64] = largest[:, None]
    weight[:127, 1 : 64 * len(finite) : 64] = finite[None, :]
    x = torch.zeros(ROWS, 64 * 256)
    for i in range(ROWS):  # a row meets one code at a time
        x[i, 1 + 64 * (i * 8 % len(finite))] = 1.0
    w = weight.view(FP8)
    out = lf.fp8_linear(x, lf.pack_weight(w) if packed else w, ONE).double()
    want = x.double() @ w.double().t()
    block = w.double().view(128, 256, 64).abs().amax(-1)
    for i in range(ROWS):
        step = torch.exp2(
            torch.floor(torch.log2(block[:, i * 8 % len(finite)].clamp(min=2.0**-6))) - 12
        )
        assert ((out[i] - want[i]).abs() <= step / 2 + want[i].abs() * 2.0**-22).all()
        steps = out[i] / step
        assert ((steps - steps.round()).abs() < 1e-3 * steps.abs().clamp(min=1)).all()


@pytest.mark.parametrize("bad", [0x7F, 0xFF])
def test_nan_codes(bad: int) -> None:
    x = torch.randn(ROWS, 200)
    x[3, 64:128] = 0.0
    q, scale = reference.quantize_fp8(torch.randn(128, 200), "row")
    clean = lf.fp8_linear(x, q, scale)
    for feature, column in ((0, 0), (17, 65), (64, 199), (127, 130)):
        codes = q.view(torch.uint8).clone()
        codes[feature, column] = bad
        for w in (codes.view(FP8), lf.pack_weight(codes.view(FP8))):
            out = lf.fp8_linear(x, w, scale)
            assert out[:, feature].isnan().all()
            out[:, feature] = clean[:, feature]
            assert torch.equal(out, clean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38, 1e-39])
def test_rows_that_do_not_fit_are_exact(bad: float) -> None:
    """A row with NaN, Inf or 64 values out of range has the bits of the exact product; the others
    do not change."""
    x = torch.randn(600, 200)
    q, scale = reference.quantize_fp8(torch.randn(128, 200), "row")
    clean = lf.fp8_linear(x, q, scale)
    rows = [0, 1, 5, 511, 512, 599]
    x[rows, 64:128] = 0.0
    x[rows, 100] = bad
    exact = lf.fp8_linear(x, q, scale, quantize_activation=False)
    out = lf.fp8_linear(x, lf.pack_weight(q), scale)
    torch.testing.assert_close(out[rows], exact[rows], rtol=0, atol=0, equal_nan=True)
    if not abs(bad) < 1:
        assert not out[rows].isfinite().all()
    kept = [i for i in range(600) if i not in rows]
    assert torch.equal(out[kept], clean[kept]) and not torch.equal(clean[kept], exact[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f41_a_row_does_not_depend_on_the_batch(dtype: torch.dtype, threads: None) -> None:
    """Nor on the threads or the weight's layout, from INT16_ROWS on; fewer rows are exact."""
    x = torch.randn(1030, 390).to(dtype)
    q, scale = reference.quantize_fp8(torch.randn(130, 390), "row")
    for k in (390, 389):
        w, a = q[:, :k], x[:, :k]
        torch.set_num_threads(1)
        want = torch.cat([lf.fp8_linear(a[i : i + ROWS], w, scale)[:1] for i in range(1030 - ROWS)])
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (ROWS, ROWS + 1, 66, 131, 513, 998):
                assert torch.equal(lf.fp8_linear(a[:rows], w, scale), want[:rows])
                if k % 2 == 0:
                    packed = lf.pack_weight(w[:128])
                    assert torch.equal(
                        lf.fp8_linear(a[:rows], packed, scale[:128]), want[:rows, :128]
                    )
        few = lf.fp8_linear(a[: ROWS - 1], w, scale)
        exact = lf.fp8_linear(a, w, scale, quantize_activation=False)
        assert torch.equal(few, exact[: ROWS - 1]) and not torch.equal(want, exact[: len(want)])


def test_flushed_denormals_change_nothing(one_thread: None) -> None:
    codes = torch.arange(128 * 300).view(128, 300) % 8 + torch.arange(300) % 2 * 128
    weight, x = codes.to(torch.uint8).view(FP8), torch.randn(ROWS, 300)
    x[::2] *= 1e-38
    x[1::4, :64] *= 2.0**-99
    kept = lf.fp8_linear(x, weight, ONE)
    torch.set_flush_denormal(True)
    try:
        flushed = lf.fp8_linear(x, weight, ONE)
    finally:
        torch.set_flush_denormal(False)
    assert kept.count_nonzero() > 0.9 * kept.numel()
    assert torch.equal(flushed.view(torch.uint8), kept.view(torch.uint8))


def test_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only by choice, on AVX2, and not under deterministic algorithms."""
    x = torch.randn(ROWS, 200)
    q, scale = reference.quantize_fp8(torch.randn(128, 200), "row")
    exact = lf.fp8_linear(x, q, scale, quantize_activation=False)

    def rounds() -> bool:
        return not torch.equal(lf.fp8_linear(x, q, scale), exact)

    assert rounds() and "INT16 rounds from 32 rows on" in str(lf.backends())
    torch.use_deterministic_algorithms(True)
    try:
        assert not rounds()
    finally:
        torch.use_deterministic_algorithms(False)
    for isa in _cpu.isas():
        _cpu.set_isa(isa)
        wide = lf.fp8_linear(x, q, scale, quantize_activation=False)
        assert torch.equal(lf.fp8_linear(x, q, scale), wide) == (isa != "avx2")
    monkeypatch.setattr(cpu, "int16", False)
    _cpu.set_isa("avx2")
    assert not rounds()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the module again, as a new process would."""
    spec = importlib.util.spec_from_file_location("llama_fast.second_cpu", cpu.__file__)
    assert spec and spec.loader
    second = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("LLAMA_FAST_CPU_INT16", "on")
    spec.loader.exec_module(second)
    assert second.int16 is True
    monkeypatch.delenv("LLAMA_FAST_CPU_INT16")
    spec.loader.exec_module(second)
    assert second.int16 is False
    monkeypatch.setenv("LLAMA_FAST_CPU_INT16", "yes")
    with pytest.raises(ValueError, match="LLAMA_FAST_CPU_INT16: got 'yes', want on or off"):
        spec.loader.exec_module(second)
