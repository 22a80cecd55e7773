"""Tests of the Triton silu_and_mul against the eager twin, over every 16-bit value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference, triton_backend
from llama_fast.kernels import activation, common

from ..support.tolerances import SILU_FP32_ULPS, SILU_TIES, ulps
from .conftest import launcher

HALVES = (torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 16, 257, 2049, 16500)  # for FP8 output the last goes in pieces


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


def randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape).mul(4).to(dtype).to(device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value(dtype: torch.dtype, device: torch.device) -> None:
    """Compare silu of all 65,536 values, with NaN and infinities. A few may differ by a rounding
    tie that fp32's last bits decide."""
    gate = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    ours, eager = lf.silu_and_mul(gate_up)[0], reference.silu_and_mul(gate_up)[0]
    differ = ~same(ours, eager)
    assert differ.sum() <= SILU_TIES
    assert ulps(ours[differ], eager[differ]) <= 1


def test_fp32_over_the_whole_range(device: torch.device) -> None:
    """Compare with torch where e^-x overflows, at infinities and NaN; elsewhere with fp64."""
    ends = [-1e38, 0.0, 100.0, 1e38, *map(float, ("-inf", "inf", "nan"))]
    gate = torch.cat((torch.tensor(ends), torch.linspace(-140, -89, 5001))).to(device)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    assert same(lf.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)).all()
    gate = torch.linspace(-85, 90, 100_003, device=device)
    exact = gate.double() / (1 + torch.exp(-gate.double()))
    ours = lf.silu_and_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    assert ulps(ours, exact) <= SILU_FP32_ULPS


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_matches_eager(width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = randn(3, 2 * width, dtype=dtype, device=device)
    ours, eager = lf.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)
    assert ulps(ours, eager) <= (SILU_FP32_ULPS if dtype == torch.float32 else 2)
    for bound in (None, 1.0):
        q, scale = lf.silu_and_mul_fp8(gate_up, scale_ub=bound)
        want_q, want_scale = reference.quantize_fp8(ours, scale_ub=bound)
        assert torch.equal(bits(q), bits(want_q)) and torch.equal(scale, want_scale)


@pytest.mark.parametrize("width", [16, 93, 16501])
def test_f29_f30_f31_strides_offsets_and_canaries(width: int, device: torch.device) -> None:
    """Put NaN on all sides of what may be read and sevens around what may be written."""
    dense = randn(3, 2 * width, dtype=torch.bfloat16, device=device)
    fenced = torch.full((5, 2 * width + 9), float("nan"), dtype=torch.bfloat16, device=device)
    gate_up = fenced[1:4, 5 : 5 + 2 * width].copy_(dense)
    out = torch.full((5, width), 7.0, dtype=torch.bfloat16, device=device)
    q = torch.full((5, width), 7, dtype=torch.uint8, device=device)
    scale = torch.full((5, 1), 7.0, device=device)
    launcher("silu_and_mul").activation(out[1:4], gate_up, None, None)
    launcher("silu_and_mul").activation(q[1:4].view(torch.float8_e4m3fn), gate_up, scale[1:4], None)
    for t in (out, q, scale):
        assert (t[[0, 4]] == 7).all()
    assert torch.equal(out[1:4], lf.silu_and_mul(dense))
    want, want_scale = lf.silu_and_mul_fp8(dense)
    assert torch.equal(q[1:4], bits(want)) and torch.equal(scale[1:4], want_scale)


def test_f02_rows_past_2_to_31(device: torch.device) -> None:
    """Use a stride that fits 32 bits but not times row 2, and one that itself does not fit."""
    memory = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)
    for n, stride in ((3, 2**30 + 64), (2, 2**31 + 64)):
        rows = randn(n, 64, dtype=torch.bfloat16, device=device)
        gate_up = memory.as_strided((n, 64), (stride, 1)).copy_(rows)
        assert torch.equal(lf.silu_and_mul(gate_up), lf.silu_and_mul(rows))
        for a, b in zip(lf.silu_and_mul_fp8(gate_up), lf.silu_and_mul_fp8(rows), strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.gpu
@pytest.mark.big
def test_f01_more_than_2_to_31_elements(device: torch.device) -> None:
    width = 14336
    rows = 2**31 // width + 3
    row = randn(1, 2 * width, dtype=torch.bfloat16, device=device)
    want, want_q = lf.silu_and_mul(row), lf.silu_and_mul_fp8(row)[0]
    out = lf.silu_and_mul(row.expand(rows, 2 * width))
    q, _ = lf.silu_and_mul_fp8(row.expand(rows, 2 * width))
    for i in (0, rows - 5, rows - 4, rows - 3, rows - 1):
        assert torch.equal(out[i], want[0]) and torch.equal(bits(q[i]), bits(want_q[0])), i


def test_f41_a_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    gate_up = randn(130, 2 * 97, dtype=torch.bfloat16, device=device)
    alone, (q, scale) = lf.silu_and_mul(gate_up[:1]), lf.silu_and_mul_fp8(gate_up[:1])
    for rows in (2, 63, 130):
        assert torch.equal(lf.silu_and_mul(gate_up[:rows])[:1], alone)
        got_q, got_scale = lf.silu_and_mul_fp8(gate_up[:rows])
        assert torch.equal(bits(got_q[:1]), bits(q)) and torch.equal(got_scale[:1], scale)


@pytest.mark.parametrize("width", [64, 16500])
def test_f27_zeros_nan_and_f11_no_rows(width: int, device: torch.device) -> None:
    gate_up = randn(4, 2 * width, dtype=torch.bfloat16, device=device)
    assert lf.silu_and_mul(gate_up[:0]).shape == (0, width)
    assert lf.silu_and_mul_fp8(gate_up[:0])[1].shape == (0, 1)
    gate_up[1, :width] = 0
    gate_up[3, width + 5] = float("nan")
    q, scale = lf.silu_and_mul_fp8(gate_up)
    assert (q[1].float() == 0).all() and scale[1] > 0 and scale[:3].isfinite().all()
    assert q[3].float().isnan().all() and scale[3].isnan()
    assert not q[:3].float().isnan().any()


@pytest.mark.triton
@pytest.mark.parametrize("width", [64, 769, 16500])
def test_f33_every_configuration(width: int, device: torch.device) -> None:
    """Force each configuration into poisoned outputs. The first call equals the second (f32)."""
    gate_up = randn(5, 2 * width, dtype=torch.bfloat16, device=device)
    chip = common.chip_of(gate_up)
    want = lf.silu_and_mul(gate_up)
    want_q, want_scale = reference.quantize_fp8(want)
    for config in activation._tile_configs(chip):
        with common.force("silu_and_mul", config):
            out = torch.full_like(want, float("nan"))
            triton_backend.activation(out, gate_up)
            assert torch.equal(out, want), config
    configs = activation._fp8_configs(chip, width, 2)
    assert configs
    for config in configs:
        with common.force("silu_and_mul_fp8", config):
            for _ in range(2):
                q, scale = torch.full_like(bits(want_q), 0x7F), torch.full_like(want_scale, -1)
                triton_backend.activation(q.view(want_q.dtype), gate_up, scale)
                assert torch.equal(q, bits(want_q)) and torch.equal(scale, want_scale), config
