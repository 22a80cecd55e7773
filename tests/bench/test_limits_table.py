"""Tests of the cases' bytes and operations against sums worked out by hand, and of the least times
that chips need for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_fast.bench import cases, limits_table
from llama_fast.bench.cases.shapes import Shapes, Sweep
from llama_fast.plan.gpus import Gpu

CHIP = Gpu("chip", 1.0, bandwidth=1.0, bf16=100.0, fp8=200.0)
SHAPES = Shapes(hidden=1000, inner=2000, heads=4, kv_heads=2, head_dim=96)
SWEEP = Sweep((10,), (256,), ((2, 1000),), (10, 100), ("gate_up",), (4, 1000), True)


def test_bytes_and_flops() -> None:
    spec = cases.Spec(SHAPES, SWEEP, cases.spec("tiny").dtype)
    found = {f"{p.op} {p.shape.split(', ')[0]}": p for p in cases.plan(spec, every=True)}
    assert found["rms_norm 10 x 1000"].bytes == 40_000
    assert found["add_rms_norm 10 x 1000"].bytes == 80_000
    assert found["rms_norm_fp8 10 x 1000 + residual"].bytes == 70_000
    assert found["silu_and_mul 10 x 2*2000"].bytes == 120_000
    assert found["silu_and_mul_fp8 10 x 2*2000"].bytes == 100_000
    assert found["quantize_fp8 10 x 1000 by row"].bytes == 30_000
    assert found["apply_rope 10 x 4/2 x 96"].bytes == 4 * 10 * 6 * 96
    assert found["apply_rope_and_append 10 x 4/2 x 96"].bytes == 4 * 10 * 8 * 96
    causal, full = (found[f"attention {kind} 256"] for kind in ("causal", "full"))
    assert causal.flops == 4 * 96 * 4 * 256 * 256 / 2 and full.flops == 2 * causal.flops
    assert causal.bytes == 2 * 96 * (2 * 256 * 4 + 2 * 256 * 2)
    packed = found["attention packed 256"]  # 16, 48, 64 and 128 tokens
    assert packed.flops == 4 * 96 * 4 * (16**2 + 48**2 + 64**2 + 128**2) / 2
    plans = {p.shape: p for p in cases.plan(spec, ["attention_with_kvcache"])}
    decode = plans["2 x 1 query, 1000 keys, 4/2 x 96"]
    assert decode.bytes == 2 * 2 * 2 * 1000 * 2 * 96
    assert decode.flops == 4 * 96 * 2 * 4 * 1000
    assert plans["2 x 1 query, 1000 keys, FP8 cache, 4/2 x 96"].bytes == decode.bytes / 2
    chunk = plans["4 queries, 1000 keys, paged, 4/2 x 96"]
    assert chunk.flops == 4 * 96 * 4 * (997 + 998 + 999 + 1000)
    linear, weight_only = found["linear M=10"], found["fp8_linear M=10"]
    assert linear.bytes == 2 * 4000 * 1000 and linear.flops == 2 * 10 * 4000 * 1000
    assert weight_only.bytes == 4000 * 1000 + 2 * 10 * 1000 + 2 * 10 * 4000
    assert found["fp8_gemm M=100"].bytes == 4000 * 1000 + 100 * 1000 + 2 * 100 * 4000


@pytest.mark.parametrize(
    ("work", "chip", "wanted"),
    [
        (("", 9e6, 0), CHIP, (9.0, "memory")),
        (("", 0, 1e9), CHIP, (10.0, "compute")),
        (("fp8_gemm", 0, 1e9), CHIP, (5.0, "compute")),
        (("fp8_gemm", 0, 1e9), replace(CHIP, fp8=0), (10.0, "compute")),
    ],
)
def test_time(work: tuple[str, float, float], chip: Gpu, wanted: tuple[float, str]) -> None:
    assert limits_table.microseconds(chip, *work) == wanted


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert limits_table.main(["--chip", "a100-80", "--model", "70b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "a100-80" in lines[0] and lines[-1].startswith("linear ") and " compute" in lines[-2]
