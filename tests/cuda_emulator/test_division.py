"""Tests of quotients computed without nvcc's division: they must have the bits of a division."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from .native import emulated


@pytest.fixture
def cuda() -> Any:
    return emulated()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_silu_of_every_16_bit_value(cuda: Any, dtype: torch.dtype) -> None:
    """Compute g / (1 + 2^(-g log2(e))) in fp32. The emulator's reciprocals are off by an ulp."""
    gate = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(1, 65536, dtype=dtype)
    cuda.activation(out, torch.cat((gate, torch.ones_like(gate)))[None], None, None)
    g = gate.float()
    want = (g / (1 + torch.exp2((g * -1.44269504).double()).float())).to(dtype)
    assert ((out[0] == want) | (out[0].isnan() & want.isnan())).all()
    assert torch.equal(out[0].signbit() & ~out[0].isnan(), want.signbit() & ~want.isnan())


def test_fp32_silu(cuda: Any) -> None:
    """Compute g / (1 + e^-g) with the C library's exponential, including subnormal quotients."""
    g = torch.cat((torch.linspace(-89, 30, 50_003), torch.linspace(-1e-37, 1e-37, 2001)))
    out = torch.empty(1, len(g))
    cuda.activation(out, torch.cat((g, torch.ones_like(g)))[None], None, None)
    expf = ctypes.CDLL("libm.so.6").expf
    expf.argtypes, expf.restype = [ctypes.c_float], ctypes.c_float
    assert torch.equal(out[0], g / (1 + torch.tensor([expf(-x) for x in g.tolist()])))
