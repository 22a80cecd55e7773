"""Tests of the Triton fp8_gemm and fp8_linear: both kernels, every configuration, and chips with
and without e4m3 and TMA.

In the interpreter operands are decoded to fp32 before they are multiplied, because its own products
of bf16 and of e4m3 are wrong: it takes bf16's bits for integers and NaN for 480 (faults 37 and 38).
Only a GPU can show what a tensor core does with the codes. Integers are exact on both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import llama_fast as lf
from llama_fast import cuda, reference, triton_backend
from llama_fast.kernels import common, fp8_stream, fp8_tile, linear
from llama_fast.kernels.common import Chip

from ..support.tolerances import FP8_SUM, assert_close_to_eager
from .conftest import BACKEND, launcher

FP8 = torch.float8_e4m3fn
EMULATED = BACKEND == "cuda" and cuda.EMULATED
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALES = ("tensor", "row", "block", "block_2d")
# The interpreter's own chip is like sm_90.
OTHERS = {
    "sm_80": Chip("interpreter", "cuda", 80, 3, 166912),
    "sm_89": Chip("interpreter", "cuda", 89, 3, 101376),
    "sm_100": Chip("interpreter", "cuda", 100, 3, 232448),
}


@pytest.fixture(params=["at hand", *OTHERS])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Launch as on each chip in the interpreter, or on the GPU that is present."""
    if request.param != "at hand":
        if torch.cuda.is_available() or BACKEND != "triton":
            pytest.skip("other chips exist only in the interpreter")
        monkeypatch.setattr("llama_fast.kernels.chip._INTERPRETER", OTHERS[request.param])
    return str(request.param)


@pytest.fixture(autouse=True)
def quantizer() -> Iterator[None]:
    """Quantize by the reference: this file does not test the quantizer."""
    with lf.use_backend("reference", "quantize_fp8"):
        yield


def integers(rows: int, cols: int, device: torch.device, dtype: torch.dtype = FP8) -> Tensor:
    return torch.randint(-4, 5, (rows, cols)).float().to(dtype).to(device)


def powers_of_two(granularity: str, rows: int, cols: int, device: torch.device) -> Tensor:
    """Return scales that keep integer sums exact in fp32."""
    blocks = -(-cols // 128)
    shapes: dict[str, tuple[int, ...]] = {
        "tensor": (1,),
        "row": (rows, 1),
        "block": (rows, blocks),
        "block_2d": (-(-rows // 128), blocks),
    }
    return torch.exp2(torch.randint(-2, 3, shapes[granularity]).float()).to(device)


def exact(a: Tensor, b: Tensor, scale_a: Tensor | None, scale_b: Tensor) -> Tensor:
    left = a.double() if scale_a is None else reference.dequantize_fp8(a, scale_a).double()
    return left @ reference.dequantize_fp8(b, scale_b).double().t()


def fenced(t: Tensor, left: int) -> Tensor:
    """Return the same rows, `left` elements off alignment, with NaN before, after and between."""
    rows, cols = t.shape
    memory = torch.full((rows + 2, left + cols + 3), float("nan"), device=t.device).to(t.dtype)
    view = memory[1:-1, left : left + cols]
    return view.copy_(t)


def fp8_sum(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> float:
    """Return the error of tensor cores that sum e4m3 products in less than fp32."""
    left, right = (
        reference.dequantize_fp8(*p).double().abs() for p in ((a, scale_a), (b, scale_b))
    )
    if a.device.type == "cuda":
        short = torch.cuda.get_device_capability() in ((8, 9), (9, 0))
    else:
        short = EMULATED  # as on sm_90
    return FP8_SUM * (left @ right.t()).max().item() if short else 0.0


# ---- values ----


@pytest.mark.parametrize("scale_b", SCALES)
@pytest.mark.parametrize("scale_a", SCALES[:3])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (3, 96, 100), (17, 257, 129), (130, 257, 144)])
def test_integers_are_exact(
    m: int, n: int, k: int, scale_a: str, scale_b: str, device: torch.device
) -> None:
    a, b = integers(m, k, device), integers(n, k, device)
    scales = powers_of_two(scale_a, m, k, device), powers_of_two(scale_b, n, k, device)
    bias = torch.randint(-9, 10, (n,)).float().to(device)
    out = lf.fp8_gemm(a, b, *scales, bias=bias, out_dtype=torch.float32)
    assert torch.equal(out.double(), exact(a, b, *scales) + bias.double())


@pytest.mark.parametrize("m", [33, 65])
def test_on_every_chip(m: int, chip: str, device: torch.device) -> None:
    """Run with and without TMA, e4m3, promotion and K a multiple of 16, for both kinds of x."""
    for k, scale_a, scale_b in (
        (272, "row", "row"),
        (272, "block", "block_2d"),
        (70, "row", "row"),
    ):
        a, b = integers(m, k, device), integers(135, k, device)
        scales = powers_of_two(scale_a, m, k, device), powers_of_two(scale_b, 135, k, device)
        bias = torch.randint(-9, 10, (135,)).bfloat16().to(device)
        want = (exact(a, b, *scales) + bias.double()).bfloat16()
        assert torch.equal(lf.fp8_gemm(a, b, *scales, bias=bias), want)
        x = integers(m, k, device, torch.bfloat16)
        out = lf.fp8_linear(x, b, scales[1], bias, quantize_activation=False)
        assert torch.equal(out, (exact(x, b, None, scales[1]) + bias.double()).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 96, 769), (65, 130, 144)])
def test_16_bit_activations(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, b = integers(m, k, device, dtype), integers(n, k, device)
    bias = torch.randint(-9, 10, (n,)).to(dtype).to(device)
    for granularity in SCALES:
        scale = powers_of_two(granularity, n, k, device)
        out = lf.fp8_linear(x, b, scale, bias, quantize_activation=False)
        assert torch.equal(out, (exact(x, b, None, scale) + bias.double()).to(dtype))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", SCALES)
@pytest.mark.parametrize("m", [19, 70])
def test_error_is_within_eagers_bound(
    m: int, granularity: str, out_dtype: torch.dtype, device: torch.device
) -> None:
    n, k = (70, 272) if device.type == "cpu" else (500, 4096)
    if EMULATED and m > 64:
        k = 4096  # Hopper's sums are emulated: a long row would show their error
    x, w = torch.randn(m, k).to(device), torch.randn(n, k).to(device)
    a, scale_a = reference.quantize_fp8(x, "block" if granularity == "block_2d" else granularity)
    b, scale_b = reference.quantize_fp8(w, granularity)
    bias = torch.randn(n).to(out_dtype).to(device)
    ours = lf.fp8_gemm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
    eager = reference.fp8_gemm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
    want = exact(a, b, scale_a, scale_b) + bias.double()
    assert_close_to_eager(ours, eager, want, fp8_sum(a, b, scale_a, scale_b))
    x = x.to(out_dtype)
    ours = lf.fp8_linear(x, b, scale_b, bias, quantize_activation=False)
    eager = reference.fp8_linear(x, b, scale_b, bias)
    assert_close_to_eager(ours, eager, exact(x, b, None, scale_b) + bias.double())


@pytest.mark.triton
@pytest.mark.parametrize("m", [19, 70])
def test_fp32_sums_are_blocked(
    m: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Add as a GPU does: fp32 products compile to one chain of fma from the accumulator on, which
    numpy's product does not show. The error must stay within twice eager's over K = 4096 too."""

    def chain(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = d.data.astype(np.float64)
        for k in range(a.data.shape[1]):
            once = a.data[:, k, None].astype(np.float64) * b.data[None, k] + total
            total = once.astype(np.float32).astype(np.float64)
        return TensorHandle(total.astype(np.float32), d.dtype.scalar)

    if common.INTERPRETED:
        monkeypatch.setattr(InterpreterBuilder, "create_dot", chain)
    x, w = torch.randn(m, 4096).to(device), torch.randn(24, 4096).to(device)
    b, scale = reference.quantize_fp8(w)
    with common.force("fp8_stream", common.Config.of(4, 4, BLOCK_N=64, BLOCK_K=32, SPLITS=1)):
        ours = lf.fp8_linear(x, b, scale, quantize_activation=False)
    eager = reference.fp8_linear(x, b, scale)
    assert_close_to_eager(ours, eager, exact(x, b, None, scale))


@pytest.mark.parametrize("m", [1, 70])
def test_f37_every_code_on_either_side(m: int, chip: str, device: torch.device) -> None:
    """Multiply every code by one. Subnormals come out as their values, and NaN as NaN."""
    codes = torch.arange(256, dtype=torch.uint8).to(device).view(FP8)
    one = torch.ones(1, device=device)
    column = torch.zeros(256, 16, device=device).to(FP8)
    column[:, 0] = codes
    unit = torch.zeros(m, 16, device=device).to(FP8)
    unit[:, 0] = 1.0
    out = lf.fp8_gemm(column[-m:], unit, one, one, out_dtype=torch.float32)
    want = codes.float()[-m:, None].expand(m, m)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    want = codes.float().expand(m, 256)
    for dtype in (FP8, *DTYPES):
        x = torch.zeros(m, 16, device=device)
        x[:, 0] = 1.0
        out_dtype = torch.float32 if dtype == FP8 else dtype
        if dtype == FP8:
            out = lf.fp8_gemm(x.to(FP8), column, one, one, out_dtype=out_dtype)
        else:
            out = lf.fp8_linear(x.to(dtype), column, one, quantize_activation=False)
        torch.testing.assert_close(out, want.to(out_dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [70, 80])
@pytest.mark.parametrize("m", [9, 70])
def test_a_nan_stays_in_its_row_and_column(m: int, k: int, device: torch.device) -> None:
    a, b, one = integers(m, k, device), integers(70, k, device), torch.ones(1, device=device)
    clean = lf.fp8_gemm(a, b, one, one)
    a.view(torch.uint8)[4, k - 1], b.view(torch.uint8)[65, 0] = 0x7F, 0xFF
    out = lf.fp8_gemm(a, b, one, one)
    assert out[4].isnan().all() and out[:, 65].isnan().all()
    rows, cols = [i for i in range(m) if i != 4], [j for j in range(70) if j != 65]
    assert torch.equal(out[rows][:, cols], clean[rows][:, cols])


@pytest.mark.parametrize("at", [0, 17, 33, 50, 127])
def test_a_nan_anywhere_in_a_weight(at: int, device: torch.device) -> None:
    """Put NaN at places of a row's 128 values. Codes become 16 bits by arithmetic that makes a
    number of NaN, so the kernel must check every place."""
    x, b = integers(3, 128, device, torch.bfloat16), integers(20, 128, device)
    x[:, at] = 1.0
    b.view(torch.uint8)[13, at] = 0x7F
    out = lf.fp8_linear(x, b, torch.ones(1, device=device), quantize_activation=False)
    assert out[:, 13].isnan().all() and not out[:, [j for j in range(20) if j != 13]].isnan().any()


@pytest.mark.parametrize("m", [5, 70])
def test_f27_zero_rows(m: int, device: torch.device) -> None:
    x = torch.randn(m, 256).to(device)
    x[2], x[3] = 0.0, 1e-30
    for granularity in ("row", "block"):
        a, scale_a = reference.quantize_fp8(x, granularity)
        b, scale_b = reference.quantize_fp8(torch.randn(64, 256).to(device), granularity)
        out = lf.fp8_gemm(a, b, scale_a, scale_b)
        assert out.isfinite().all() and (out[2] == 0).all()


def test_f48_large_fp16(device: torch.device) -> None:
    """Let partial sums pass fp16's 65504 by far. Only the result has to fit."""
    weight = torch.ones(64, 512, device=device)
    weight[:, 256:] = -1.0
    weight[:, 0] = 0.0
    one = torch.ones(1, device=device)
    for m, value in ((2, 6e4), (70, 1e4)):
        x = torch.full((m, 512), value, dtype=torch.float16, device=device)
        out = lf.fp8_linear(x, weight.to(FP8), one, quantize_activation=False)
        assert (out == -value).all()


# ---- memory ----


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("k", [129, 144])
@pytest.mark.parametrize("left", [1, 16], ids=["off alignment", "aligned"])
def test_f29_f31_strides_and_canaries(m: int, k: int, left: int, device: torch.device) -> None:
    """Put operands at any alignment and scales between NaN, and the output between canaries."""
    for dtype, granularity in itertools.product((FP8, torch.bfloat16), ("row", "block")):
        wide = k + 160 - k % 16  # TMA takes these strides if the start is aligned too
        memory = torch.full((m + 94, wide), float("nan"), device=device).to(dtype)
        x = memory[1 : m + 1, left : left + k]
        x.copy_(integers(m, k, device, dtype))
        weight = fenced(integers(90, k, device), left)
        scale = torch.full((92, 1 if granularity == "row" else 2), float("nan"), device=device)
        scale = scale[1:-1].copy_(powers_of_two(granularity, 90, k, device))
        one = torch.ones(1, device=device) if dtype == FP8 else None
        canary = torch.full((m + 2, 90), 7.0, dtype=torch.bfloat16, device=device)
        launcher("fp8_gemm").linear(canary[1:-1], x, weight, None, one, scale)
        assert (canary[0] == 7).all() and (canary[-1] == 7).all()
        assert torch.equal(canary[1:-1], exact(x, weight, one, scale).bfloat16())


@pytest.mark.parametrize("n", [1, 33, 769])
def test_f30_odd_width_leaves_neighbors_alone(n: int, device: torch.device) -> None:
    one = torch.ones(1, device=device)
    for m in (1, 66):
        a, b = integers(m, 32, device), integers(n, 32, device)
        canary = torch.full((m * n + 64,), 7.0, device=device)
        out = canary[32:-32].view(m, n)
        launcher("fp8_gemm").linear(out, a, b, None, one, one)
        assert (canary[:32] == 7).all() and (canary[-32:] == 7).all()
        assert torch.equal(out.double(), exact(a, b, one, one))


@pytest.mark.parametrize("m", [2, 12, 66])
def test_f02_row_stride_past_2_to_31(m: int, device: torch.device) -> None:
    """Put the last rows past byte 2^31. On a CPU untouched pages cost nothing."""
    stride = 2**31 // (m - 1) // 16 * 16 + 64  # a multiple of 16, for TMA
    memory = torch.empty(stride * (m - 1) + 64, dtype=FP8, device=device)
    one = torch.ones(1, device=device)
    has_tma = common.chip_of(one).has_tma
    for shift in (0, 1):  # by TMA, and by pointers
        far = memory[shift:].as_strided((m, 64 - shift), (stride, 1))
        far.copy_(integers(m, 64 - shift, device))
        near = integers(66, 64 - shift, device)
        if BACKEND == "triton":
            assert fp8_tile.use_tma(common.chip_of(far), far, near) == (not shift and has_tma)
        assert torch.equal(lf.fp8_gemm(far, near, one, one), exact(far, near, one, one).bfloat16())
        assert torch.equal(lf.fp8_gemm(near, far, one, one), exact(near, far, one, one).bfloat16())


@pytest.mark.gpu
@pytest.mark.big
@pytest.mark.parametrize("m", [1, 128])
def test_f01_weight_past_2_to_31_elements(m: int, device: torch.device) -> None:
    """Use features on either side of element 2^31, each with its own value."""
    k = 8192
    n = 2**31 // k + 128
    weight = torch.zeros((n, k), dtype=torch.uint8, device=device).view(FP8)
    one = torch.ones(1, device=device)
    features = [0, n - 129, n - 128, n - 1]
    for i, feature in enumerate(features):
        weight[feature].fill_(2.0**i)
    want = torch.tensor([k * 2.0**i for i in range(4)], device=device)
    x = torch.ones(m, k, dtype=torch.bfloat16, device=device)
    for quantize in (False, True):
        out = lf.fp8_linear(x, weight, one, quantize_activation=quantize)
        assert (out[:, features] == want).all() and out.count_nonzero() == 4 * m


def test_f11_zero_rows_then_a_normal_call(device: torch.device) -> None:
    b, one = integers(64, 32, device), torch.ones(1, device=device)
    assert lf.fp8_gemm(integers(0, 32, device), b, one, one).shape == (0, 64)
    a = integers(3, 32, device)
    assert lf.fp8_gemm(a, b[:0], one, one).shape == (3, 0)
    assert lf.fp8_linear(torch.empty(2, 0, 32, device=device), b, one).shape == (2, 0, 64)
    assert torch.equal(lf.fp8_gemm(a, b, one, one), exact(a, b, one, one).bfloat16())


# ---- configurations, batches ----


@pytest.mark.triton
def test_f33_every_configuration_of_gemm(device: torch.device) -> None:
    """Force each configuration into poison: exact for integers, the same bits for random values.
    There are more tiles than programs; the last group has fewer rows of tiles than GROUP_M."""
    chip, n, k = common.chip_of(torch.empty(1, device=device)), 150, 144
    if not chip.has_e4m3:
        pytest.skip("this GPU does not multiply e4m3")
    m = 9 * 64 + 7 if device.type == "cpu" else 5000
    operands = [(integers(m, k, device), integers(n, k, device))]
    bias = torch.randint(-9, 10, (n,)).float().to(device)
    if device.type == "cuda":  # the CPU's products depend on the tile
        operands.append((torch.randn(m, k).to(device, FP8), torch.randn(n, k).to(device, FP8)))
    for granularity, (a, b) in itertools.product(("row", "block"), operands):
        scales = powers_of_two(granularity, m, k, device), powers_of_two(granularity, n, k, device)
        outs = []
        for config in linear._configs(chip, 1024, n, granularity == "block", 4):
            out = torch.full((m, n), float("nan"), device=device)
            with common.force("fp8_gemm", config):
                triton_backend.linear(out, a, b, bias, *scales)
            outs.append(out)
        assert all(torch.equal(out, outs[0]) for out in outs)
        if a is operands[0][0]:
            assert torch.equal(outs[0].double(), exact(a, b, *scales) + bias.double())


@pytest.mark.triton
@pytest.mark.parametrize("dtype", (FP8, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("m, k", [(33, 784), (65, 272), (40, 785)])
def test_f33_every_configuration_of_stream(
    m: int, k: int, dtype: torch.dtype, chip: str, device: torch.device
) -> None:
    """Force each configuration into poison, with K whole and split unevenly (odd blocks)."""
    if chip in ("sm_89", "sm_100") and m != 33:
        pytest.skip("another chip takes the same path")
    this, n, few = common.chip_of(torch.empty(1, device=device)), 60, m <= 64
    x, b, scale = integers(m, k, device, dtype), integers(n, k, device), None
    if dtype == FP8:
        scale = powers_of_two("row", m, k, device)
    weight_scale = powers_of_two("block_2d", n, k, device)
    bias = torch.randint(-9, 10, (n,)).float().to(device)
    want = exact(x, b, scale, weight_scale) + bias.double()
    offered = fp8_stream._configs(this, few, n, k, x.itemsize, k % 16 == 0)
    for config in offered:
        for splits in (1, 3) if few else (1,):
            constants = {**dict(config.constants), "SPLITS": splits}
            split = common.Config.of(config.num_warps, config.num_stages, **constants)
            with common.force("fp8_stream", split):
                out = torch.full((m, n), float("nan"), dtype=torch.float32, device=device)
                fp8_stream.stream(out, x, b, bias, scale, weight_scale)
            assert torch.equal(out.double(), want), str(split)


@pytest.mark.parametrize("kind", ["row", "block", "16-bit"])
def test_f41_a_row_does_not_depend_on_the_batch(kind: str, device: torch.device) -> None:
    """Compare a row among up to 64, where K is split, and among more. The interpreter's partial
    sums are of integers, exact in any order; scales in blocks show the order of splits in fp32."""
    k, n = 1040, 64
    x, b = integers(256, k, device), integers(n, k, device)
    if device.type == "cuda":
        x, b = torch.randn(256, k, device=device).to(FP8), torch.randn(n, k, device=device).to(FP8)
    sx = torch.rand(256, 9 if kind == "block" else 1, device=device)
    sw = torch.rand(n if kind == "row" else 1, 1 if kind == "row" else 9, device=device)

    def op(start: int, end: int) -> Tensor:
        if kind == "16-bit":
            rows = x[start:end].to(torch.bfloat16 if device.type == "cuda" else torch.float32)
            return lf.fp8_linear(rows, b, sw, quantize_activation=False)
        scale = sx[start:end].contiguous()
        return lf.fp8_gemm(x[start:end], b, scale, sw, out_dtype=torch.float32)

    few, many = op(5, 6), op(0, 65)
    for rows in (2, 16, 17, 33, 64):
        assert torch.equal(op(4, 4 + rows)[1:2], few)
    for rows in (66, 130) if device.type == "cpu" else (66, 128, 129, 250):
        assert torch.equal(op(1, 1 + rows)[:64], many[1:])


# ---- fp8_linear's choice ----


def test_quantizes_where_the_chip_multiplies_e4m3(chip: str, device: torch.device) -> None:
    x, weight = torch.randn(3, 256).bfloat16().to(device), torch.randn(70, 256).to(device)
    native = common.chip_of(x).has_e4m3
    assert native == (chip not in ("sm_80",)) or chip == "at hand"
    for granularity in ("row", "block_2d"):
        q, scale = reference.quantize_fp8(weight, granularity)
        default = lf.fp8_linear(x, q, scale)
        assert torch.equal(default, lf.fp8_linear(x, q, scale, quantize_activation=native))
        assert not torch.equal(default, lf.fp8_linear(x, q, scale, quantize_activation=not native))


def test_a_packed_weight_is_for_cpus(device: torch.device) -> None:
    weight = reference.pack_weight(integers(64, 32, device))
    x, one = torch.ones(2, 32, device=device), torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"weight: .*want \[N, K\]"):
        lf.fp8_linear(x, weight, one)


# ---- what only hardware can show ----


@pytest.mark.gpu
@pytest.mark.parametrize("m", [16, 300])
def test_f42_250_repeats(m: int, device: torch.device) -> None:
    x = torch.randn(m, 4096, device=device).bfloat16()
    for granularity in ("row", "block_2d"):
        q, scale = reference.quantize_fp8(torch.randn(1024, 4096, device=device), granularity)
        for quantize in (True, False):
            first = lf.fp8_linear(x, q, scale, quantize_activation=quantize)
            for _ in range(250):
                again = lf.fp8_linear(x, q, scale, quantize_activation=quantize)
                assert torch.equal(again, first)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [16, 300])
def test_f20_f21_graph_replays_splits(m: int, device: torch.device) -> None:
    """Replay splits: the graph keeps its partial sums, and calls between replays use others."""
    a, b = integers(m, 4096, device), integers(256, 4096, device)
    one = torch.ones(1, device=device)
    lf.fp8_gemm(a, b, one, one)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lf.fp8_gemm(a, b, one, one)
    for _ in range(3):
        a.copy_(integers(m, 4096, device))
        lf.fp8_gemm(integers(m, 8192, device), integers(256, 8192, device), one, one)
        graph.replay()
        assert torch.equal(out, exact(a, b, one, one).bfloat16())
