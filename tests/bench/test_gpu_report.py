"""Tests of the GPU report without a GPU: what it refuses, how it divides its time, how it builds,
tests and measures in processes that end, and which files it leaves."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.bench.__main__ import main
from llama_fast.bench.gpu import processes, report, tests
from llama_fast.bench.results.files import commit, read

from .runs import op

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Return the arguments of a report into tmp_path/out about tmp_path, an empty checkout."""
    for module in (tests, processes):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it starts faster
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_timeout,xdist.plugin")
    monkeypatch.delenv("CMAKE_CUDA_ARCHITECTURES", raising=False)
    return argparse.Namespace(out=tmp_path / "out", device="cpu", tiny=False, sm="", case="")


# ---- the whole report ----


@pytest.mark.parametrize(
    "options, wanted",
    [
        pytest.param([], "torch sees no GPU here; ", marks=no_gpu, id="no GPU"),
        pytest.param(["--only", "ops,opps"], "--only: got opps, want any of build-cpu, ", id="a"),
        pytest.param(["--only", ","], "--only: got nothing, want any of build-cpu, ", id="none"),
        pytest.param(["--device", "cpu"], "--device cpu: only with --tiny", id="cpu"),
    ],
)
def test_refusals_are_one_line_and_exit_2(
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
    command = ["make", "-n", "gpu-report", "PYTHON=python3", "REPORT=out/here", "GPU=--only ops"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert made.stdout.strip() == '"python3" -m bench --gpu-report "out/here" --only ops'


def run_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str, **instead: Any
) -> tuple[int, dict[str, float]]:
    """Run a report in which only the named parts do anything. Return the exit status and the parts
    that ran, with their seconds."""
    ran: dict[str, float] = {}

    def step(name: str) -> Any:
        def run(args: argparse.Namespace, seconds: float) -> list[str]:
            ran[name] = seconds
            return instead.get(name.replace("-", "_"), lambda: [])()

        return run

    def here(command: list[str], seconds: float, log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('{"torch": "2.11", "sm": ""}\n')
        return 0

    monkeypatch.setattr(report, "limited", here)
    monkeypatch.setattr(report, "STEPS", {name: step(name) for name in report.STEPS})
    return main(["--gpu-report", str(tmp_path), "--tiny", "--device", "cpu", *more]), ran


def test_both_calls_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, ran = run_report(monkeypatch, tmp_path)
    assert status == 0 and set(ran) == set(report.PARTS) == set(report.STEPS)
    _, ran = run_report(monkeypatch, tmp_path, "--call", "1")
    assert set(ran) == {"build-cpu", "build-cuda", "tests-cuda", "sanitizer"}


def test_steps_share_a_calls_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each step at most its share, and the last one all the time that is left."""
    _, ran = run_report(monkeypatch, tmp_path, "--call", "2", "--seconds", "225")
    assert ran["build-cpu"] == pytest.approx(60, abs=1)
    assert ran["tests-triton"] == ran["precompile"] == pytest.approx(80, abs=1)
    assert ran["forward"] == pytest.approx(225, abs=2)


def test_nothing_runs_on_a_broken_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, ran = run_report(monkeypatch, tmp_path, "--call", "2", build_cpu=lambda: ["no c++"])
    assert status == 1 and list(ran) == ["build-cpu"]
    assert "PROBLEM no c++" in capsys.readouterr().out


def test_without_nvcc_the_rest_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, ran = run_report(monkeypatch, tmp_path, build_cuda=lambda: ["no nvcc"])
    assert status == 1 and set(ran) == set(report.PARTS)


def test_interrupted_report_exits_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Interrupt the report with the signal that `timeout` sends, and as Ctrl-C does."""
    before = signal.getsignal(signal.SIGTERM)

    def interrupt() -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    status, ran = run_report(monkeypatch, tmp_path, "--call", "2", build_cpu=interrupt)
    assert status == 130 and signal.getsignal(signal.SIGTERM) is before


def test_report_from_end_to_end(tmp_path: Path) -> None:
    """Run the driver, its processes and their files for one part with few cases."""
    command = [sys.executable, "-m", "bench", "--gpu-report", str(tmp_path), "--tiny"]
    command += ["--device", "cpu", "--call", "2", "--only", "ops", "--case", "silu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = read(tmp_path / "bench.json")
    assert {r["op"] for r in found["ops"]} == {"silu_and_mul", "silu_and_mul_fp8"}
    assert all("reference" in r["times"] for r in found["ops"]) and found["schema"] == 3
    assert "nothing was wrong" in ended.stdout


def test_documented_commands_are_short_and_understood() -> None:
    """Parse the commands of docs/gpu.md as a reader would paste them."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.DOTALL)
    calls = [block for block in blocks if "--call" in block]
    assert len(calls) == 2
    for call, block in enumerate(calls, 1):
        assert len(block) <= 2000 and f"--call {call}" in block
        subprocess.run(["bash", "-n", "-c", block], check=True)
        seconds = int(re.findall(r"timeout -k \d+ (\d+)", block)[0])
        assert report.SECONDS[call] + 15 <= seconds <= {1: 240, 2: 480}[call]


# ---- processes ----


def test_a_process_that_does_not_end_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop a process that ignores every signal except SIGKILL, and keep what it printed."""
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    script = "echo begun; trap '' INT TERM; sleep 300 & wait; sleep 300"
    began = time.monotonic()
    assert processes.limited(["sh", "-c", script], 0.5, tmp_path / "logs" / "log") is None
    assert time.monotonic() - began < 15 and processes.tail(tmp_path / "logs" / "log") == "begun"
    assert processes.limited(["sh", "-c", "exit 3"], 9.0, tmp_path / "other") == 3


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LLAMA_FAST_COMMIT", "copied")
    tool(tmp_path, "git", "exit 128")
    assert commit() == "copied"
    (tmp_path / "git").write_text("#!/bin/sh\necho 123abc+\n")
    assert commit() == "123abc+"


# ---- the build ----


@pytest.mark.parametrize("sm, chip", [("sm_90", "90-real"), ("sm_89", "89-real"), ("", "90-real")])
def test_build_is_for_the_gpu_at_hand(
    sm: str, chip: str, tmp_path: Path, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.py").touch()
    tool(tmp_path / "bin", "cmake", f'echo "$@" >>{tmp_path}/calls')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    args.sm = sm
    assert tests.build("_cuda", args, 60.0) == []
    configure, make = (tmp_path / "calls").read_text().splitlines()
    assert f"-DCMAKE_CUDA_ARCHITECTURES={chip}" in configure and "-DLLAMA_FAST_CUDA=on" in configure
    assert "--target _cuda" in make


@pytest.mark.parametrize(
    "body, why", [("exit 7", "cmake ended with 7"), ("sleep 300", "not built within 1 s")]
)
def test_a_build_that_fails_says_why(
    body: str,
    why: str,
    tmp_path: Path,
    args: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "setup.py").touch()
    tool(tmp_path / "bin", "cmake", body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert tests.build("_cpu", args, 1.0) == [f"build_cpu: {why}"]


def test_an_installation_has_nothing_to_build_or_test(args: argparse.Namespace) -> None:
    assert tests.build("_cpu", args, 9.0) == tests.run("triton", args, 9.0) == []


# ---- tests/gpu ----

SOME = """
import pytest
@pytest.mark.parametrize("n", range(3))
def test_good(n): pass
def test_bad(): assert not "it is wrong"
@pytest.mark.skip(reason="no TMA")
def test_left_out(): pass
def test_compiles_without_a_graph_break(): assert False, "takes minutes"
"""
HANGS = "import os, time\ndef test_before(): pass\ndef test_hangs(): time.sleep(300)\n"


def checkout(tmp_path: Path, **files: str) -> None:
    """Return a checkout with these files in tests/gpu and CUDA kernels that are built."""
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n sanitize: small\n big: big\n large: large\n"
    )
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    (tmp_path / "llama_fast").mkdir()
    (tmp_path / "llama_fast" / "_cuda_emulated.x.so").touch()


@pytest.mark.parametrize(
    "a_test, why", [("60", "not done within"), ("6", "pytest ended with 1")], ids=["ours", "pytest"]
)
def test_a_file_that_hangs_costs_its_own_tests(
    a_test: str,
    why: str,
    tmp_path: Path,
    args: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run one process per file. Each writes its results when it ends, however it ends."""
    monkeypatch.setattr(tests, "SIDE_BY_SIDE", ())
    monkeypatch.setattr(tests, "TIMEOUTS", {"cuda": a_test})
    checkout(tmp_path, rope=HANGS, some=SOME)
    problems = tests.run("cuda", args, 20.0 if a_test == "60" else 240.0)
    found = json.loads((args.out / "tests-cuda.json").read_text())
    some = found["files"]["test_some"]
    assert some["passed"] == 3 and list(some["failed"]) == ["tests.gpu.test_some::test_bad"]
    assert list(some["skipped"]) == ["tests.gpu.test_some::test_left_out"]
    assert why in found["files"]["test_rope"]["error"]
    assert "test_before PASSED" in (args.out / "logs" / "cuda-test_rope.log").read_text()
    assert any("it is wrong" in line for line in problems)
    assert any(line.startswith(f"cuda test_rope : {why}") for line in problems)


def test_a_test_that_hangs_costs_itself(
    tmp_path: Path, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let pytest-xdist replace the process that pytest-timeout ended."""
    monkeypatch.setattr(tests, "TIMEOUTS", {"triton": "6"})
    checkout(tmp_path, rope=HANGS + "def test_after(): pass\n")
    tests.run("triton", args, 240.0)
    found = json.loads((args.out / "tests-triton.json").read_text())["files"]["test_rope"]
    assert found["passed"] == 2 and "error" not in found
    assert list(found["failed"]) == ["tests.gpu.test_rope::test_hangs"] or len(found["failed"]) == 1


def test_a_missing_build_is_reported(
    tmp_path: Path, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    assert tests.run("cuda", args, 9.0) == []
    assert "llama_fast._cuda_emulated was not built" in capsys.readouterr().out


# ---- figures ----


def run_ops(
    monkeypatch: pytest.MonkeyPatch, args: argparse.Namespace, codes: dict[str, int | None]
) -> tuple[list[str], list[str]]:
    """Return the problems of `ops` and its calls. A process on two backends ends with the code of
    its op; an op's second try, on one backend, ends with 0."""
    calls: list[str] = []

    def limited(command: list[str], seconds: float, log: Path, **_: str) -> int | None:
        log.parent.mkdir(parents=True, exist_ok=True)
        if "--list" in command:
            log.write_text("rms_norm     8 x 64\nattention    32\nforward      pp512\n")
            return 0
        name, file = command[command.index("--op") + 1], Path(command[command.index("--json") + 1])
        both = command[command.index("--backend") + 1]
        calls.append(f"{name} on {both}")
        code = codes.get(name, 0) if "," in both else 0
        found = {"ops": [op(name, "8", {"eager": 2.0})], "complete": code == 0}
        found |= {"skipped": {}, "failed": {}, "peers": {}, "options": {"backend": both}}
        file.write_text(json.dumps(found))
        return code

    monkeypatch.setattr(report, "limited", limited)
    return report.ops(args, 100.0), calls


@pytest.mark.parametrize(
    "code, why", [(None, "had not ended within 60 s"), (-11, "ended with -11")]
)
def test_an_op_whose_process_dies_is_measured_on_one_backend(
    code: int | None, why: str, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems, calls = run_ops(monkeypatch, args, {"rms_norm": code})
    assert calls == ["rms_norm on cpu,reference", "rms_norm on cpu", "attention on cpu,reference"]
    assert len(problems) == 1 and why in problems[0]
    found = read(args.out / "bench.json")
    assert [r["op"] for r in found["ops"]] == ["rms_norm", "attention"]


def test_a_wrong_result_is_a_problem() -> None:
    one, other = ({"ops": [op("a", "8", {})], "options": {"backend": None}} for _ in range(2))
    for run in (one, other):
        run |= {"skipped": {}, "failed": {}, "peers": {}, "complete": True}
    other["ops"][0]["wrong"] = True
    both = report.merged(one, other)
    assert len(both["ops"]) == 1 and both["ops"][0]["wrong"] and both["complete"]


def test_precompiled_kernels_are_what_a_launch_finds(tmp_path: Path) -> None:
    """Precompile into an empty cache. The launcher's own call, on a driver that only knows its
    chip, must then add nothing to it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ambient = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**ambient, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SCRIPT = """
import argparse, os, sys
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from llama_fast.bench.gpu import tests
from llama_fast.bench.static import calls
from llama_fast.kernels import common

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))

args = argparse.Namespace(out=Path(sys.argv[1]), sm="", tiny=True)
tests.precompile(args, 300.0)
cache = Path(os.environ["TRITON_CACHE_DIR"])
before = set(cache.iterdir())
assert len(before) > 2
driver.set_active(Driver())
for case in calls.CASES:
    if case.op == "rms_norm":
        with common.record(common.CHIPS["sm_90"]) as recording:
            case.call()
        for launch in recording.launches:
            launch.kernel.warmup(
                *launch.arguments,
                grid=launch.grid,
                **dict(launch.config.constants),
                num_warps=launch.config.num_warps,
                num_stages=launch.config.num_stages,
                **{"enable_fp_fusion": True, **launch.constants},
            )
assert set(cache.iterdir()) == before
"""
