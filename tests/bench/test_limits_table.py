"""Tests of the limits table against sums worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

import llama_fast as lf
from llama_fast.bench import limits_table
from llama_fast.bench.limits_table import Chip, Work

CONFIG = dataclasses.replace(
    lf.LlamaConfig.llama_3_1_8b(),
    hidden_size=1000,
    intermediate_size=2000,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=96,
)
CHIP = Chip(1.0, 100.0, 200.0)


def test_bytes_and_flops() -> None:
    found = {w.op: w for w in limits_table.elementwise(CONFIG, 10)}
    assert found["add_rms_norm"].bytes == 80_000
    assert found["rms_norm_fp8 + residual"].bytes == 70_040
    assert found["silu_and_mul"].bytes == 120_000
    assert found["apply_rope"].bytes == 4 * 10 * 6 * 96 + 4 * 10 * 96
    assert found["apply_rope_and_append"].bytes == 4 * 10 * 8 * 96 + 4 * 10 * 96
    causal = limits_table.attention(CONFIG, 1, 256, 256)
    assert causal.flops == 4 * 96 * 4 * 256 * 257 / 2
    assert causal.bytes == 2 * 96 * (2 * 256 * 4 + 2 * 256 * 2)
    decode = limits_table.attention(CONFIG, 2, 1, 1000, 1)
    assert decode.bytes == 2 * 2 * 1000 * 2 * 96 + 4 * 2 * 4 * 96
    assert decode.flops == 4 * 96 * 2 * 4 * 1000
    linear, weight_only, gemm = limits_table.products(CONFIG, 10)
    assert linear.bytes == 2 * 4000 * 1000 + 2 * 10 * 1000 + 2 * 10 * 4000
    assert linear.bytes - weight_only.bytes == 4000 * 1000
    assert weight_only.bytes - gemm.bytes == 10 * 1000
    assert gemm.flops == 2 * 10 * 4000 * 1000 and gemm.fp8 and not weight_only.fp8


@pytest.mark.parametrize(
    ("work", "chip", "wanted"),
    [
        (Work("", "", 9e6, 0), CHIP, (9.0, "memory")),
        (Work("", "", 0, 1e9), CHIP, (10.0, "compute")),
        (Work("", "", 0, 1e9, True), CHIP, (5.0, "compute")),
        (Work("", "", 0, 1e9, True), CHIP._replace(fp8=0), (10.0, "compute")),
    ],
)
def test_time(work: Work, chip: Chip, wanted: tuple[float, str]) -> None:
    assert work.microseconds(chip) == wanted


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert limits_table.main(["--chip", "A100", "--model", "70b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "A100" in lines[0] and "fp8_gemm" in lines[-1] and " compute" in lines[-1]
