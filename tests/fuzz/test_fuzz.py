"""A short run of every fuzzer, and the driver's reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from . import MODULES, drive

ROOT = Path(__file__).resolve().parents[2]
HERE = [name for name in MODULES if Path(__file__).with_name(f"{name}.py").exists()]
CASES = {"ops": 400, "cache": 200, "checkpoints": 20}


def fuzz(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options],
        cwd=ROOT,
        env={**os.environ, "LLAMA_FAST_FUZZ_HANG": "60", **environment},  # on a busy machine
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", HERE)
def test_short_run(name: str) -> None:
    run = fuzz("--only", name, "--seed", "0", "--count", str(CASES[name]), "--seconds", "120")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "seed 0" in run.stdout and "clean" in run.stdout


BROKEN = {
    "crash": ("import os; os.abort()", "exit status -6; the last case, seed 3: "),
    "hang": ("import time; time.sleep(60)", "exit status -14; the last case, seed 3: "),
    "wrong error": ("raise KeyError(case)", "failed: --seed 3 --count 100 runs it again"),
    "leak": ("kept.append(bytearray(2 << 20))", "memory grew by"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_fault_is_reported_with_its_seed(kind: str, tmp_path: Path) -> None:
    statement, report = BROKEN[kind]
    when = "True" if kind == "leak" else "case > 99"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "case.py").write_text(
        "from hypothesis import strategies as st\n"
        "from tests.fuzz.drive import drive\n"
        "kept = []\n"
        f"def check(case):\n    if {when}:\n        {statement}\n"
        "def run(seconds, seed, count=None):\n"
        "    return drive(check, st.integers(0, 10**9), (), seconds, seed, count)\n"
    )
    run = fuzz(
        *("--only", "broken.case", "--seed", "3", "--count", "300", "--seconds", "120"),
        PYTHONPATH=str(tmp_path),
        LLAMA_FAST_FUZZ_HANG="2",
    )
    assert run.returncode == 1 and report in run.stderr, run.stderr[-3000:]


def test_a_seed_gives_the_same_cases() -> None:
    runs = []
    for _ in range(2):
        seen: list[int] = []
        assert drive.drive(seen.append, st.integers(), (), 60.0, 5, 150) == len(seen) == 150
        runs.append(seen)
    assert runs[0] == runs[1]
