"""What the GPU report says of its figures: targets met and missed, the summary, the plots."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from llama_fast.bench import gpu_report, gpu_summary, targets
from llama_fast.bench.files import write

pytestmark = pytest.mark.usefixtures("one_thread")


def op(tag: str, **more: Any) -> dict[str, Any]:
    return {
        "op": tag or "rms_norm",
        "shape": "causal 2048, x",
        "tag": tag,
        "backend": "triton",
        "bytes": 1e9,
        "flops": 1e9,
        "seconds": {"ours": {"median": 1e-3}},
        "times": {"eager": 6.0},
        "of_limit": 0.9,
        **more,
    }


def verdicts(rows: list[dict[str, Any]], gpu: str = "NVIDIA H200") -> dict[str, str]:
    return {e["what"]: e["verdict"] for e in targets.compare(rows, gpu)}


def test_verdicts() -> None:
    guess = {"of_time": 0.8}
    (entry, *_) = targets.compare([op("norm", predicted=guess)], "NVIDIA H200")
    assert entry["of_predicted"] == 0.8 and " 80%  missed by 2%" in targets.table([entry])
    found = verdicts([op("norm"), op("prefill 16384", rate=240.0), op("rope", wrong=True)])
    assert found["RMSNorm, 32k x 4096: of copy bandwidth"] == "missed by 2%"
    assert found["RMSNorm, 32k x 4096: times eager"] == "met"
    assert found["prefill attention, causal 16k"] == "missed by 50%"
    assert found["RoPE: times eager"] == "WRONG"
    assert found["FP8 GEMM, row-wise 8192^3"] == "not measured"
    assert "prefill attention, causal 16k, CUDA" not in found


def test_absolute_figures_belong_to_their_gpu() -> None:
    cuda = {"seconds": {"median": 2e-3}, "rate": 500.0, "wrong": False}
    rows = [
        op("prefill 16384", rate=1000.0, backends={"cuda": cuda}),
        op("decode batch", rate=2000.0),
    ]
    on_h100 = verdicts(rows, "NVIDIA H100 80GB HBM3")
    assert on_h100["prefill attention, causal 16k"] == "met"
    assert on_h100["prefill attention, causal 16k, CUDA"] == "missed by 19%"
    rows[0]["backends"]["cuda"]["wrong"] = True
    assert verdicts(rows)["prefill attention, causal 16k, CUDA"] == "WRONG"
    rows[0]["backends"]["cuda"] = {"failed": "hung"}
    assert "prefill attention, causal 16k, CUDA" not in verdicts(rows)
    assert verdicts([op("prefill 16384", rate=500.0, backend="cuda")])[
        "prefill attention, causal 16k, CUDA"
    ].startswith("missed")
    assert on_h100["decode attention, B32 x 4k"] == "missed by 29%"  # of 0.7 times as much
    assert verdicts(rows)["decode attention, B32 x 4k"] == "missed by 50%"
    elsewhere = verdicts([op("norm"), *rows], "NVIDIA H100 PCIe")
    assert elsewhere["decode attention, B32 x 4k"] == "an H200's"
    assert elsewhere["RMSNorm, 32k x 4096: times eager"] == "met"
    entries = targets.compare(rows, "NVIDIA H100 80GB HBM3")
    wanted = {e["what"]: e["wanted"] for e in entries}
    assert wanted["decode attention, B32 x 4k"] == pytest.approx(2800)
    assert wanted["FP8 GEMM, row-wise 8192^3"] == 1360


def test_the_slowest_of_several_counts() -> None:
    rows = [op("gemm few", rate=3700.0), op("gemm few", rate=1800.0)]
    assert verdicts(rows)["FP8 GEMM, M <= 64 (the slowest)"] == "missed by 50%"


def test_exponent() -> None:
    assert targets.exponent([(x, 3 * x**1.5) for x in (2, 8, 32)]) == pytest.approx(1.5)
    assert targets.exponent([(2, 1.0)]) is None


def test_summary_and_plots(tmp_path: Path) -> None:
    limits = [
        {"op": "limit", "shape": n, "rate": r}
        for n, r in {"copy": 4e12, "read": 4.3e12, "bf16": 8e14, "fp8": 1.5e15}.items()
    ]
    more = {"op": "attention", "tag": "", "seconds": {"ours": {"median": 4e-3}}}
    ops = [
        op("norm"),
        op("attention"),
        op("", shape="causal 4096, x", **{k: v for k, v in more.items() if k != "tag"}),
    ]
    environment = {"gpu": "NVIDIA H200", "torch": "2.11", "commit": "abc"}
    write(tmp_path / "limits.json", {"rows": limits, "complete": True, "environment": environment})
    skipped = {"fp8 cache": "not offered"}
    write(tmp_path / "ops.json", {"rows": ops, "environment": environment, "skipped": skipped})
    found = gpu_summary.merge(tmp_path, ["limits", "ops"])
    text = gpu_summary.summary(found)
    for wanted in (
        "gpu NVIDIA H200",
        "commit abc",
        "3 rows, 1 skipped  INCOMPLETE",
        "left out: fp8 cache: not offered",
        "growth of attention's time over causal tokens: n^2.00",
        "1 met, 1 missed",
        "nothing was wrong",
    ):
        assert wanted in text
    assert len(text) < 8000 and max(map(len, text.splitlines())) < 130
    args = argparse.Namespace(out=tmp_path)
    assert gpu_report.plots(args, 60.0) == {"complete": True}
    for name in ("roofline", "speedups"):
        for kind in ("png", "svg"):
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 1000


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots, and no error."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write(tmp_path / "report.json", {"parts": {"ops": {"rows": [op("norm")]}}, "environment": {}})
    found = gpu_report.plots(argparse.Namespace(out=tmp_path), 60.0)
    assert found == {"complete": False, "what": "ImportError: no matplotlib"}
