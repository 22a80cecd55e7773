"""Tests of tests/gpu/sanitize.py without a GPU. A stand-in for compute-sanitizer prints what the
real one prints, and runs nothing or a stand-in for pytest."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.bench.gpu import processes

from .gpu import conftest, sanitize

ROOT = Path(__file__).resolve().parent.parent
CLEAN = "========= ERROR SUMMARY: 0 errors"
NO_RACES = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
BAD = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at lf::cuda::rms_norm_kernel+0x5a0
=========     by thread (31,0,0) in block (4,0,0)
=========     Address 0x7f0e2a600100 is out of bounds
========= ERROR SUMMARY: 1 error"""
RACE = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
PASSED = Counter(passed=3)


@pytest.mark.parametrize(
    "tool, text, code, cases, errors, why",
    [
        ("memcheck", CLEAN, 0, PASSED, 0, ""),
        ("racecheck", NO_RACES, 0, PASSED, 0, ""),
        ("memcheck", CLEAN, 0, Counter(passed=1, skipped=4), 0, ""),
        ("memcheck", BAD, 66, PASSED, 1, "1 errors"),
        ("memcheck", BAD, 0, PASSED, 1, "1 errors"),
        ("racecheck", RACE, 66, PASSED, 1, "1 hazards"),
        ("racecheck", RACE.replace("1 error,", "0 errors,"), 0, PASSED, 1, "1 hazards"),
        ("memcheck", f"{CLEAN}\n{BAD}", 66, PASSED, 1, "1 errors"),
        ("memcheck", CLEAN, -11, PASSED, 0, "ended with -11"),
        ("memcheck", CLEAN, 1, Counter(passed=2, failed=1), 0, "ended with 1; 1 cases failed"),
        ("memcheck", CLEAN, 0, Counter(), 0, "no case ran"),
        ("memcheck", CLEAN, 0, Counter(skipped=3), 0, "no case ran"),
        ("memcheck", "", 0, PASSED, None, "no summary of memcheck"),
        ("racecheck", CLEAN, 0, PASSED, None, "no summary of racecheck"),
        ("memcheck", CLEAN, sanitize.FOUND, PASSED, 0, "0 errors"),
        ("memcheck", "", None, PASSED, None, "not done within 9 s; split it with -k; no summary"),
        ("memcheck", f"! session-timeout: 7.0 sec\n{CLEAN}", 1, PASSED, 0, "not done within 9 s"),
        (
            "memcheck",
            f"! session-timeout: 7.0 sec\n{BAD}",
            66,
            PASSED,
            1,
            "not done within 9 s; sp",
        ),
    ],
)
def test_judge(
    tool: str, text: str, code: int | None, cases: Counter[str], errors: int | None, why: str
) -> None:
    found = sanitize.judge(tool, text, code, cases, 9.0)
    assert found["errors"] == errors and found["passed"] == (not why)
    assert found["why"].startswith(why)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in for compute-sanitizer first on PATH. Its script is the file `body`."""
    script = tmp_path / "bin" / "compute-sanitizer"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Version 2025.3.0.0 (build 36226719)"; exit; fi\n'
        'results=$(echo "$@" | sed "s/.*--junitxml \\([^ ]*\\).*/\\1/")\n'
        'case="<testcase/>"; passed() { echo "<t>$case</t>" >"$results"; case="$case$case"; }\n'
        f'echo "$LLAMA_FAST_TEST_BACKEND $PYTORCH_NO_CUDA_MEMORY_CACHING $@" >>{tmp_path}/calls\n'
        f". {tmp_path}/body\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(sanitize, "_has_gpu", lambda: True)
    return tmp_path


GOOD = f"""passed
case "$2" in racecheck) echo "{NO_RACES}";; *) echo "{CLEAN}";; esac
"""


def run(fake: Path, body: str, *options: str) -> tuple[int, list[dict[str, Any]]]:
    (fake / "body").write_text(body)
    status = sanitize.main([*options, "--json", str(fake / "out.json")])
    return status, json.loads((fake / "out.json").read_text())["runs"]


def test_every_tool_on_every_backend(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake / "llama_fast").mkdir()
    (fake / "llama_fast" / "_cuda.x.so").touch()
    monkeypatch.setattr(sanitize, "ROOT", fake)
    status, runs = run(fake, GOOD)
    assert status == 0 and all(r["passed"] and r["errors"] == 0 for r in runs)
    assert [(r["backend"], r["tool"]) for r in runs] == [
        (backend, tool) for backend in ("triton", "cuda") for tool in sanitize.TOOLS
    ]
    calls = (fake / "calls").read_text().splitlines()
    assert calls[0].startswith("triton 1 --tool memcheck --error-exitcode 66 ")
    assert " --session-timeout 238 " in calls[0]  # the summary comes within the 280 s
    assert "-m sanitize tests/gpu" in calls[7] and calls[7].startswith("cuda 1 --tool synccheck")


def test_what_is_found_fails_and_is_shown(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = f"passed; passed\necho '{BAD}'; exit 66\n"
    options = ("--tool", "memcheck", "--backend", "triton", "--logs", str(fake / "logs"))
    status, (found,) = run(fake, body, *options)
    assert status == 1 and (found["errors"], found["cases"]) == (1, {"passed": 2})
    out = capsys.readouterr().out
    assert "========= Invalid __global__ read of size 2 bytes" in out
    assert "triton  memcheck      1 errors    2 cases" in out and "FAILED: 1 errors" in out
    assert "note: on sm_90 and later, memcheck before 2026.2 does not check TMA loads" in out
    assert BAD in (fake / "logs" / "triton-memcheck.log").read_text()


def test_a_run_that_does_not_end_is_stopped(fake: Path) -> None:
    options = ("--tool", "memcheck", "--backend", "triton", "--seconds", "1")
    status, (found,) = run(fake, "passed; sleep 60\n", *options)
    assert status == 1 and found["seconds"] < 10 and found["cases"] == {"passed": 1}
    assert found["why"] == "not done within 1 s; split it with -k; no summary of memcheck"


def test_options_reach_the_commands(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sanitize.Excluded("initcheck", "copy", "pads")
    monkeypatch.setattr(sanitize, "EXCLUDED", (known,))
    options = ("--tool", "initcheck", "--tool", "synccheck", "--backend", "triton", "-k", "rope")
    status, runs = run(fake, GOOD, *options)
    assert status == 0 and [r["tool"] for r in runs] == ["initcheck", "synccheck"]
    one, other = (fake / "calls").read_text().splitlines()
    assert one.endswith("-k rope") and "--kernel-name-exclude kernel_substring=copy" in one
    assert "exclude" not in other and runs[0]["excluded"] == [known._asdict()]


def test_cuda_that_is_not_built(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip CUDA by default if it is not built, and fail if it was asked for."""
    monkeypatch.setattr(sanitize, "ROOT", fake)
    assert run(fake, GOOD, "--tool", "memcheck")[0] == 0
    (fake / "out.json").write_text('{"runs": []}')
    assert run(fake, GOOD, "--tool", "memcheck", "--backend", "cuda")[0] == 1


def test_found_beside_nvcc_and_in_cuda_home(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(fake))
    assert processes.tool("compute-sanitizer") == str(fake / "bin" / "compute-sanitizer")
    monkeypatch.delenv("CUDA_HOME")
    (fake / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (fake / "bin" / "nvcc").chmod(0o755)
    (fake / "links").mkdir()
    (fake / "links" / "nvcc").symlink_to(fake / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(fake / "links"))
    assert processes.tool("compute-sanitizer") == str(fake / "bin" / "compute-sanitizer")


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(processes, "tool", lambda name: None)
    assert sanitize.main([]) == 2
    assert "compute-sanitizer was not found on PATH" in capsys.readouterr().err
    monkeypatch.setattr(processes, "tool", lambda name: name)
    monkeypatch.setattr(sanitize, "_has_gpu", lambda: False)
    assert sanitize.main([]) == 2
    assert capsys.readouterr().err == "sanitize: torch sees no GPU here\n"


def test_the_cases_exist() -> None:
    """Require that every named test exists: a stale name would check nothing."""
    files = {name.split("::")[0] for name in conftest.collected}
    if not files >= {name.split("::")[0] for name in conftest.SANITIZED}:
        pytest.skip("this run has not collected tests/gpu")
    for name, parameters in conftest.SANITIZED.items():
        assert set(parameters) <= set(conftest.collected.get(name, ())), name


def test_large_tests_are_marked() -> None:
    """Find every test that allocates past 2^31 elements."""
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        for test in re.split(r"^(?=def |@)", path.read_text(), flags=re.MULTILINE):
            allocates = re.search(r"torch\.(empty|zeros)\(|\.expand\(", test)
            if allocates and re.search(r"2\*\*(28|30|31 (\+|//))", test):
                name = re.match(r"def (\w+)", test)
                assert name and conftest.LARGE.match(name[1]), f"{path.name}: {test[:60]}"


@pytest.mark.parametrize(("reserved", "emptied"), [(2 << 30, 0), ((2 << 30) + 1, 1)])
def test_memory_is_freed_after_a_large_test(
    reserved: int, emptied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    conftest.give_back()
    assert len(calls) == emptied


def test_make_target() -> None:
    command = ["make", "-n", "sanitize-gpu", "PYTHON=python3", "SANITIZE=--tool memcheck"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert made.stdout.strip() == '"python3" -m tests.gpu.sanitize --tool memcheck'
