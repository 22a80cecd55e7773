"""A short run of every fuzzer, the driver's reports, and faults that must be found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, cpu, reference

from . import drive, ops

ROOT = Path(__file__).resolve().parents[2]
# In one process, whose imports take longer than the cases.
SHORT = """
from tests.fuzz import MODULES, cache, checkpoints, ops
assert {*MODULES} == {"cache", "checkpoints", "ops"}
for module, count in ((cache, 200), (checkpoints, 20), (ops, 200)):
    print(module.__name__, module.run(120.0, 0, count))
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "LLAMA_FAST_FUZZ_HANG": "60", **environment},  # on a busy machine
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_short_run() -> None:
    done = run("-X", "faulthandler", "-c", SHORT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


BROKEN = {
    "crash": ("import os; os.abort()", "exit status -6; the last case, seed 3: "),
    "hang": ("import time; time.sleep(60)", "exit status -14; the last case, seed 3: "),
    "wrong error": ("raise KeyError(case)", "failed: --seed 3 --count 100 runs it again"),
    "leak": ("kept.append(bytearray(3 << 20))", "memory grew by"),
    "no fault": ("pass", "broken.case: 300 calls in "),
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
    done = run(
        *("-m", "tests.fuzz", "--only", "broken.case"),
        *("--seed", "3", "--count", "300", "--seconds", "120"),
        PYTHONPATH=str(tmp_path),
        LLAMA_FAST_FUZZ_HANG="2",
    )
    assert done.returncode == (kind != "no fault"), done.stderr[-3000:]
    assert "seed 3" in done.stdout and report in done.stdout + done.stderr, done.stderr[-3000:]


def test_a_seed_gives_the_same_cases() -> None:
    runs = []
    for _ in range(2):
        seen: list[int] = []
        assert drive.drive(seen.append, st.integers(), (), 60.0, 5, 150) == len(seen) == 150
        runs.append(seen)
    assert runs[0] == runs[1]


def _writes_x(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    out = reference.rms_norm(x, weight, eps)
    x[..., 0] += 1
    return out


def _refuses(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    raise ValueError("no such norm")


WRONG_OPS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "result": ("rms_norm", lambda *, x, weight, eps: x * weight, {}),
    "gradient": (
        "rms_norm",
        lambda *, x, weight, eps: reference.rms_norm(x, weight.detach(), eps) + 0 * weight.sum(),
        {"mode": "grad"},
    ),
    "input": ("rms_norm", _writes_x, {}),
    "refusal": ("rms_norm", _refuses, {}),
    "unnamed": ("rms_norm", _refuses, {"wrong": (("eps", "'x'"),)}),
    "cache": (
        "apply_rope_and_append",
        lambda **given: (
            reference.apply_rope_and_append(**given),
            given["k_cache"].view(-1)[-1:].zero_(),
        )[0],
        {},
    ),
}


@pytest.mark.parametrize("kind", WRONG_OPS)
def test_ops_finds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, broken, options = WRONG_OPS[kind]
    before = _cpu.isa()
    try:
        ops.check(ops.Case(op, seed=2, **options))
        monkeypatch.setattr(lf, op, broken)
        with pytest.raises(AssertionError):
            ops.check(ops.Case(op, seed=2, **options))
    finally:
        _cpu.set_isa(before)


def test_a_write_past_an_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ops.OUTPUTS:
        monkeypatch.setattr(cpu, name, getattr(cpu, name))
    x, weight = torch.randn(3, 8), torch.ones(8)
    exact = cpu.rms_norm

    def writes_on(out: Tensor, *rest: Any) -> None:
        exact(out, *rest)
        if ends:
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()

    monkeypatch.setattr(cpu, "rms_norm", writes_on)
    ops.guard_outputs()
    ends = False
    assert torch.allclose(lf.rms_norm(x, weight), reference.rms_norm(x, weight), atol=1e-6)
    ends = True
    with pytest.raises(AssertionError):
        lf.rms_norm(x, weight)
