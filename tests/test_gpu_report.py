"""The GPU report as a whole, without a GPU: what it refuses, how it shares its time, its parts in
order, what it tells and leaves, and how it ends."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.bench import build_and_test, gpu_report, processes
from llama_fast.bench.__main__ import main
from llama_fast.bench.files import read, write

from .test_gpu_build_and_test import tool
from .test_gpu_tasks import row

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, wanted",
    [
        pytest.param([], "torch sees no GPU here; ", marks=no_gpu, id="no GPU"),
        pytest.param(
            ["--only", "ops,opps"], "--only: got opps, want any of build-cpu, ", id="part"
        ),
        pytest.param(["--only", ","], "--only: got nothing, want any of build-cpu, ", id="no part"),
        pytest.param(["--device", "cpu"], "--device cpu: only with --tiny", id="cpu"),
    ],
)
def test_one_line_and_exit_2(
    options: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--gpu-report", str(tmp_path / "new"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"bench: {wanted}") and captured.err.count("\n") == 1
    assert not captured.out and not (tmp_path / "new").exists()


@no_gpu
def test_suite_refuses_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "--device: got cuda" in capsys.readouterr().err


def test_make_target() -> None:
    made = subprocess.run(
        ["make", "-n", "gpu-report", "PYTHON=python3", "REPORT=out/here", "GPU=--only ops"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
    )
    assert (
        made.stdout.split()
        == "python3 -m bench --gpu-report out/here --only ops".replace("python3", '"python3"')
        .replace("out/here", '"out/here"')
        .split()
    )


# ---- the calls ----


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking torch in another process, which takes seconds."""
    found = {"complete": True, "environment": {"torch": "2.11", "commit": "abc"}}
    monkeypatch.setattr(build_and_test, "versions", lambda seconds: found)


def run_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str, **instead: Any
) -> tuple[int, list[str], dict[str, Any]]:
    """The exit status, the parts that ran and their seconds, report.json. No part does anything
    but those named."""
    ran: list[str] = []

    def part(name: str) -> Any:
        def run(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
            ran.append(name)
            return instead.get(name.replace("-", "_"), lambda: {"complete": True})()

        return run

    def work(name: str, args: argparse.Namespace, seconds: float) -> None:
        write(args.out / f"{name}.json", {"rows": [], **part(name)(args, seconds)})

    monkeypatch.setattr(build_and_test, "PARTS", {p: part(p) for p in build_and_test.PARTS})
    monkeypatch.setattr(gpu_report, "plots", part("plots"))
    monkeypatch.setattr(gpu_report, "work", work)
    status = main(["--gpu-report", str(tmp_path), "--tiny", "--device", "cpu", *more])
    return status, ran, read(tmp_path / "report.json") or {}


ONE = ["build-cpu", "build-cuda", "launch", "tests-cuda", "memcheck", "synccheck"]
TWO = ["build-cpu", "build-cuda", "precompile", "tests-triton", "limits", "ops", "model", "plots"]


def test_both_calls_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, ran, found = run_report(monkeypatch, tmp_path)
    assert status == 0 and sorted(ran) == sorted(ONE + TWO)
    assert ran[:3] == ONE[:3] and ran[-4:] == TWO[-4:]
    assert list(found["parts"]) == ["versions", *dict.fromkeys(ONE + TWO)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json"]


def test_a_call_leaves_one_tar_and_one_log_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, ran, _ = run_report(monkeypatch, tmp_path, "--call", "1")
    assert status == 0 and sorted(ran) == sorted(ONE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["call1.log", "call1.tar.gz"]
    status, ran, _ = run_report(monkeypatch, tmp_path, "--call", "2")
    assert status == 0 and sorted(ran) == sorted(TWO)
    assert not (tmp_path / "report.json").exists()
    with tarfile.open(tmp_path / "call2.tar.gz") as archive:
        archive.extractall(tmp_path / "both", filter="data")
    found = read(tmp_path / "both" / "report.json") or {}
    assert set(found["parts"]) == {"versions", *ONE, *TWO}


def test_steps_share_a_calls_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At most what each is given, and the last one all that is left."""
    run_report(monkeypatch, tmp_path, "--call", "1", "--only", "build-cpu,launch,memcheck")
    out = capsys.readouterr().out
    assert "--- build-cpu (up to 120 s)" in out and "--- launch (up to 60 s)" in out
    assert "--- memcheck (up to 215 s)" in out or "--- memcheck (up to 214 s)" in out
    run_report(
        monkeypatch, tmp_path, "--only", "build-cpu,launch", "--call", "1", "--seconds", "43"
    )
    assert "--- build-cpu (up to 24 s)" in capsys.readouterr().out
    for call, most in ((1, 230), (2, 470)):
        patience = 2 * processes.PATIENCE
        assert gpu_report.SECONDS[call] + patience + 5 <= most


def test_parts_alone_join_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "report.json", {"parts": {"limits": {"rows": [], "complete": True}}})
    status, ran, found = run_report(monkeypatch, tmp_path, "--only", "plots,ops")
    assert status == 0 and ran == ["ops", "plots"]
    assert set(found["parts"]) == {"versions", "limits", "ops", "plots"}


def test_nothing_runs_on_a_broken_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = {"complete": False, "error": "no compiler"}
    status, ran, _ = run_report(monkeypatch, tmp_path, "--call", "1", build_cpu=lambda: broken)
    assert status == 1 and ran == ["build-cpu"]


def test_without_nvcc_the_rest_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"complete": False, "error": "_cuda: cmake ended with 1"}
    status, ran, _ = run_report(monkeypatch, tmp_path, "--call", "2", build_cuda=lambda: broken)
    assert status == 1 and sorted(ran) == sorted(TWO)
    assert "PROBLEM build-cuda: _cuda: cmake ended with 1" in capsys.readouterr().out


def test_a_part_that_raises_costs_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails() -> Any:
        raise OSError("no space left")

    status, ran, found = run_report(monkeypatch, tmp_path, precompile=fails)
    assert status == 1 and "model" in ran
    assert found["parts"]["precompile"]["error"] == "OSError: no space left"


def test_interrupted_report_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By Ctrl-C, or by what `timeout` sends."""

    def interrupted() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"rows": row("kept"), "planned": ["x"]}

    status, ran, found = run_report(monkeypatch, tmp_path, ops=interrupted)
    assert status == 130 and ran[-1] == "ops"
    assert found["parts"]["ops"]["rows"] == row("kept")
    assert found["parts"]["ops"]["unreached"] == ["x"]
    captured = capsys.readouterr()
    assert "what was measured is kept" in captured.err and "out of time: x" in captured.out


@pytest.mark.parametrize(
    "content, wanted",
    [
        ({"failed": {"case": "Traceback\nRuntimeError: bad"}}, "ops: case: RuntimeError: bad"),
        ({"rows": row("rms_norm", wrong=True)}, "ops: rms_norm : WRONG"),
        ({"error": "did not start"}, "ops: did not start"),
    ],
    ids=["failed", "wrong", "error"],
)
def test_what_is_wrong_is_told_and_exits_1(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, Any],
    wanted: str,
) -> None:
    assert run_report(monkeypatch, tmp_path, ops=lambda: content)[0] == 1
    assert f"PROBLEM {wanted}" in capsys.readouterr().out


# ---- from end to end ----


def bench(out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "--gpu-report", str(out), "--tiny", "--device", "cpu"]
    return subprocess.run(
        [*command, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_report_from_end_to_end(tmp_path: Path) -> None:
    """The driver, its processes and their files, for two parts and their few cases."""
    ended = bench(tmp_path, "--call", "2", "--only", "limits,ops", "--case", "rms_norm 16")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with tarfile.open(tmp_path / "call2.tar.gz") as archive:
        archive.extract("report.json", tmp_path, filter="data")
    found = read(tmp_path / "report.json") or {}
    assert found["parts"]["ops"]["complete"] and len(found["parts"]["ops"]["rows"]) == 4
    assert ended.stdout.strip().endswith("nothing was wrong")
    assert (tmp_path / "call2.log").read_text() == ended.stdout + ended.stderr


def test_what_hangs_ends_and_what_was_found_is_kept(tmp_path: Path) -> None:
    """A compiler that ignores every signal but one."""
    tool(tmp_path / "bin", "cmake", "echo compiling; trap '' INT TERM; sleep 300")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    began, out = time.monotonic(), tmp_path / "out"
    ended = bench(out, "--call", "1", "--seconds", "30", PATH=path)
    assert ended.returncode == 1 and time.monotonic() - began < 60
    assert "PROBLEM build-cpu: _cpu: not built within" in (out / "call1.log").read_text()
    with tarfile.open(out / "call1.tar.gz") as archive:
        assert {"report.json", "logs/configure_cpu.log"} <= set(archive.getnames())


def test_documented_commands_are_short_and_understood() -> None:
    """Those of docs/gpu.md, as they are pasted."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.DOTALL)
    calls = [block for block in blocks if "--call" in block]
    assert len(calls) == 2
    for call, block in enumerate(calls, 1):
        assert len(block) <= 2000 and f"--call {call}" in block
        subprocess.run(["bash", "-n", "-c", block], check=True)
        seconds = int(re.findall(r"timeout -k \d+ (\d+)", block)[0])
        assert gpu_report.SECONDS[call] + 15 <= seconds <= {1: 240, 2: 480}[call]
