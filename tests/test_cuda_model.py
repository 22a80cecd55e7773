"""The CUDA kernels' cost model: sums done by hand, and the sources that it speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llama_fast.bench import cuda_model
from llama_fast.bench.cuda_model import KERNELS, Kernel, most_splits, splits_of
from llama_fast.bench.roofline import H100, H200, Gpu, Work, time

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
# 1 TB/s, 100 TFLOP/s, 10 SMs at 1 GHz.
GPU = Gpu("round", 1e12, 100e12, 1e9, 10)


def constants(file: str) -> dict[str, int]:
    """constexpr ints of a source that are plain numbers."""
    declared = re.findall(r"constexpr int ([^;]*);", (CUDA / file).read_text())
    pairs = re.findall(r"(\w+) = (\d+)\b(?!\s*[*/+])", ", ".join(declared))
    return {name: int(value) for name, value in pairs}


def named(file: str, case: str = "") -> Kernel:
    return next(k for k in KERNELS if k.file == file and case in k.case)


def test_docs_have_the_table() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    table = re.search(r"<!-- cuda model:begin -->\n(.*)<!-- cuda model:end -->", text, re.S)
    assert table is not None
    assert table[1].strip() == cuda_model.markdown(), (
        "python -m bench.cost_model --write docs/kernels.md"
    )


def test_every_source_has_a_row_and_a_section() -> None:
    sources = {path.name for path in CUDA.glob("*.cu")}
    assert {k.file for k in KERNELS} == sources
    docs = (ROOT / "docs" / "kernels.md").read_text().split("# CUDA\n")[1]
    assert all(f"## {name}: " in docs for name in sources)


def test_shared_memory_is_what_the_sources_ask_for() -> None:
    c = constants("attention_sm90.cu")
    stages, row = c["kStages"], 128 * 2
    tiles = 2 * c["kQueries"] * row + 2 * stages * c["kKeys"] * row
    assert named("attention_sm90.cu").shared == tiles + 8 * (2 + 4 * stages)
    c = constants("linear_sm90.cu")
    loaded = c["kStages"] * (c["kM"] + 256) * c["kK"]
    out = 2 * 2 * c["kRowsEach"] * 128
    barriers = 8 * 2 * (c["kStages"] + 1)
    for case, scales in (("rows", c["kM"] + 256), ("blocks", c["kStages"] * (c["kM"] + 2))):
        shared = loaded + out + 4 * scales + 2 * 256 + barriers
        assert named("linear_sm90.cu", case).shared == shared
    c = constants("linear.cu")
    stages = c["kWarps"] * c["kStages"] * c["kFeatures"] * c["kScaleBlock"]
    assert named("linear.cu").shared == stages
    assert named("linear.cu").in_flight == stages * (c["kStages"] - 1) // c["kStages"]
    assert named("linear.cu").threads == 32 * c["kWarps"]


def test_blocks_of_a_multiprocessor() -> None:
    """By hand: 65,536 registers in units of 256 a warp, 228 KiB of shared memory."""
    expected = {
        "rms_norm.cu": 5,  # 48 registers: 10 warps a quarter, 8 a block
        "rope.cu": 9,
        "attention.cu": 2,
        "attention_sm90.cu": 1,
        "decode_attention.cu": 2,
        "linear.cu": 2,
        "linear_sm90.cu": 1,
    }
    assert {file: named(file).blocks for file in expected} == expected


def test_splits() -> None:
    """As decode_attention.cu has it: of eight key/value heads and 264 slots, 32 splits fill 256."""
    assert most_splits(8, 264) == 32
    assert most_splits(3, 6) == 2
    assert [splits_of(n, 32) for n in (1, 255, 512, 1024, 4096, 8192, 131072)] == [
        1, 1, 4, 8, 8, 16, 32,
    ]  # fmt: skip


def test_shared_memory_and_mma_sync_bound() -> None:
    work = Work(bytes=0, flops=1e9, executed=1e9, shared=1.28e9 * 20e-6 * 1e3)
    assert time("x", work, GPU).parts["shared memory"] == pytest.approx(20e-6)
    assert time("x", work, GPU).limit == "shared memory"
    half = Work(bytes=0, flops=1e9, executed=1e9, matrix_share=0.5)
    assert time("x", half, GPU).parts["matrix"] == pytest.approx(20e-6)
    extra = Work(bytes=1e6, workspace=1e6)
    assert time("x", extra, GPU).parts["memory"] == pytest.approx(2e-6)


def test_latency_counts_loads_only() -> None:
    """Half of the bytes are read, 2/3 of the time: 8 KB x 5 blocks are as good as 53 KB."""
    kernel = named("rms_norm.cu")
    work = kernel.work(kernel, GPU)
    assert work.in_flight * work.per_sm == pytest.approx(4 * 4096 * 5 * 2 / 3 * 2)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.file} {k.case}")
def test_predictions_stay_below_the_limits(kernel: Kernel) -> None:
    for gpu in (H200, H100):
        p = kernel.predict(gpu)
        assert 0.3 < p.share < 1
        assert p.bytes / p.seconds < gpu.bandwidth
        assert p.flops / p.seconds < (gpu.fp8 if "fp8" in kernel.file else gpu.bf16)
