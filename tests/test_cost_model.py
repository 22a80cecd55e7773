"""The cost model against sums done by hand."""

from __future__ import annotations

import inspect

import pytest

from llama_fast.bench import cost_model, roofline, static_table
from llama_fast.bench.cost_model import predict
from llama_fast.bench.roofline import Gpu, Work, time

# 1 TB/s, 100 TFLOP/s, 10 SMs at 1 GHz: 160e9 exponentials and 1.28e12 instructions a second.
GPU = Gpu("round", 1e12, 100e12, 1e9, 10)


@pytest.fixture(autouse=True)
def constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """No static table, and round assumptions."""
    monkeypatch.setattr(static_table, "rows", lambda: [])
    monkeypatch.setattr(roofline, "LAUNCH", 1e-6)
    monkeypatch.setattr(roofline, "LATENCY", 1e-6)
    monkeypatch.setattr(cost_model, "SOFTMAX_OVERLAP", 0.5)
    monkeypatch.setattr(cost_model, "PROMOTION_OVERLAP", 0.5)
    monkeypatch.setattr(cost_model, "SCORE_FP32", 8.0)


def test_ceilings() -> None:
    assert GPU.fp8 == 200e12
    assert GPU.exponentials == 160e9
    assert GPU.fp32 == 1.28e12


def test_memory_bound() -> None:
    p = time("x", Work(bytes=9e6, flops=9e6), GPU)
    assert p.seconds == pytest.approx(10e-6)  # 9 us of bytes and a launch
    assert p.limit == "memory"
    assert p.share == pytest.approx(0.9)
    assert p.rate == pytest.approx(0.9e12)


def test_too_few_bytes_in_flight() -> None:
    """1e12 B/s x 1 us / 10 SMs are 100 kB an SM; two programs of 25 kB have half of that."""
    p = time("x", Work(bytes=9e6, per_sm=2, in_flight=25e3), GPU)
    assert p.parts["memory"] == pytest.approx(18e-6)
    assert time("x", Work(bytes=9e6, per_sm=5, in_flight=25e3), GPU).parts["memory"] == 9e-6


def test_matrix_and_arithmetic_overlap_in_part() -> None:
    work = Work(bytes=0, flops=1e9, executed=2e9, exponentials=0.8e6, fp32=6.4e6)
    p = time("x", work, GPU)  # 20 us of products, 5 + 5 us of arithmetic
    assert (p.parts["matrix"], p.parts["arithmetic"]) == pytest.approx((20e-6, 10e-6))
    assert p.seconds == pytest.approx(31e-6)
    assert p.limit == "matrix"
    assert p.share == pytest.approx(10 / 31)  # of what the useful flops would take
    half = time("x", Work(**{**vars(work), "overlap": 0.5}), GPU)
    assert half.seconds == pytest.approx(26e-6)


def test_the_last_round() -> None:
    """25 programs on 10 SMs with one each: two rounds and a half take three."""
    p = time("x", Work(bytes=10e6, programs=25), GPU)
    assert p.parts["last round"] == pytest.approx(2e-6)
    assert time("x", Work(bytes=10e6, programs=40, per_sm=2), GPU).parts["last round"] == 0


def test_norms() -> None:
    shape = {"rows": 1000, "hidden": 1000}
    assert predict("rms_norm", GPU, **shape).bytes == 4e6
    assert predict("add_rms_norm", GPU, **shape).bytes == 8e6
    assert predict("rms_norm_fp8", GPU, **shape).bytes == 3e6 + 4e3
    p = predict("rms_norm_fp8", GPU, **shape, residual=True)
    assert p.bytes == 7e6 + 4e3
    assert p.limit == "arithmetic"  # 25e6 / 1.28e12: this GPU is slow at that
    assert p.seconds == pytest.approx(25e6 / 1.28e12 + 1e-6)


def test_activations_and_quantisers() -> None:
    p = predict("silu_and_mul", GPU, rows=100, inner=1000)
    assert p.bytes == 6e5
    assert p.parts["arithmetic"] == pytest.approx(1e5 / 160e9 + 20e5 / 1.28e12)
    assert predict("silu_and_mul_fp8", GPU, rows=100, inner=1000).bytes == 5e5 + 400
    assert predict("quantize_fp8", GPU, rows=100, hidden=1000).bytes == 3e5 + 400


def test_rope() -> None:
    shape = {"tokens": 10, "heads": 4, "kv_heads": 2, "d": 100}
    assert predict("apply_rope", GPU, **shape).bytes == 4 * 10 * 6 * 100 + 4 * 10 * 100
    assert predict("apply_rope_and_append", GPU, **shape).bytes == 4 * 10 * 8 * 100 + 4 * 10 * 100


HEADS = {"heads": 4, "kv_heads": 2, "d": 64}


def test_attention_without_a_mask() -> None:
    p = predict("attention", GPU, batch=2, seqlen_q=256, seqlen_k=300, causal=False, **HEADS)
    assert p.flops == 4 * 64 * 2 * 4 * 256 * 300
    assert p.bytes == 2 * 2 * 64 * (2 * 256 * 4 + 2 * 300 * 2)
    scores = 2 * 4 * 256 * 384  # keys in tiles of 128
    assert p.parts["matrix"] == pytest.approx(4 * 64 * scores / 100e12)
    assert p.parts["arithmetic"] == pytest.approx(scores / 160e9 + 8 * scores / 1.28e12)
    assert p.parts["last round"] == pytest.approx(  # 16 tiles on 10 SMs
        (p.parts["arithmetic"] + 0.5 * p.parts["matrix"]) * (2 / 1.6 - 1)
    )


def test_causal_attention() -> None:
    """256 queries: each tile of 128 sees the tiles up to its own; query i sees i + 1 keys."""
    p = predict("attention", GPU, batch=1, seqlen_q=256, seqlen_k=256, **HEADS)
    assert p.flops == 4 * 64 * 4 * 256 * 257 / 2
    assert p.parts["matrix"] == pytest.approx(4 * 64 * 4 * 128 * (128 + 256) / 100e12)
    ahead = predict("attention", GPU, batch=1, seqlen_q=128, seqlen_k=256, **HEADS)
    assert ahead.parts["matrix"] == pytest.approx(4 * 64 * 4 * 128 * 256 / 100e12)


def test_decode() -> None:
    p = predict("attention_with_kvcache", GPU, batch=2, seqlen_q=1, seqlen_k=1000, **HEADS)
    assert p.bytes == 2 * 2 * 2 * 1000 * 2 * 64 + 4 * 2 * 4 * 64
    assert p.parts["launch"] == 2e-6
    rows = 2 * 2 * 16 * 1000  # two heads share a tile of 16 rows
    assert p.parts["matrix"] == pytest.approx(4 * 64 * rows / 100e12)
    half = predict(
        "attention_with_kvcache", GPU, batch=2, seqlen_q=1, seqlen_k=1000, cache_bytes=1, **HEADS
    )
    assert half.bytes == 2 * 2 * 1000 * 2 * 64 + 4 * 2 * 4 * 64
    many = predict("attention_with_kvcache", GPU, batch=1, seqlen_q=256, seqlen_k=256, **HEADS)
    assert (
        many.flops == predict("attention", GPU, batch=1, seqlen_q=256, seqlen_k=256, **HEADS).flops
    )


def test_products() -> None:
    p = predict("fp8_gemm", GPU, m=1000, n=1000, k=1280)
    assert p.bytes == 2 * 1000 * 1280 + 2 * 1000 * 1000
    assert p.flops == 2 * 1000 * 1000 * 1280
    tiles = 8 * 4  # of 128 x 256
    assert p.parts["matrix"] == pytest.approx(2 * tiles * 128 * 256 * 1280 / 200e12)
    assert p.parts["arithmetic"] == pytest.approx(1000 * 1000 * 10 / 1.28e12)
    assert p.parts["last round"] == pytest.approx(
        (p.parts["matrix"] + 0.5 * p.parts["arithmetic"]) * (4 / 3.2 - 1)
    )


def test_few_rows_stream_the_weight() -> None:
    p = predict("fp8_linear", GPU, m=1, n=4096, k=4096)
    assert p.bytes == 4096 * 4096 + 2 * 4096 + 2 * 4096
    assert p.limit == "memory"
    assert predict("linear", GPU, m=1, n=4096, k=4096).bytes == 2 * 4096 * 4096 + 4 * 4096


def test_quantising_comes_on_top() -> None:
    shape = {"m": 1024, "n": 1024, "k": 1024}
    both = predict("fp8_linear", GPU, **shape, quantised=True)
    alone = predict("fp8_gemm", GPU, **shape)
    quantise = predict("quantize_fp8", GPU, rows=1024, hidden=1024)
    assert both.seconds == pytest.approx(alone.seconds + quantise.seconds)
    assert both.share < alone.share
    assert (both.op, both.limit) == ("fp8_gemm", alone.limit)


def test_the_static_table_gives_tiles_and_residency(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "arch": "sm_90",
        "kernel": "_gemm",
        "config_index": 0,
        "cases": ["8192^3"],
        "config": "BLOCK_M=64 BLOCK_N=64 warps=4 stages=3",
        "facts": {"shared": 5000},
        "occupancy": {"blocks": 2},
    }
    others = [{**row, "arch": "sm_80"}, {**row, "config_index": 1}, {**row, "cases": ["other"]}]
    monkeypatch.setattr(static_table, "rows", lambda: [*others, row])
    found = static_table.resident("_gemm", "8192^3")
    assert (found.blocks, found.shared, found.constants["BLOCK_M"]) == (2, 5000, 64)
    assert found.in_flight(100) == 5000
    assert static_table.Resident().in_flight(100) == float("inf")
    p = predict("fp8_gemm", GPU, m=65, n=64, k=128)
    assert p.parts["matrix"] == pytest.approx(2 * 128 * 64 * 128 / 200e12)


def test_unknown_ops_and_shapes() -> None:
    with pytest.raises(ValueError, match="op: got 'fly'"):
        predict("fly")
    with pytest.raises(TypeError):
        predict("rms_norm", rows=1)


def test_more_work_never_takes_less_time() -> None:
    for n in (1, 16, 64, 65, 128, 129, 1024):
        less, more = (predict("fp8_gemm", GPU, m=m, n=4096, k=4096).seconds for m in (n, 2 * n))
        assert more >= 0.99 * less


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_model.main(["--gpu", "H100"]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out
    assert len(out.splitlines()) == 2 + len(cost_model.ROWS) + 2


def test_every_op_names_its_shape() -> None:
    """What the GPU report passes by name."""
    for op, work in cost_model._OPS.items():
        names = set(inspect.signature(work).parameters) - {"op"}
        assert names & {"rows", "tokens", "batch", "m"}, op
