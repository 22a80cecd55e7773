"""Tests of the Triton quantize_fp8: it must have the bits of the eager twin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference, triton_backend
from llama_fast.kernels import common, quantize

from .conftest import launcher

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRANULARITIES = ("tensor", "row", "block", "block_2d")
FP8 = torch.float8_e4m3fn


def assert_same(x: Tensor, granularity: str, scale_ub: float | None = None) -> None:
    """Compare with the eager twin on a CPU, which divides as IEEE does. On a GPU torch may not."""
    q, scale = lf.quantize_fp8(x, granularity, scale_ub=scale_ub)
    want_q, want_scale = reference.quantize_fp8(x.cpu(), granularity, scale_ub=scale_ub)
    q, scale = q.cpu(), scale.cpu()
    assert ((scale == want_scale) | (scale.isnan() & want_scale.isnan())).all()
    same = (q.view(torch.uint8) == want_q.view(torch.uint8)) | (
        q.float().isnan() & want_q.float().isnan()
    )
    assert same.all(), f"{(~same).sum()} codes differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 127), (130, 129), (3, 769), (2, 16500)], ids=str)
def test_bitwise(
    shape: tuple[int, int], granularity: str, dtype: torch.dtype, device: torch.device
) -> None:
    if granularity == "block_2d" and device.type == "cpu":
        shape = shape[0], min(shape[1], 1100)  # the interpreter is slow
    x = torch.randn(shape).mul(3).to(dtype).to(device)
    assert_same(x, granularity)
    assert_same(x, granularity, scale_ub=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_f37_every_16_bit_value(dtype: torch.dtype, device: torch.device) -> None:
    """Cast all values that fit e4m3 with a scale of exactly 1, then all finite values, each with
    447 neighbors under one scale."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[every.abs() <= 448]
    x = torch.cat((x, torch.full((1,), 448.0, dtype=dtype)))[None].to(device)
    q, scale = lf.quantize_fp8(x)
    assert scale.item() == 1.0
    assert torch.equal(q.view(torch.uint8), x.to(FP8).view(torch.uint8))
    every = every.view(128, 512).to(device)
    assert_same(every, "row")
    assert_same(every, "block")


def amaxes(dtype: torch.dtype, count: int) -> Tensor:
    """Return values of every magnitude of dtype, from subnormals to its largest value."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    exponents = torch.linspace(0, 1, count).double() * math.log2(info.max / smallest)
    values = (smallest * torch.exp2(exponents)).to(dtype)
    return torch.where(values.isfinite() & (values > 0), values, info.max).to(dtype)


@pytest.mark.parametrize("scale_ub", [5e-324, 1e-40, 1e-36, 2, 3.4e38], ids=str)
def test_bounds_at_the_ends_of_the_range(scale_ub: float, device: torch.device) -> None:
    x = torch.randn(4, 200)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    for granularity in GRANULARITIES:
        assert_same(x.to(device), granularity, scale_ub)


@pytest.mark.parametrize("bounded", [False, True], ids=["", "bounded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_by_every_magnitude_of_scale(
    dtype: torch.dtype, bounded: bool, device: torch.device
) -> None:
    """Quantize, under each scale, all values that it can have, in rows that stay in registers: up
    to its amax, or, if bounded, all values and the infinities."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    for amax in amaxes(dtype, 13 if common.INTERPRETED else 25):
        x = torch.where(every.isnan() | (~every.isfinite() & (not bounded)), 0, every)
        if not bounded:
            x = torch.where(every.abs() <= amax, x, 0)
        rows = torch.cat((x.view(4, 16384), amax.expand(4, 8)), 1).to(device)
        assert_same(rows, "row", amax.item() if bounded else None)


@pytest.mark.parametrize("bounded", [False, True], ids=["", "bounded"])
def test_fp32_quotients_at_every_tie(bounded: bool, device: torch.device) -> None:
    """Quantize x where x / scale is halfway between two codes, and up to three ulps of x to either
    side. The quotient's last bit decides there: the product with 1 / scale, or a quotient that is
    not rounded correctly, gives other codes."""
    codes = torch.arange(0x7F).to(torch.uint8).view(FP8).double()
    ties = (codes[1:] + codes[:-1]) / 2
    amax = amaxes(torch.float32, 1000)[:, None]
    scale = amax.clamp(min=2.0**-126) / 448
    x = (scale.double() * ties).float().repeat_interleave(7, 1)
    x = (x.view(torch.int32) + torch.arange(-3, 4).repeat(len(ties))).clamp(min=0).int()
    x = torch.cat((x.view(torch.float32).nan_to_num(posinf=0).minimum(amax), amax), 1)
    x[:, ::2] *= -1
    if not bounded:
        assert_same(x.to(device), "row")
    else:  # with values of other magnitudes, in rows that share a scale_ub
        far = torch.tensor([[3e38, -float("inf"), 1e-45, -0.0]])
        for i in range(0, len(x), 40):
            assert_same(torch.cat((x[i : i + 1], far), 1).to(device), "row", amax[i].item())


def test_scales_are_ieee_quotients(device: torch.device) -> None:
    """Compute amax / 448 for all mantissas of a sample, and at fp32's limits."""
    sample = torch.arange(2**23, 2**31 - 2**24, 107_369).int().view(torch.float32)
    smallest = 448 * torch.tensor([2.0**-126]) * torch.tensor([1 - 2.0**-23, 1, 1 + 2.0**-23])
    ends = torch.tensor([2.0**-126, 3.4028235e38, 1e-45, 0.0, float("inf")])
    amax = torch.cat((sample, smallest, ends))
    x = torch.zeros(len(amax), 8)
    x[:, 5] = -amax
    assert_same(x.to(device), "block")


def test_f38_ties_round_to_even(device: torch.device) -> None:
    """Check ties between neighbors: normals, the first normal, subnormals, half of the smallest (to
    zero) and one and a half times it."""
    ties = {
        17.0: 16.0, 19.0: 20.0, 21.0: 20.0, 23.0: 24.0, 1.0625: 1.0, 1.1875: 1.25,
        432.0: 448.0, 2.0**-6 * 1.0625: 2.0**-6, 7.5 * 2.0**-9: 8 * 2.0**-9,
        0.5 * 2.0**-9: 0.0, 1.5 * 2.0**-9: 2 * 2.0**-9, 2.5 * 2.0**-9: 2 * 2.0**-9,
    }  # fmt: skip
    x = torch.tensor([[*ties, *(-t for t in ties), 448.0]], device=device)
    want = torch.tensor([*ties.values(), *(-t for t in ties.values()), 448.0], device=device)
    for granularity in GRANULARITIES:
        q, scale = lf.quantize_fp8(x, granularity)
        assert (scale == 1.0).all() and torch.equal(q.float()[0], want)


def test_a_tensor_of_the_cpu_is_refused(device: torch.device) -> None:
    """Pass a CPU tensor. In the interpreter tests/gpu/other_device.py refuses it."""
    x = torch.randn(2, 8)
    with pytest.raises((RuntimeError, ValueError)):
        lf.quantize_fp8(x)
    with pytest.raises(RuntimeError):
        x + torch.randn(2, 8, device=device)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_f27_zero_and_tiny_rows(granularity: str, device: torch.device) -> None:
    x = torch.randn(6, 256, device=device)
    x[2] = 0
    x[4] = 1e-30
    for rows in (x, x[2:3], torch.zeros(130, 256, device=device), x[4:5].bfloat16()):
        q, scale = lf.quantize_fp8(rows, granularity)
        assert scale.isfinite().all() and (scale > 0).all() and not q.float().isnan().any()
        assert_same(rows, granularity)
    for smallest in (1e-38, 1e-44):
        assert_same(torch.full((2, 200), smallest, device=device), granularity)


@pytest.mark.parametrize("value", [448, 449, 464, 465, 480, 1200, 1201, float("inf")])
@pytest.mark.parametrize("scale_ub", [None, 448.0, 1200.0])
def test_f28_the_cast_is_clamped(
    value: float, scale_ub: float | None, device: torch.device
) -> None:
    """Clamp before the cast: e4m3 has no infinity, and 465 and more would become NaN."""
    x = torch.tensor([[value, -value, 1.0, 0.0, -0.0]], device=device)
    for granularity in GRANULARITIES:
        assert_same(x, granularity, scale_ub)
    if scale_ub is not None or value != float("inf"):
        q, _ = lf.quantize_fp8(x, scale_ub=scale_ub)
        assert q[0, :2].float().tolist() == [448.0, -448.0]


@pytest.mark.parametrize(
    ("granularity", "cols"), [*((g, 300) for g in GRANULARITIES), ("row", 16500)]
)
def test_nan_is_never_a_number(granularity: str, cols: int, device: torch.device) -> None:
    """Keep NaN as NaN, within its group."""
    x = torch.randn(3, cols, device=device)
    x[1, 200] = float("nan")
    q, _ = lf.quantize_fp8(x, granularity)
    assert q[1, 200].float().isnan()
    assert_same(x, granularity)


@pytest.mark.parametrize(
    ("granularity", "cols"),
    [*((g, cols) for g in GRANULARITIES for cols in (300, 769)), ("row", 16501)],
)
def test_f29_f30_f31_strides_offsets_and_canaries(
    granularity: str, cols: int, device: torch.device
) -> None:
    """Put NaN on all sides of what may be read and sevens around what may be written."""
    dense = torch.randn(5, cols).bfloat16().to(device)
    fenced = torch.full((7, cols + 9), float("nan"), dtype=torch.bfloat16, device=device)
    x = fenced[1:6, 5 : 5 + cols].copy_(dense)
    want, want_scale = lf.quantize_fp8(dense, granularity)
    q = torch.full((7, cols), 7, dtype=torch.uint8, device=device)
    memory = torch.full((want_scale.numel() + 2,), 7.0, device=device)
    scale = memory[1:-1].view(want_scale.shape)
    launcher("quantize_fp8").quantize(q[1:6].view(FP8), scale, x, granularity, None)
    assert (q[[0, 6]] == 7).all() and (memory[[0, -1]] == 7).all()
    assert torch.equal(q[1:6], want.view(torch.uint8)) and torch.equal(scale, want_scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_f02_rows_past_2_to_31(granularity: str, device: torch.device) -> None:
    """Use a stride that fits 32 bits but not times row 2, and one that itself does not fit."""
    memory = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)
    for n, stride in ((3, 2**30 + 64), (2, 2**31 + 64)):
        rows = torch.randn(n, 64).bfloat16().to(device)
        x = memory.as_strided((n, 64), (stride, 1)).copy_(rows)
        got, want = lf.quantize_fp8(x, granularity), lf.quantize_fp8(rows, granularity)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.big
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_f06_more_than_2_to_31_elements(granularity: str, device: torch.device) -> None:
    """Quantize 1,900,000 x 1152, which is past 2^31. All rows but the last few are equal. The
    tensor is contiguous (4.4 GB), so that "tensor" takes it for one long row."""
    rows, cols = 1_900_000, 1152
    x = torch.randn(1, cols).bfloat16().to(device).expand(rows, cols)
    q, scale = lf.quantize_fp8(x.contiguous() if granularity == "tensor" else x, granularity)
    want, want_scale = reference.quantize_fp8(x[:128].cpu(), granularity)
    for row in (0, 2**31 // cols - 1, 2**31 // cols, 2**31 // cols + 1, rows - 1):
        assert torch.equal(q[row].cpu().view(torch.uint8), want[0].view(torch.uint8)), row
    assert torch.equal(scale[-1].cpu(), want_scale[-1])


def test_f41_a_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    x = torch.randn(130, 257).bfloat16().to(device)
    for granularity in ("row", "block"):
        q, scale = lf.quantize_fp8(x[:1], granularity)
        for rows in (2, 63, 130):
            got_q, got_scale = lf.quantize_fp8(x[:rows], granularity)
            assert torch.equal(got_q[:1].view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(got_scale[:1], scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_f11_no_rows(granularity: str, device: torch.device) -> None:
    x = torch.randn(2, 300, device=device)
    q, scale = lf.quantize_fp8(x[:0], granularity)
    _, want = reference.quantize_fp8(x[:0], granularity)
    assert q.shape == (0, 300) and torch.equal(scale, want)
    assert_same(x, granularity)


@pytest.mark.triton
@pytest.mark.parametrize("cols", [64, 769])
def test_f33_every_configuration(cols: int, device: torch.device) -> None:
    """Force each configuration into poisoned outputs."""
    x = torch.randn(70, cols).bfloat16().to(device)
    chip = common.chip_of(x)
    for name, configs, granularities in (
        ("quantize_groups", quantize._group_configs(chip, cols), ("row",)),
        ("quantize_groups", quantize._group_configs(chip, 128), ("block",)),
        ("quantize_squares", quantize._square_configs(chip), ("block_2d",)),
        ("quantize_pieces", quantize._piece_configs(chip, 2), ("tensor",)),
    ):
        assert configs
        for config in configs:
            for granularity in granularities:
                want, want_scale = reference.quantize_fp8(x.cpu(), granularity)
                q = torch.full((70, cols), 0x7F, dtype=torch.uint8, device=device)
                scale = torch.full(want_scale.shape, -1.0, device=device)
                with common.force(name, config):
                    triton_backend.quantize(q.view(FP8), scale, x, granularity, None)
                assert torch.equal(q.cpu(), want.view(torch.uint8)), config
                assert torch.equal(scale.cpu(), want_scale), config
