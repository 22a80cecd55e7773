"""Tests of the Triton rms_norm against the eager twin: widths, strides, batches, magnitudes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference, triton_backend
from llama_fast.kernels import common, rms_norm

from ..support.tolerances import RMS_NORM_ULPS, ulps
from .conftest import launcher

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HIDDEN = (1, 7, 33, 64, 769, 4096, 5125, 16384, 20001)  # 20001 goes in pieces


def make(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    x, residual = torch.randn(2, rows, hidden).to(dtype).to(device)
    return x, residual, torch.randn(hidden).to(dtype).to(device)


def fenced(rows: Tensor, columns: int = 3) -> Tensor:
    """Return the same rows with NaN before, after and between them."""
    n, hidden = rows.shape
    memory = torch.full((n + 2, hidden + columns), float("nan"), dtype=rows.dtype)
    memory = memory.to(rows.device)
    view = memory[1:-1, columns - 1 : columns - 1 + hidden]
    return view.copy_(rows)


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_matches_eager(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare with eager. Fusing changes no bit of the sum, its norm or the quantized norm."""
    x, residual, w = make(3, hidden, dtype, device)
    normed, total = lf.add_rms_norm(x, residual, w)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, lf.rms_norm(total, w))
    assert ulps(normed, reference.rms_norm(total, w)) <= RMS_NORM_ULPS[dtype]
    for bound in (None, 0.5):
        q, scale, same_total = lf.rms_norm_fp8(x, w, residual=residual, scale_ub=bound)
        want_q, want_scale = reference.quantize_fp8(normed, scale_ub=bound)
        assert torch.equal(bits(q), bits(want_q))
        assert torch.equal(scale, want_scale) and torch.equal(same_total, total)
        alone = lf.rms_norm_fp8(total, w, scale_ub=bound)
        assert torch.equal(bits(alone[0]), bits(q)) and torch.equal(alone[1], scale)


@pytest.mark.parametrize("hidden", [8, 769, 3584, 20001])
def test_f29_f31_offsets_and_strides(hidden: int, device: torch.device) -> None:
    """Use storage one element off alignment, NaN between rows, and a stride per argument."""
    x, residual, w = make(5, hidden, torch.bfloat16, device)
    off = torch.cat((w[:1], w))[1:]
    want = lf.add_rms_norm(x, residual, w)
    got = lf.add_rms_norm(fenced(x, 3), fenced(residual, 8), off)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    cube = x.view(5, 1, hidden).transpose(0, 1)
    assert torch.equal(lf.rms_norm(cube, w)[0], lf.rms_norm(x, w))


@pytest.mark.parametrize("hidden", [1, 769, 5125, 20001])
def test_f30_odd_width_leaves_neighbors_alone(hidden: int, device: torch.device) -> None:
    x, residual, w = make(3, hidden, torch.bfloat16, device)
    out, total = torch.full((2, 5, hidden), 7.0, dtype=x.dtype, device=device)
    q, scale = torch.full_like(out, 7, dtype=torch.uint8), torch.full((5, 1), 7.0, device=device)
    launcher("rms_norm").rms_norm(out[1:4], x, w, 1e-5, residual, total[1:4], None, None)
    codes = q[1:4].view(torch.float8_e4m3fn)
    launcher("rms_norm").rms_norm(codes, x, w, 1e-5, None, None, scale[1:4], None)
    for t in (out, total, q, scale):
        assert (t[[0, 4]] == 7).all() and not (t[1:4] == 7).all()


def test_f02_rows_past_2_to_31(device: torch.device) -> None:
    """Use a stride that fits 32 bits but not times row 2, and one that itself does not fit. On a
    CPU untouched pages cost nothing."""
    memory = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)
    w = torch.ones(64, dtype=torch.bfloat16, device=device)
    for n, stride in ((3, 2**30 + 64), (2, 2**31 + 64)):
        rows = torch.randn(n, 64).bfloat16().to(device)
        x = memory.as_strided((n, 64), (stride, 1)).copy_(rows)
        assert torch.equal(lf.rms_norm(x, w), lf.rms_norm(rows, w))


@pytest.mark.gpu
@pytest.mark.big
def test_f01_more_than_2_to_31_elements(device: torch.device) -> None:
    """Write outputs past 2^31 elements. One row stands for all."""
    hidden = 4096
    rows = 2**31 // hidden + 3
    x, _, w = make(1, hidden, torch.bfloat16, device)
    q, scale = lf.rms_norm_fp8(x.expand(rows, hidden), w)
    want_q, want_scale = lf.rms_norm_fp8(x, w)
    for row in (0, rows - 5, rows - 4, rows - 3, rows - 1):
        assert torch.equal(bits(q[row]), bits(want_q[0])), row
        assert torch.equal(scale[row], want_scale[0])


@pytest.mark.parametrize("hidden", [64, 769, 20001])
def test_f41_a_row_does_not_depend_on_the_batch(hidden: int, device: torch.device) -> None:
    many = 512 if device.type == "cuda" else {64: 130, 769: 40, 20001: 10}[hidden]
    x, residual, w = make(many, hidden, torch.bfloat16, device)
    alone = [lf.rms_norm_fp8(x[i : i + 1], w, residual=residual[i : i + 1]) for i in (0, 1)]
    for rows in {2, many // 2 - 1, many // 2, many}:
        batch = lf.rms_norm_fp8(x[:rows], w, residual=residual[:rows])
        for i in (0, 1):
            for a, b in zip(batch, alone[i], strict=True):
                assert torch.equal(bits(a[i : i + 1]), bits(b))


@pytest.mark.parametrize("value", [1e3, 1e4, 6e4])
def test_f48_large_fp16(value: float, device: torch.device) -> None:
    """Let the sum of squares pass fp16's 65504 by far. The kernel keeps it in fp32."""
    x = torch.full((2, 4096), value, dtype=torch.float16, device=device)
    w = torch.ones(4096, dtype=torch.float16, device=device)
    assert torch.equal(lf.rms_norm(x, w), torch.ones_like(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("hidden", [100, 20001])
def test_nan_stays_in_its_row(hidden: int, bad: float, device: torch.device) -> None:
    x, _, w = make(3, hidden, torch.bfloat16, device)
    clean = lf.rms_norm(x, w)
    x[1, 37] = bad
    out, (q, scale) = lf.rms_norm(x, w), lf.rms_norm_fp8(x, w)
    assert out[1, 37].isnan() and torch.equal(out[[0, 2]], clean[[0, 2]])
    assert q[1].float().isnan().all() and scale[1].isnan()
    assert not q[[0, 2]].float().isnan().any() and not scale[[0, 2]].isnan().any()


def test_f27_zero_rows_and_f11_no_rows(device: torch.device) -> None:
    x, _, w = make(3, 256, torch.bfloat16, device)
    assert lf.rms_norm(x[:0], w).shape == (0, 256)
    q, scale = lf.rms_norm_fp8(x[:0], w)
    assert q.shape == (0, 256) and scale.shape == (0, 1)
    x[1] = 0
    q, scale = lf.rms_norm_fp8(x, w)
    assert (q[1].float() == 0).all() and scale[1] > 0 and scale.isfinite().all()
    assert not q.float().isnan().any()


@pytest.mark.triton
@pytest.mark.parametrize("hidden", [64, 769, 4096, 20001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_f33_every_configuration(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """Force each configuration into poisoned outputs. The first call equals the second (f32)."""
    rows = 3 if hidden > 16384 else 7
    x, residual, w = make(rows, hidden, dtype, device)
    eager, total = reference.add_rms_norm(x, residual, w)
    configs = rms_norm._configs(common.chip_of(x), hidden, x.element_size())
    assert configs
    for config in configs:
        with common.force("rms_norm", config):
            for _ in range(2):
                out, kept = torch.full((2, rows, hidden), float("nan"), dtype=dtype, device=device)
                triton_backend.rms_norm(out, x, w, 1e-5, residual, kept)
                assert ulps(out, eager) <= RMS_NORM_ULPS[dtype], config
                assert torch.equal(kept, total), config
                q, scale = lf.rms_norm_fp8(x, w)
                want, want_scale = reference.quantize_fp8(lf.rms_norm(x, w))
                assert torch.equal(bits(q), bits(want)) and torch.equal(scale, want_scale), config
