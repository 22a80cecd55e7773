"""Tests of the number formats of every FP8 kernel, by instructions and by integer arithmetic."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels import common, fp8

pytestmark = pytest.mark.triton
FP8 = torch.float8_e4m3fn
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
BLOCK = 4096


@triton.jit
def encode_kernel(out, x, n, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = fp8.to_fp32(tl.load(x + i, mask=i < n, other=0.0))
    tl.store(out + i, fp8.to_e4m3(v, NATIVE), mask=i < n)


@triton.jit
def decode_kernel(out, code, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out + i, fp8.from_e4m3(tl.load(code + i), NATIVE, DTYPE))


@triton.jit
def round_kernel(out, x, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, fp8.round_to(tl.load(x + i), DTYPE))


@triton.jit
def widen_kernel(out, x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, fp8.to_fp32(tl.load(x + i)))


@triton.jit
def quantize_kernel(
    out, x, scale, BOUNDED: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    i = row * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(out + i, fp8.divide_to_e4m3(v, tl.load(scale + row), BOUNDED, NATIVE))


@pytest.fixture(params=[False, True], ids=["integers", "instructions"])
def native(request: pytest.FixtureRequest, device: torch.device) -> bool:
    if request.param and not fp8.native(common.chip_of(torch.empty(0, device=device))):
        pytest.skip("no e4m3 instructions here")
    return bool(request.param)


def encode(x: Tensor, native: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    encode_kernel[(triton.cdiv(x.numel(), BLOCK),)](out, x, x.numel(), native, BLOCK)
    return out


def same_codes(a: Tensor, b: Tensor) -> Tensor:
    """Return where e4m3 bits are equal, or both are NaN of any sign."""
    return (a == b) | (a.view(FP8).float().isnan() & b.view(FP8).float().isnan())


def every_16_bits(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_f37_every_16_bit_value(dtype: torch.dtype, native: bool, device: torch.device) -> None:
    """Encode every value, with NaN, infinities and values beyond 448."""
    x = every_16_bits(dtype, device)
    want = x.float().clamp(-448, 448).to(FP8).view(torch.uint8)
    assert same_codes(encode(x, native), want).all()


def test_f38_ties_round_to_even(native: bool, device: torch.device) -> None:
    """Check ties between neighbors, and one ulp of fp32 to both sides of each: normals, the first
    normal, subnormals, half of the smallest and one and a half times it."""
    ties = {
        17.0: 16.0, 19.0: 20.0, 21.0: 20.0, 23.0: 24.0, 1.0625: 1.0, 1.1875: 1.25,
        432.0: 448.0, 416.0: 416.0, 2.0**-6 * 1.0625: 2.0**-6, 7.5 * 2.0**-9: 8 * 2.0**-9,
        6.5 * 2.0**-9: 6 * 2.0**-9, 0.5 * 2.0**-9: 0.0, 1.5 * 2.0**-9: 2 * 2.0**-9,
        2.5 * 2.0**-9: 2 * 2.0**-9, 464.0: 448.0, 465.0: 448.0, float("inf"): 448.0,
    }  # fmt: skip
    x = torch.tensor([*ties, *(-t for t in ties)], device=device)
    want = torch.tensor([*ties.values(), *(-t for t in ties.values())], device=device)
    assert torch.equal(encode(x, native).view(FP8).float(), want)
    away = torch.tensor([float("inf")], device=device)
    for beside in (torch.nextafter(x, away), torch.nextafter(x, -away)):
        want_code = beside.clamp(-448, 448).to(FP8).view(torch.uint8)
        assert torch.equal(encode(beside, native), want_code)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_code_decodes_exactly(dtype: torch.dtype, native: bool, device: torch.device) -> None:
    code = torch.arange(256, dtype=torch.int32).to(torch.uint8).to(device)
    out = torch.empty(256, dtype=dtype, device=device)
    decode_kernel[(1,)](out, code, native, TYPES[dtype])
    want = code.view(FP8).to(dtype)
    assert ((out == want) | (out.isnan() & want.isnan())).all()
    assert torch.equal(out.signbit()[[0, 128]].cpu(), torch.tensor([False, True]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_f37_rounding_and_widening_of_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    """Avoid the interpreter's cast, which truncates fp32 to bf16 and loses bf16's subnormals."""
    x = torch.randint(-(2**31), 2**31 - 1, (65536,)).to(torch.int32).view(torch.float32).to(device)
    out = torch.empty(65536, dtype=dtype, device=device)
    round_kernel[(16,)](out, x, TYPES[dtype], BLOCK)
    want = x.to(dtype)
    assert ((out == want) | (out.isnan() & want.isnan())).all()
    y = every_16_bits(dtype, device)
    wide = torch.empty(65536, dtype=torch.float32, device=device)
    widen_kernel[(16,)](wide, y, BLOCK)
    assert ((wide == y.float()) | (wide.isnan() & y.isnan())).all()


@pytest.mark.parametrize("bounded", [False, True], ids=["", "bounded"])
@pytest.mark.parametrize("exponents", [(-12, 4), (-135, 128)], ids=["usual", "all"])
def test_the_quotient_is_ieee_division(
    exponents: tuple[int, int], bounded: bool, native: bool, device: torch.device
) -> None:
    """Compare divide_to_e4m3(), which divides by two fma and a product. Rows have every magnitude
    of fp32, values down to its smallest, exact ties of the quotient, and zeros of both signs;
    bounded rows also have values far beyond 448 scales."""
    rows = 64
    amax = (torch.rand(rows) + 1).double() * 2.0 ** torch.randint(*exponents, (rows,)).double()
    amax = amax.clamp(max=3.4e38).float()
    scale = amax.clamp(min=2.0**-126) / 448
    spread = 2.0 ** -(torch.rand(rows, BLOCK) * 14).double()
    x = ((torch.rand(rows, BLOCK) * 2 - 1).double() * amax[:, None] * spread).float()
    if bounded:
        x = (x.double() * 2.0 ** torch.randint(0, 140, (rows, 1)).double()).clamp(-3e38, 3e38)
        x = x.float()
        x[:, 6], x[:, 7] = 3e38, -float("inf")
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = amax, -0.0, 0.0, -amax
    x[:, 4], x[:, 5] = 1e-45, -1e-45
    x[:, 8:24] = (torch.arange(8, 24) + 0.5) * 8 * scale[:, None]
    out = torch.empty(rows, BLOCK, dtype=torch.uint8, device=device)
    quantize_kernel[(rows,)](out, x.to(device), scale.to(device), bounded, native, BLOCK)
    want = (x / scale[:, None]).clamp(-448, 448).to(FP8).view(torch.uint8)
    differ = out.cpu() != want
    assert not differ.any(), (x[differ][:4], scale[differ.any(1)][:4])


def test_infinite_and_nan_scales(native: bool, device: torch.device) -> None:
    """Divide by Inf (0 with x's sign, NaN for an infinite x) and by NaN (always NaN)."""
    scale = torch.tensor([float("inf"), float("nan")])
    x = torch.full((2, BLOCK), -3.0)
    x[:, 1], x[:, 2], x[:, 3] = float("inf"), float("nan"), 2.0
    want = (x / scale[:, None]).clamp(-448, 448).to(FP8).view(torch.uint8)
    for bounded in (False, True):
        out = torch.empty(2, BLOCK, dtype=torch.uint8, device=device)
        quantize_kernel[(2,)](out, x.to(device), scale.to(device), bounded, native, BLOCK)
        assert same_codes(out.cpu(), want).all()
