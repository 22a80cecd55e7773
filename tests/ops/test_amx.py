"""Tests of products on a simulated CPU with AMX: which calls go to oneDNN, and their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, amx, reference

from ..support.tolerances import assert_close_to_eager

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
ROWS = 40  # from this many rows on, oneDNN's products count as faster


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Simulate a CPU with AMX. Collect the rows of each product that goes to oneDNN."""
    rows: list[int] = []
    product = amx.linear

    def spy(out: Tensor, *arguments: Tensor | None) -> None:
        rows.append(out.shape[0])
        product(out, *arguments)

    monkeypatch.setattr(amx, "enabled", True)
    monkeypatch.setattr(amx, "first_rows", lambda *_: ROWS)
    monkeypatch.setattr(amx, "linear", spy)
    yield rows


def integers(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randint(-4, 5, (rows, cols)).float().to(dtype)


def test_rows_decide(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(ROWS, 96).to(BF16), torch.randn(192, 96).to(BF16)
    alone = lf.linear(x[:1], weight)
    assert torch.equal(lf.linear(x[: ROWS - 1], weight)[:1], alone) and not taken
    assert torch.equal(lf.linear(x, weight), F.linear(x, weight)) and taken == [ROWS]
    monkeypatch.setattr(amx, "first_rows", lambda *_: 1)  # never below 32, whatever is measured
    lf.linear(x[: amx.LEAST_ROWS - 1], weight)
    assert taken == [ROWS] and amx.LEAST_ROWS == 32
    lf.linear(x[: amx.LEAST_ROWS], weight)
    assert taken == [ROWS, amx.LEAST_ROWS]


def test_one_path_for_every_row(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep one path under deterministic algorithms, and on a CPU where AMX is not enabled."""
    x, weight = torch.randn(ROWS, 96).to(BF16), torch.randn(192, 96).to(BF16)
    alone = torch.cat([lf.linear(row, weight) for row in x.split(1)])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(lf.linear(x, weight), alone)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(amx, "enabled", False)
    assert torch.equal(lf.linear(x, weight), alone) and not taken


def test_other_dtypes_stay_on_our_kernels(taken: list[int]) -> None:
    """Keep products that oneDNN would change: fp16 and fp32 do not fit bf16, an fp32 result would
    be rounded to it, and blocks of x are summed one by one."""
    for dtype in (torch.float16, torch.float32):
        lf.linear(integers(ROWS, 64, dtype), integers(64, 64, dtype))
        lf.fp8_linear(integers(ROWS, 64, dtype), integers(64, 64, FP8), torch.ones(1))
    a, b, one = integers(ROWS, 256, FP8), integers(64, 256, FP8), torch.ones(1)
    lf.fp8_gemm(a, b, one, one, out_dtype=torch.float32)
    lf.fp8_gemm(a, b, torch.ones(ROWS, 2), one)
    assert not taken


@pytest.mark.parametrize("granularity", ["tensor", "row", "block", "block_2d"])
@pytest.mark.parametrize("n, k", [(1, 1), (130, 389), (1088, 300)])
def test_integers_are_exact(granularity: str, n: int, k: int, taken: list[int], isa: str) -> None:
    """Cover every layout and scale, more features than are decoded at once, and a strided x."""
    x, bias = integers(ROWS, k + 3)[:, 3:], torch.randint(-9, 10, (n,)).to(BF16)
    weight = integers(n, k)
    blocks = {"tensor": (1,), "row": (n, 1), "block": (n, -(-k // 128))}
    shape = blocks.get(granularity, (-(-n // 128), -(-k // 128)))
    scale = torch.exp2(torch.randint(-1, 2, shape).float())
    want = x.double() @ weight.double().t() + bias.double()
    scaled = reference.dequantize_fp8(weight.to(FP8), scale).double()
    want_fp8 = x.double() @ scaled.t()
    layouts: list[Callable[[Tensor], Tensor]] = [lambda w: w]
    if n % 64 == 0 and k % 2 == 0:
        layouts.append(lf.pack_weight)
    for layout in layouts:
        assert torch.equal(lf.linear(x, layout(weight), bias), want.to(BF16))
        assert_once_rounded(lf.fp8_linear(x, layout(weight.to(FP8)), scale), want_fp8)
        x_scale = torch.exp2(torch.randint(-1, 2, (ROWS, 1)).float())
        out = lf.fp8_gemm(x.to(FP8), weight.to(FP8), x_scale, scale)
        assert_once_rounded(out, want_fp8 * x_scale.double())
    assert taken == [ROWS] * len(taken) and len(taken) == 3 * len(layouts)


def assert_once_rounded(out: Tensor, want: Tensor) -> None:
    """Require one rounding, with powers of two, which commute with rounding to bf16."""
    assert torch.equal(out, want.to(BF16))


@pytest.mark.parametrize("granularity", ["tensor", "row", "block", "block_2d"])
def test_error_is_within_eagers_bound(granularity: str, taken: list[int]) -> None:
    x, bias = torch.randn(64, 1000).to(BF16), torch.randn(256).to(BF16)
    q, scale = reference.quantize_fp8(torch.randn(256, 1000) * 0.05, granularity)
    want = x.double() @ reference.dequantize_fp8(q, scale).double().t() + bias.double()
    eager = reference.fp8_linear(x, q, scale, bias)
    for weight in (q, lf.pack_weight(q)):
        assert_close_to_eager(lf.fp8_linear(x, weight, scale, bias), eager, want)
    assert taken == [64, 64]


def test_every_code(taken: list[int], isa: str) -> None:
    """Decode every code. Subnormals survive, and NaN stays NaN in its feature."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).view(256, 1).expand(256, 64).contiguous()
    x = torch.zeros(ROWS, 64, dtype=BF16)
    x[:, 63] = 1.0
    want = codes[:, 0].float().to(BF16).expand(ROWS, 256)
    for weight in (codes, lf.pack_weight(codes)):
        out = lf.fp8_linear(x, weight, torch.ones(1))
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert taken


def test_an_x_of_one_row_repeated(taken: list[int]) -> None:
    x, weight = integers(1, 64), integers(64, 64)
    want = (x.double() @ weight.double().t()).to(BF16)
    assert torch.equal(lf.linear(x.expand(ROWS, 64), weight), want.expand(ROWS, 64))
    one = torch.ones(1)
    out = lf.fp8_gemm(x.to(FP8).expand(ROWS, 64), weight.to(FP8), one, one)
    assert torch.equal(out, want.expand(ROWS, 64)) and taken == [ROWS, ROWS]


def test_first_rows_is_where_the_other_begins_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the clock: oneDNN's product takes 100 us for any rows, ours 1 us per row."""
    now = 0.0

    def lasts(seconds: Callable[[int], float]) -> Callable[..., None]:
        def op(out: Tensor, *_: object) -> None:
            nonlocal now
            now += seconds(out.shape[0])

        return op

    monkeypatch.setattr(amx.time, "perf_counter", lambda: now)
    monkeypatch.setattr(_cpu, "linear", lasts(lambda rows: rows * 1e-6))
    for constant, want in ((100e-6, 128), (1.0, math.inf), (0.0, 32)):
        monkeypatch.setattr(amx, "linear", lasts(lambda _, c=constant: c))
        amx.first_rows.cache_clear()
        assert amx.first_rows(FP8, True, 1) == want
    amx.first_rows.cache_clear()


def test_flags_and_switches_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_FAST_CPU_AMX", "LLAMA_FAST_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not amx.allowed()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert amx.allowed()
    monkeypatch.setenv("LLAMA_FAST_CPU_ISA", "avx2")
    assert not amx.allowed()
    monkeypatch.delenv("LLAMA_FAST_CPU_ISA")
    monkeypatch.setenv("LLAMA_FAST_CPU_AMX", "off")
    assert not amx.allowed()
    monkeypatch.setenv("LLAMA_FAST_CPU_AMX", "no")
    with pytest.raises(ValueError, match="LLAMA_FAST_CPU_AMX: got 'no', want on or off"):
        amx.allowed()


def test_backends_shows_it(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    why = lf.backends()["fp8_linear"]["cpu"].why
    assert f"oneDNN (AMX) from {ROWS} rows of plain bf16 weights" in why
    assert f"{ROWS} rows of packed fp8 weights" in why
    assert "AMX" not in lf.backends()["rms_norm"]["cpu"].why
    monkeypatch.setattr(amx, "first_rows", lambda *_: math.inf)
    assert "AMX" not in lf.backends()["linear"]["cpu"].why
    monkeypatch.undo()
    if not amx.enabled:
        assert lf.backends()["linear"]["cpu"].why == f"compiled kernels, {_cpu.isa()}"
