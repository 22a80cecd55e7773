"""Tests of silu_and_mul against the eager twin, over every 16-bit value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import cpu, reference

from ..support.tolerances import SILU_FP32_ULPS, ulps

HALVES = (torch.bfloat16, torch.float16)


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


@pytest.mark.parametrize("up", [1.0, 1.30078125])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value(dtype: torch.dtype, up: float, isa: str) -> None:
    """Compare silu of all 65,536 values. At most two differ, by a rounding tie that fp32's last bit
    decides. A factor shows that silu is rounded before it is multiplied."""
    gate = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    gate_up = torch.cat((gate, torch.full_like(gate, up)))[None]
    ours, eager = lf.silu_and_mul(gate_up)[0], reference.silu_and_mul(gate_up)[0]
    differ = ~same(ours, eager)
    assert differ.sum() <= 2
    assert ulps(ours[differ], eager[differ]) <= (1 if up == 1 else 2)  # multiplied and rounded


@pytest.mark.parametrize("width", [1, 7, 16, 31, 257, 1000])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_matches_eager(width: int, dtype: torch.dtype, isa: str) -> None:
    gate_up = torch.randn(5, 2 * width).mul(4).to(dtype)
    ours, eager = lf.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)
    limit = SILU_FP32_ULPS if dtype == torch.float32 else 2
    assert ulps(ours, eager) <= limit
    q, scale = lf.silu_and_mul_fp8(gate_up, scale_ub=1.0)
    want_q, want_scale = reference.quantize_fp8(ours, scale_ub=1.0)
    assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
    assert torch.equal(scale, want_scale)


def test_fp32_over_the_whole_range(isa: str) -> None:
    """Compare with torch where e^-x overflows, at infinities and NaN; elsewhere with fp64."""
    gate = torch.tensor(
        [-1e38, -100.0, -89.0, 0.0, 100.0, 1e38, *map(float, ("-inf", "inf", "nan"))]
    )
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    assert same(lf.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)).all()
    gate = torch.linspace(-85, 90, 100_003)
    exact = gate.double() / (1 + torch.exp(-gate.double()))
    ours = lf.silu_and_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    assert ulps(ours, exact) <= SILU_FP32_ULPS


def test_f30_f31_strides_and_canaries(isa: str) -> None:
    gate_up = torch.randn(3, 400).bfloat16()[:, 10 : 10 + 2 * 93]
    canary = torch.full((5, 93), 7.0, dtype=torch.bfloat16)
    cpu.activation(canary[1:4], gate_up, None, None)
    assert (canary[0] == 7).all() and (canary[4] == 7).all()
    assert torch.equal(canary[1:4], lf.silu_and_mul(gate_up.contiguous()))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("width", [4095, 4097, 4103, 8191])
def test_f30_the_end_of_a_row_cut_into_items(width: int, dtype: torch.dtype, isa: str) -> None:
    """Cut a wide row into several items of work. The last must stop at the row's end."""
    gate_up = torch.full((3, 2 * width), float("nan"), dtype=dtype)[:1]
    gate_up.copy_(torch.randn(1, 2 * width))
    canary = torch.full((3, width), 7.0, dtype=dtype)
    cpu.activation(canary[1:2], gate_up, None, None)
    assert (canary[0] == 7).all() and (canary[2] == 7).all()
    ours, eager = canary[1:2], reference.silu_and_mul(gate_up)
    assert ulps(ours, eager) <= (SILU_FP32_ULPS if dtype == torch.float32 else 2)


def test_f41_a_row_does_not_depend_on_the_batch(isa: str) -> None:
    gate_up = torch.randn(512, 2 * 97).bfloat16()
    alone = lf.silu_and_mul(gate_up[:1])
    for rows in (2, 255, 256, 512):
        assert torch.equal(lf.silu_and_mul(gate_up[:rows])[:1], alone)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 300),
    dtype=st.sampled_from([*HALVES, torch.float32]),
    scale=st.floats(0.01, 30),
)
def test_property(rows: int, width: int, dtype: torch.dtype, scale: float) -> None:
    gate_up = torch.randn(rows, 2 * width).mul(scale).to(dtype)
    ours, eager = lf.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)
    torch.testing.assert_close(ours, eager, rtol=4 * torch.finfo(dtype).eps, atol=1e-30)
