"""The GPU report as a whole, without a GPU: what it refuses, how it shares its time, its parts in
order, what it tells and how it ends."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.bench import build_and_test, gpu_report
from llama_fast.bench.__main__ import main
from llama_fast.bench.files import read, write

from .test_gpu_tasks import row

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, wanted",
    [
        pytest.param([], "torch sees no GPU here; ", marks=no_gpu, id="no GPU"),
        pytest.param(["--only", "ops,opps"], "--only: got opps, want any of build, ", id="part"),
        pytest.param(["--only", ","], "--only: got nothing, want any of build, ", id="no part"),
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


# ---- time ----


def test_budget_shares_what_is_left() -> None:
    now = [100.0]
    budget = gpu_report.Budget(
        540, ["build", "tests", "limits", "ops", "tune", "model"], lambda: now[0]
    )
    assert budget.of("build") == pytest.approx(540 * 90 / 540)
    now[0] += 10  # the build took 10 of 90 seconds: the others have more
    assert budget.of("tests") == pytest.approx(530 * 150 / 450)
    now[0] += 500
    assert budget.of("model") == pytest.approx(30)
    now[0] += 100
    assert budget.of("model") == 0.0 == budget.left


def test_budget_of_one_part_is_all() -> None:
    assert gpu_report.Budget(300, ["tune"], lambda: 0.0).of("tune") == 300
    assert gpu_report.BUDGET + gpu_report.GRACE + 10 <= 540


# ---- the parts ----


def run_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str, work: Any = None
) -> tuple[int, list[str], dict[str, Any]]:
    """The exit status, the parts that ran, report.json; no part does anything but work's."""
    ran: list[str] = []

    def build(seconds: float) -> dict[str, Any]:
        ran.append("build")
        return {"part": "build", "complete": "broken" not in more}

    def test(path: Path, seconds: float) -> None:
        ran.append("tests")
        write(path, {"counts": {"passed": 2}, "failed": {}, "complete": True})

    def part(name: str, args: argparse.Namespace, seconds: float) -> None:
        ran.append(name)
        write(args.out / f"{name}.json", {"rows": [], "complete": True})
        if work:
            work(name, args)

    monkeypatch.setattr(build_and_test, "build", build)
    monkeypatch.setattr(build_and_test, "test", test)
    monkeypatch.setattr(gpu_report, "work", part)
    argv = ["--gpu-report", str(tmp_path), "--tiny", "--device", "cpu"]
    status = main([*argv, *(m for m in more if m != "broken")])
    return status, ran, read(tmp_path / "report.json") or {}


def test_all_parts_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, ran, found = run_report(monkeypatch, tmp_path)
    assert status == 0 and ran == list(found["parts"])
    assert ran == ["build", "tests", "limits", "ops", "tune", "model"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json"]


def test_parts_alone_join_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "report.json", {"parts": {"limits": {"rows": [], "complete": True}}})
    status, ran, found = run_report(monkeypatch, tmp_path, "--only", "profile,ops")
    assert status == 0 and ran == ["ops", "profile"]
    assert set(found["parts"]) == {"limits", "ops", "profile"}


def test_nothing_runs_on_a_broken_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, ran, _ = run_report(monkeypatch, tmp_path, "broken")
    assert status == 1 and ran == ["build"]


def test_interrupted_report_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(name: str, args: argparse.Namespace) -> None:
        if name == "ops":
            write(args.out / "ops.json", {"rows": row("kept"), "planned": ["x"]})
            raise KeyboardInterrupt

    status, ran, found = run_report(monkeypatch, tmp_path, work=work)
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
    def work(name: str, args: argparse.Namespace) -> None:
        if name == "ops":
            write(args.out / "ops.json", content)

    assert run_report(monkeypatch, tmp_path, work=work)[0] == 1
    assert f"PROBLEM {wanted}" in capsys.readouterr().out


def test_report_from_end_to_end(tmp_path: Path) -> None:
    """The driver, its processes and their files, for one part and its few cases."""
    command = [sys.executable, "-m", "bench", "--gpu-report", str(tmp_path), "--only", "limits,ops"]
    ended = subprocess.run(
        [*command, "--tiny", "--device", "cpu", "--case", "rms_norm 16"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = read(tmp_path / "report.json") or {}
    assert found["parts"]["ops"]["complete"] and len(found["parts"]["ops"]["rows"]) == 4
    assert ended.stdout.strip().endswith("nothing was wrong")
