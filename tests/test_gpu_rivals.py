"""The GPU report measures every case on both GPU backends: here on cpu and reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import cuda, dispatch
from llama_fast.bench import (
    baselines,
    gpu_attention,
    gpu_case,
    gpu_parts,
    gpu_report,
    gpu_rivals,
    targets,
    timing,
)
from llama_fast.bench.files import BROKEN, WRONG, read

from .op_examples import watch_kernels

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> gpu_case.Place:
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    made = gpu_case.Place(CPU, gpu_case.TINY, baselines.Compiler(0.0), rivals=("cpu", "reference"))
    monkeypatch.setattr(gpu_parts, "Place", lambda *_: made)
    return made


def ops(out: Path, case: str, *more: str) -> tuple[int, dict[str, Any]]:
    arguments = ["ops", "--out", str(out), "--until", "1e11", "--device", "cpu", "--tiny"]
    status = gpu_parts.main([*arguments, "--case", case, *more])
    return status, read(out / "ops.json") or {}


def test_both_are_measured(
    place: gpu_case.Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = ops(tmp_path, "attention full")
    (row,) = found["rows"]
    assert status == 0 and found["case"] == "attention full" and row["backend"] == "cpu"
    assert list(row["backends"]) == ["cpu", "reference"]
    for entry in row["backends"].values():
        assert entry["rate"] > 0 and entry["of_limit"] > 0 and entry["seconds"]["rounds"] > 0
        assert entry["error"] < 0.01 and not entry["wrong"]
    ours, other = row["backends"].values()
    assert (ours["rate"], ours["error"]) == (row["rate"], row["error"])
    assert other["error"] == row["eager_error"] and "reference" not in row["times"]
    assert "; reference " in capsys.readouterr().out.splitlines()[-1]


def wrong_rival(monkeypatch: pytest.MonkeyPatch, f: Any) -> None:
    """The rival's runs and results go through f."""
    right = gpu_attention.lf.attention

    def attend(*args: Any, **options: Any) -> torch.Tensor:
        out = right(*args, **options)
        return f(out) if dispatch.kernels("attention", args[0]) is None else out

    monkeypatch.setattr(gpu_attention.lf, "attention", attend)


def test_a_wrong_rival_is_told(
    place: gpu_case.Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong_rival(monkeypatch, lambda out: out * 2)
    status, found = ops(tmp_path, "attention full")
    (row,) = found["rows"]
    assert status == WRONG and not row["wrong"] and row["backends"]["reference"]["wrong"]
    (problem,) = gpu_report.problems({"parts": {"ops": found}}, ["ops"])
    assert "WRONG on reference, error " in problem
    assert " WRONG" in capsys.readouterr().out


def test_a_failing_rival_costs_the_other_nothing(
    place: gpu_case.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nmore")

    wrong_rival(monkeypatch, fail)
    status, found = ops(tmp_path, "attention full")
    (row,) = found["rows"]
    assert status == WRONG and not found["failed"] and row["rate"] > 0
    assert row["backends"]["reference"] == {"failed": "no such kernel"}
    (problem,) = gpu_report.problems({"parts": {"ops": found}}, ["ops"])
    assert problem.endswith("failed on reference: no such kernel")


def test_what_is_not_built_is_left_out(
    place: gpu_case.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object.__setattr__(place, "rivals", ("cpu", "cuda"))
    monkeypatch.setattr(cuda, "missing", lambda: "llama_fast._cuda was not built")
    status, found = ops(tmp_path, "attention full")
    why = "use_backend: llama_fast._cuda was not built"
    assert status == 0 and found["rows"][0]["backends"]["cuda"] == {"skipped": why}


@pytest.mark.parametrize("what", ["hangs", "breaks the context"])
def test_who_breaks_the_process_is_struck_off(
    place: gpu_case.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The process ends, and the next one measures the same case without that backend."""

    def leave(code: int) -> None:
        raise KeyboardInterrupt(code)  # no Exception: it would be taken for the case's failure

    def fail(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    if what == "hangs":
        monkeypatch.setattr(gpu_rivals, "_ends", lambda run, device: False)
    else:
        wrong_rival(monkeypatch, fail)
        monkeypatch.setattr(gpu_rivals, "_broken", lambda device: True)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda code: left.append(code) or leave(code))
    ops(tmp_path, "attention full")
    found = read(tmp_path / "ops.json") or {}
    assert left == [BROKEN] and found["struck_off"].keys() == {"attention on reference"}
    assert not found["rows"] and not found["failed"]
    status, found = ops(tmp_path, "attention full", "--resume")
    (row,) = found["rows"]
    why = "no end within 20 s" if what == "hangs" else "an illegal memory access was encountered"
    assert status == WRONG and row["backends"]["reference"] == {"failed": why} and row["rate"] > 0


def test_a_launch_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        answers = [False] * 3 + [True]

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.answers.pop(0) if self.answers else False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    cuda = torch.device("cuda")
    assert gpu_rivals._ends(lambda i: None, cuda)
    now = iter(range(0, 1000, 15))
    monkeypatch.setattr(gpu_rivals.time, "monotonic", lambda: next(now))
    assert not gpu_rivals._ends(lambda i: None, cuda)


def test_side_by_side() -> None:
    def row(op: str, triton: float, **cuda: Any) -> dict[str, Any]:
        entry = {"seconds": {"median": triton}, "wrong": False}
        return {"op": op, "backends": {"triton": entry, "cuda": cuda}}

    rows = [
        row("attention", 2.0, seconds={"median": 1.0}, wrong=False),
        row("attention", 3.0, seconds={"median": 4.0}, wrong=True),
        row("attention", 3.0, failed="hung"),
        row("rms_norm", 1.0, skipped="not built"),
        {"op": "limit"},
    ]
    one, other = targets.side_by_side(rows)
    assert one.endswith(" 0.75 to 2.00x triton in 2 of 3 cases, 1 WRONG, 1 FAILED")
    assert one.startswith("cuda attention ") and other.endswith("not compared in 0 of 1 cases")


def test_every_case_says_its_class(place: gpu_case.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the case claims is what its op asks dispatch.kernels for, at the report's own sizes but
    for the lengths; and every class but one is measured."""
    sizes = gpu_case.Sizes(**{**vars(gpu_case.TINY), "head_dim": 128, "few": (1,), "many": (80,)})
    object.__setattr__(sizes, "square", 128)
    object.__setattr__(place, "sizes", sizes)
    seen: list[Any] = []
    right = dispatch.kernels
    watch_kernels(
        monkeypatch,
        lambda op, *a: seen.append((op, dispatch.shape_class(op, *a))) or right(op, *a),
    )
    monkeypatch.setattr(baselines.Baselines, "offer", lambda *_: False)
    claimed = set()
    for spec in gpu_parts.specs(place):
        try:
            case = spec.build()
        except gpu_case.Unsupported:  # an FP8 cache, on a CPU
            continue
        seen.clear()
        case.runs["ours"](0)
        claimed.add((case.op, dispatch.shape_class(case.op, *case.arguments)))
        assert seen[0] == (case.op, dispatch.shape_class(case.op, *case.arguments)), spec.name
    assert {op for op, _ in claimed} == {
        op for op in dispatch.OPS if op not in ("linear", "pack_weight")
    }
    assert all(c for _, c in claimed)
