"""Tests of csrc/cpu/simd.h's conversions against torch's, through ops that do little else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

HALVES = (torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Require the same bits. NaN may carry any payload; zeros must agree in sign."""
    integer = torch.int16 if actual.itemsize == 2 else torch.int32
    same = actual.view(integer) == expected.view(integer)
    same |= actual.isnan() & expected.isnan()
    at = (~same).nonzero()[:4].tolist()
    assert same.all(), f"{(~same).sum()} differ, the first at {at}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [4096, 37], ids=["vectors", "tails"])
def test_f37_every_value_survives_load_and_store(width: int, dtype: torch.dtype, isa: str) -> None:
    """Add -0, which changes nothing. The bf16 instruction alone would turn denormals into zeros."""
    x = every_value(dtype)
    x = torch.cat((x, x[: -len(x) % width])).view(-1, width)
    _, total = lf.add_rms_norm(x, torch.full_like(x, -0.0), torch.ones_like(x[0]))
    assert_same_bits(total, x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("addend", [1.0, -3.0, 2.0**-14, 3 * 2.0**-24, 6e4, 3e38, 2.0**-130])
def test_f37_every_value_plus_a_constant(addend: float, dtype: torch.dtype, isa: str) -> None:
    """Round fp32 sums with few significant bits: ties, overflow and cancellation."""
    x = every_value(dtype).view(16, 4096)
    residual = torch.tensor(addend).to(dtype).expand_as(x).contiguous()
    _, total = lf.add_rms_norm(x, residual, torch.ones_like(x[0]))
    assert_same_bits(total, x + residual)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_f37_every_value_times_fp32(interleaved: bool, dtype: torch.dtype, isa: str) -> None:
    """Round full fp32 significands of every size, down to the smallest results, to 16 bits."""
    q = every_value(dtype).view(64, 8, 128)
    table = torch.randn(64, 128) * torch.exp2(-torch.arange(64.0))[:, None]
    positions = torch.arange(64)
    ours = lf.apply_rope(q, q, positions, table, interleaved=interleaved)
    eager = reference.apply_rope(q, q, positions, table, interleaved=interleaved)
    for a, b in zip(ours, eager, strict=True):
        assert_same_bits(a, b)


def test_f38_every_e4m3_tie_and_its_neighbors(isa: str) -> None:
    """Check all 126 midpoints between neighboring magnitudes, and the fp32 values next to each."""
    magnitudes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    low, high = magnitudes[:-1], magnitudes[1:]
    ties = (low + high) / 2
    below, above = torch.nextafter(ties, low), torch.nextafter(ties, high)
    codes = torch.arange(126, dtype=torch.uint8)
    want = torch.cat((codes + codes % 2, codes, codes + 1))  # a tie goes to the even code
    x = torch.cat((ties, below, above))
    q, scale = lf.quantize_fp8(torch.cat((x, -x, torch.full((1,), 448.0)))[None])
    assert scale.item() == 1.0
    assert torch.equal(q.view(torch.uint8)[0, :-1], torch.cat((want, want + 128)))


@pytest.fixture
def flushed() -> Iterator[None]:
    """Flush denormals to zero, both operands and results, as another library may have set."""
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("count", [1, 2], ids=["one_thread", "two_threads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_denormals_count_where_a_thread_flushes_them(
    dtype: torch.dtype, count: int, isa: str, threads: None, request: pytest.FixtureRequest
) -> None:
    torch.set_num_threads(count)
    x, residual = (torch.randn(2, 64, 4096) * 1e-38).to(dtype)
    q = x.view(-1, 32, 128)[:64]
    keys, values = (t.view(1, -1, 2, 128)[:, :999] for t in (torch.randn_like(x), x))
    table, positions = lf.rope_table(1e4, 64, head_dim=128), torch.arange(64)
    lengths = torch.tensor([999], dtype=torch.int32)
    ops: list[Callable[[], Any]] = [
        lambda: lf.add_rms_norm(x, residual, torch.ones_like(x[0])),
        lambda: lf.rms_norm_fp8(x, torch.ones_like(x[0])),
        lambda: lf.silu_and_mul(x),
        lambda: lf.quantize_fp8(x),
        lambda: lf.quantize_fp8(torch.zeros_like(x), "tensor"),
        lambda: lf.quantize_fp8(x, "block"),
        lambda: lf.apply_rope(q, q, positions, table),
        lambda: lf.attention(keys[:, :99], keys, values),
        lambda: lf.attention_with_kvcache(keys[:, :1], keys, values, lengths),
        lambda: lf.linear(values[0, :9, 0], torch.eye(128, dtype=dtype)),
    ]
    want = [op() for op in ops]
    request.getfixturevalue("flushed")
    for i, op in enumerate(ops):
        got, expected = (t if isinstance(t, tuple) else (t,) for t in (op(), want[i]))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), i
