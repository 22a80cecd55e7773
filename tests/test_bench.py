"""The benchmark suite on tiny shapes: what it writes, prints and refuses."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_fast as lf
from llama_fast import _cpu
from llama_fast.bench import cases, end_to_end, timing
from llama_fast.bench.__main__ import main

TINY = ["--quick", "--model", "tiny"]
Bench = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """bench(options) -> exit status, the JSON file. A few rounds of each case."""
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "figures.json"
        status = main([*TINY, "--json", str(path), *options])
        return status, json.loads(path.read_text())

    return run


def test_figures_of_every_op(bench: Bench) -> None:
    status, document = bench("--threads", "1", "--no-plot")
    assert status == 0 and document["complete"] and document["environment"]["threads"] == 1
    assert {r["op"] for r in document["ops"]} == set(cases.OPS)
    for r in document["ops"]:
        label = f"{r['op']} {r['shape']}"
        assert r["unit"] in ("GB/s", "TFLOP/s") and r["work"] > 0, label
        assert r["rate"] > 0 and r["limit_rate"] > 0, label
        assert r["of_limit"] == pytest.approx(r["rate"] / r["limit_rate"]), label
        assert 0 <= r["error"] < 0.1 and 0 <= r["eager_error"] < 0.1 and not r["wrong"], label
        assert {"ours", "limit"} < set(r["seconds"]), label
        for name, t in r["seconds"].items():
            assert 0 < t["p10"] <= t["median"] <= t["p90"], f"{label} {name}"
            assert t["rounds"] == timing.MIN_ROUNDS
        for name, value in r["times"].items():
            seconds = r["seconds"]
            assert value == seconds[name]["median"] / seconds["ours"]["median"], label
        assert set(r["met"]) == set(r["targets"]), label


def test_every_row_of_the_targets_is_measured() -> None:
    """What each case is compared with includes everything that it has a target against."""
    for group in cases.GROUPS.values():
        for case in group(cases.SHAPES["tiny"], torch.bfloat16, True):
            assert set(case.targets) <= {"limit", *case.baselines}, f"{case.op} {case.shape}"


def test_report(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench("--op", "rms_norm", "--plot", str(tmp_path / "plot.png"))
    out = capsys.readouterr().out
    for wanted in ("median (p10-p90) ms", "of limit", "error / eager", "targets met:", "torch 2"):
        assert wanted in out
    for name in ("figures.json", "plot.png", "plot.svg"):
        assert (tmp_path / name).stat().st_size > 500 and str(tmp_path / name) in out


def test_no_host_name(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot")
    assert socket.gethostname() not in (capsys.readouterr().out + json.dumps(document)).split()


@pytest.mark.parametrize(
    "options, wanted",
    [
        (["--op", "rms_norn"], "--op: got rms_norn, want any of rms_norm, add_rms_norm, "),
        (["--threads", "0"], "--threads: got 0, want at least 1"),
    ],
    ids=["unknown op", "no threads"],
)
def test_bad_options_are_one_line(
    options: list[str],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"bench: {wanted}") and captured.err.count("\n") == 1
    assert not captured.out and not list(tmp_path.iterdir())


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(cases.OPS)


def test_threads_are_restored(bench: Bench, threads: None) -> None:
    torch.set_num_threads(2)
    bench("--op", "rms_norm", "--threads", "1", "--no-plot")
    assert torch.get_num_threads() == 2


def test_interrupted_run_keeps_what_it_has(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> Iterator[cases.Case]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setitem(cases.GROUPS, "activations", interrupted)
    status, document = bench("--no-plot")
    assert status == 130 and not document["complete"]
    assert [r["op"] for r in document["ops"]] == ["rms_norm", "add_rms_norm", "apply_rope"]


@pytest.mark.parametrize("factor", [1.05, float("nan")], ids=["five percent off", "NaN"])
def test_wrong_kernel_is_noticed(
    bench: Bench,
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = lf.rms_norm
    monkeypatch.setattr(lf, "rms_norm", lambda x, w: right(x, w) * factor)
    status, document = bench("--op", "rms_norm", "--no-plot")
    assert status == 1 and document["ops"][0]["wrong"]
    assert "WRONG" in capsys.readouterr().out


def test_no_matplotlib(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--op", "rms_norm")[0] == 0
    assert "llama_fast[bench]" in capsys.readouterr().err


def test_measure_takes_turns() -> None:
    order: list[tuple[str, int]] = []
    runs = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    result = timing.measure(runs, 0.0)
    assert order[4:8] == [("b", 0), ("a", 0), ("a", 1), ("b", 1)]
    assert {t.rounds for t in result.values()} == {timing.MIN_ROUNDS}


@pytest.mark.parametrize("words", [0, 1, 7, 8, 9, 63, 64, 65, 32768 + 5, 200_001])
@pytest.mark.parametrize("threads", [1, 3])
def test_read_probe_reads_every_word(words: int, threads: int, isa: str) -> None:
    data = torch.randint(-(2**62), 2**62, (words + 2,))
    expected = 0
    for word in data[1:-1].tolist():
        expected ^= word
    address = data.data_ptr() + 8
    assert _cpu.read_bandwidth_probe(address, 8 * words, threads) == expected % 2**64


def test_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main job on two narrow layers."""
    config = replace(
        lf.LlamaConfig.llama_3_1_8b(),
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=2,
        vocab_size=256,
    )
    monkeypatch.setattr(end_to_end, "shape", lambda: config)
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    found = end_to_end.run(0.0, lambda text: None)
    rows = {(r["op"], r["shape"]): r for r in found["rows"]}
    assert set(rows) == {(op, w) for op in ("prefill 512", "decode") for w in ("bf16", "FP8")}
    for r in rows.values():
        assert r["tokens_per_s"] == pytest.approx(1e3 / r["ms_per_token"]) and r["of_limit"] > 0
        assert "transformers" in r["times"] and f"of {r['limit']}" in end_to_end.line(r)
    logits = found["logits"]
    assert logits["ours bf16"] <= 2 * logits["transformers bf16"] + 2**-8
    assert logits["ours FP8"] < 0.2


def test_readme_table_is_cut_from_the_committed_run(tmp_path: Path) -> None:
    """python -m bench --json bench/results/.../bench.json --readme README.md, and nothing typed."""
    root = Path(__file__).resolve().parent.parent
    (run,) = (root / "bench" / "results").glob("*/bench.json")
    copy = tmp_path / "README.md"
    copy.write_text((root / "README.md").read_text())
    assert main(["--json", str(run), "--readme", str(copy)]) == 0
    assert copy.read_text() == (root / "README.md").read_text()
