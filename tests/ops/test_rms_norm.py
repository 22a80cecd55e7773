"""Tests of rms_norm, add_rms_norm and rms_norm_fp8 against the eager twin and fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import cpu, reference

from ..support.tolerances import RMS_NORM_ULPS, ulps

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HIDDEN = (1, 7, 16, 33, 769, 3584, 4096, 5125)


def make(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = torch.randn(2, rows, hidden).to(dtype)
    return x, residual, torch.randn(hidden).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_f29_any_width_and_offset(hidden: int, dtype: torch.dtype, isa: str) -> None:
    """Use odd widths and storage one element off any vector's alignment."""
    memory = torch.randn(1 + 5 * hidden).to(dtype)
    x, w = memory[1:].view(5, hidden), torch.randn(hidden + 1).to(dtype)[1:]
    assert ulps(lf.rms_norm(x, w), reference.rms_norm(x, w)) <= RMS_NORM_ULPS[dtype]
    assert ulps(lf.rms_norm(x[1:], w), reference.rms_norm(x[1:], w)) <= RMS_NORM_ULPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_residual_and_fp8_are_the_unfused_ops(hidden: int, dtype: torch.dtype, isa: str) -> None:
    """Require that fusing changes no bit: the sum, its norm, and the quantized norm."""
    x, residual, w = make(5, hidden, dtype)
    normed, total = lf.add_rms_norm(x, residual, w)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, lf.rms_norm(total, w))
    for bound in (None, 0.5):
        q, scale = lf.rms_norm_fp8(total, w, scale_ub=bound)
        want_q, want_scale = reference.quantize_fp8(normed, scale_ub=bound)
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
        assert torch.equal(scale, want_scale)
        fused = lf.rms_norm_fp8(x, w, residual=residual, scale_ub=bound)
        for a, b in zip(fused, (q, scale, total), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_f30_odd_width_leaves_neighbors_alone(isa: str) -> None:
    for hidden in (769, 5125):
        x, _, w = make(3, hidden, torch.bfloat16)
        canary = torch.full((5, hidden), 7.0, dtype=torch.bfloat16)
        cpu.rms_norm(canary[1:4], x, w, 1e-5, None, None, None, None)
        assert (canary[0] == 7).all() and (canary[4] == 7).all()
        assert torch.equal(canary[1:4], lf.rms_norm(x, w))


def test_f31_strides(isa: str) -> None:
    fused = torch.randn(6, 3 * 96).bfloat16()
    x, residual = fused[:, 96:192], torch.randn(12, 200).bfloat16()[::2, :96]
    w = torch.randn(96).bfloat16()
    ours = lf.add_rms_norm(x, residual, w)
    dense = lf.add_rms_norm(x.contiguous(), residual.contiguous(), w)
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))
    cube = torch.randn(4, 5, 96).bfloat16().transpose(0, 1)
    assert torch.equal(lf.rms_norm(cube, w), lf.rms_norm(cube.contiguous(), w))


def test_f02_row_stride_past_2_to_31(isa: str) -> None:
    """Put two rows 2^31 + 64 elements apart. Untouched pages cost nothing."""
    stride = 2**31 + 64
    memory = torch.empty(stride + 64, dtype=torch.bfloat16)
    x = memory.as_strided((2, 64), (stride, 1))
    rows = torch.randn(2, 64).bfloat16()
    x.copy_(rows)
    w = torch.ones(64, dtype=torch.bfloat16)
    assert torch.equal(lf.rms_norm(x, w), lf.rms_norm(rows, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f41_a_row_does_not_depend_on_the_batch(
    dtype: torch.dtype, isa: str, threads: None
) -> None:
    x, residual, w = make(512, 769, dtype)
    torch.set_num_threads(1)
    alone = [lf.rms_norm_fp8(x[i : i + 1], w, residual=residual[i : i + 1]) for i in (0, 1)]
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in (2, 255, 256, 512):
            batch = lf.rms_norm_fp8(x[:rows], w, residual=residual[:rows])
            for i in (0, 1):
                for a, b in zip(batch, alone[i], strict=True):
                    assert torch.equal(a[i : i + 1].view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("value", [1e3, 1e4, 6e4])
def test_f48_large_fp16(value: float, isa: str) -> None:
    """Let the sum of squares pass fp16's 65504 by far. The kernel keeps it in fp32."""
    x = torch.full((2, 4096), value, dtype=torch.float16)
    w = torch.ones(4096, dtype=torch.float16)
    assert torch.equal(lf.rms_norm(x, w), torch.ones_like(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(bad: float, isa: str) -> None:
    x, _, w = make(3, 100, torch.bfloat16)
    clean = lf.rms_norm(x, w)
    x[1, 37] = bad
    out, (q, scale) = lf.rms_norm(x, w), lf.rms_norm_fp8(x, w)
    assert out[1, 37].isnan() and torch.equal(out[[0, 2]], clean[[0, 2]])
    assert q[1].float().isnan().all() and scale[1].isnan()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9),
    hidden=st.integers(1, 600),
    extra=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.floats(-18, 4),
)
def test_property(rows: int, hidden: int, extra: int, dtype: torch.dtype, magnitude: float) -> None:
    x = (torch.randn(rows, hidden + extra) * 2.0**magnitude).to(dtype)[:, :hidden]
    w = torch.randn(hidden).to(dtype)
    assert ulps(lf.rms_norm(x, w), reference.rms_norm(x, w)) <= RMS_NORM_ULPS[dtype]
