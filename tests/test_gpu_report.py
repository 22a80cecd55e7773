"""The GPU report without a GPU: what it chooses, keeps, prints and refuses, and, in tiny shapes on
the CPU, every case that it measures."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llama_fast import _cpu, reference
from llama_fast.bench import (
    baselines,
    build_and_test,
    case,
    cases,
    gpu_attention,
    gpu_case,
    gpu_model,
    gpu_parts,
    gpu_report,
    gpu_timing,
    models,
    prediction,
    read_probe,
    report,
    shapes,
    suite,
    targets,
    tasks,
    timing,
)
from llama_fast.bench.__main__ import main
from llama_fast.bench.files import BROKEN, WRONG, read, write

from .test_gpu_build_and_test import tool

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


# ---- one part's tasks ----


@pytest.fixture
def store(tmp_path: Path) -> tasks.Store:
    return tasks.Store(tmp_path / "ops.json", {"gpu": "G"}, resume=False)


def row(name: str, **more: Any) -> list[dict[str, Any]]:
    return [{"op": name, "shape": "", **more}]


def run_tasks(store: tasks.Store, named: dict[str, Any], deadline: float = 1.0) -> dict[str, Any]:
    tasks.run(store, named, deadline, lambda row: None, lambda: 0.0)
    return json.loads(store.path.read_text())


def test_a_failure_costs_its_own_case(
    store: tasks.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Any:
        raise RuntimeError("no such kernel")

    def unsupported() -> Any:
        raise gpu_case.Unsupported("not here")

    found = run_tasks(store, {"a": fails, "b": unsupported, "c": lambda: row("c")})
    assert found["complete"] and found["running"] is None and found["rows"] == row("c")
    assert "no such kernel" in found["failed"]["a"] and found["skipped"] == {"b": "not here"}
    assert "FAILED a: RuntimeError: no such kernel" in capsys.readouterr().out


def test_interrupted_part_keeps_what_it_has(store: tasks.Store) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(store, {"a": lambda: row("a"), "b": interrupted, "c": lambda: row("c")})
    found = json.loads(store.path.read_text())
    assert found["rows"] == row("a") and found["running"] == "b" and not found["complete"]


def test_file_is_written_before_every_task(store: tasks.Store) -> None:
    seen: list[Any] = []

    def look() -> Any:
        seen.append(json.loads(store.path.read_text()))
        return row("x")

    run_tasks(store, {"a": look, "b": look})
    assert [(s["running"], len(s["rows"])) for s in seen] == [("a", 0), ("b", 1)]


def test_time_runs_out(store: tasks.Store) -> None:
    clock = iter([0.0, 2.0])
    tasks.run(
        store, {n: lambda: row("x") for n in "abc"}, 1.0, lambda row: None, lambda: next(clock)
    )
    found = json.loads(store.path.read_text())
    assert found["done"] == ["a"] and not found["complete"] and found["running"] is None


def test_resumed_part_goes_on(store: tasks.Store) -> None:
    run_tasks(store, {"a": lambda: row("a")})
    content = json.loads(store.path.read_text())
    content["failed"]["b"] = "faulted"
    write(store.path, content)
    again = tasks.Store(store.path, {}, resume=True)
    named: dict[str, Any] = {"a": None, "b": None, "c": lambda: row("c")}
    found = run_tasks(again, named)
    assert found["rows"] == row("a") + row("c") and found["complete"]
    assert found["environment"] == {"gpu": "G"}


def test_broken_context_ends_the_process(
    store: tasks.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match=str(BROKEN)):
        run_tasks(store, {"a": broken})
    found = json.loads(store.path.read_text())
    assert list(found["failed"]) == ["a"] and found["running"] is None


# ---- the processes ----


class FakeProcess:
    """Ends with code after so many looks at it; code None: never."""

    def __init__(self, code: int | None, looks: int = 3) -> None:
        self.code, self.looks, self.killed = code, looks, False

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks > 0 else -9 if self.killed else self.code

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        return -9


@pytest.mark.parametrize(
    "code, end, wanted",
    [
        (0, 1e9, ""),
        (WRONG, 1e9, ""),
        (130, 1e9, ""),
        (BROKEN, 1e9, gpu_report.BROKE),
        (1, 1e9, "its process ended with 1"),
        (-11, 1e9, "its process ended with -11"),
        (None, 1e9, "no end within 90 s: killed"),
        (None, 40.0, "time"),
    ],
)
def test_watch(code: int | None, end: float, wanted: str, tmp_path: Path) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 5

    process: Any = FakeProcess(code)
    found = gpu_report.watch(process, tmp_path / "x.json", end, 90.0, lambda: now[0], sleep)
    assert found == wanted


def test_watch_waits_while_tasks_end(tmp_path: Path) -> None:
    path, now = tmp_path / "x.json", [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 60
        write(path, {"at": now[0]})
        os.utime(path, ns=(0, int(now[0] * 1e9)))

    process: Any = FakeProcess(0, looks=20)
    assert gpu_report.watch(process, path, 1e9, 90.0, lambda: now[0], sleep) == ""


def options(out: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(out=out, device="cpu", case="", tiny=True, seconds=100.0, **more)


def begin(monkeypatch: pytest.MonkeyPatch, path: Path, steps: list[Any]) -> list[list[str]]:
    """Popen takes the steps: (changes to path's content, exit code). Returns the commands."""
    commands: list[list[str]] = []

    def popen(command: list[str], env: dict[str, str]) -> FakeProcess:
        assert env["LLAMA_FAST_TUNED"] == str(path.parent)
        commands.append(command)
        changes, code = steps.pop(0)
        if changes is not None:
            empty = {"planned": list("abc"), "running": None, "failed": {}, "done": []}
            write(path, {**empty, **(read(path) or {}), **changes})
        return FakeProcess(code)

    monkeypatch.setattr(gpu_report.subprocess, "Popen", popen)
    monkeypatch.setattr(gpu_report.time, "sleep", lambda s: None)
    return commands


def test_part_is_started_again_after_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ops.json"
    steps = [
        ({"running": "a"}, -11),
        ({"failed": {"a": "x", "b": "y"}}, BROKEN),
        ({"done": ["c"], "complete": True}, WRONG),
    ]
    commands = begin(monkeypatch, path, steps)
    gpu_report.work("ops", options(tmp_path), 100.0)
    found = read(path) or {}
    assert not steps and set(found["failed"]) == {"a", "b"} and found["complete"]
    assert ["--resume" in c for c in commands] == [False, True, True]


@pytest.mark.parametrize(
    "step, wanted",
    [
        ((None, 1), "did not start"),
        (({"running": None}, 1), "its process ended with 1"),
    ],
    ids=["at once", "between tasks"],
)
def test_part_that_cannot_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Any, wanted: str
) -> None:
    begin(monkeypatch, tmp_path / "ops.json", [step])
    gpu_report.work("ops", options(tmp_path), 100.0)
    assert wanted in (read(tmp_path / "ops.json") or {})["error"]


def test_no_restart_when_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(monkeypatch, tmp_path / "ops.json", [({"running": "b", "done": ["a"]}, None)])
    monkeypatch.setattr(gpu_report, "watch", lambda *_: "time")
    gpu_report.work("ops", options(tmp_path), 100.0)
    found = gpu_report.merge(tmp_path)["parts"]["ops"]
    assert found["unreached"] == ["b", "c"] and not found["failed"] and found["running"] is None


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


# ---- targets, table, plots ----


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
    assert on_h100["decode attention, B32 x 4k"] == "H200's"
    assert verdicts(rows)["decode attention, B32 x 4k"] == "missed by 50%"


def test_the_slowest_of_several_counts() -> None:
    rows = [op("gemm few", rate=3700.0), op("gemm few", rate=1800.0)]
    assert verdicts(rows)["FP8 GEMM, M <= 64 (the slowest)"] == "missed by 50%"


def test_every_target_has_a_case(place: gpu_case.Place) -> None:
    full = gpu_case.Place(place.device, gpu_case.FULL, place.compiler)
    tags = {spec.tag for spec in gpu_parts.specs(full)}
    bench = gpu_model.Work(models.shape())
    tags |= {f"decode {n} {b}" for n in ("bf16", "FP8") for b in bench.batches}
    tags |= {f"prefill {n} {s}" for n in ("bf16", "FP8") for s in bench.prompts}
    assert {target.tag for target in targets.TARGETS} <= tags


def test_targets_come_first(place: gpu_case.Place) -> None:
    tags = [spec.tag for spec in gpu_parts.specs(place)]
    tagged = [tag for tag in tags if tag]
    assert tags[: len(tagged)] == tagged


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
    found = gpu_report.merge(tmp_path)
    text = gpu_report.summary(found)
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
    for name in ("roofline", "speedups"):
        for kind in ("png", "svg"):
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 1000


def test_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path / "ops.json", {"rows": [op("norm")], "complete": True})
    assert gpu_report.merge(tmp_path)["parts"]["ops"]["rows"]
    assert "llama_fast[bench]" in capsys.readouterr().err


# ---- the cases themselves, in tiny shapes ----


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> gpu_case.Place:
    """On the CPU, where every baseline that there can be is there."""
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    return gpu_case.Place(torch.device("cpu"), gpu_case.TINY, baselines.Compiler(60.0))


def with_fp8_caches(f: Any) -> Any:
    """An attention_with_kvcache that takes them, whether f does or not."""

    def attend(
        q: torch.Tensor, *caches: Any, k_scale: Any = None, v_scale: Any = None, **more: Any
    ):
        k, v, lengths = caches
        if k_scale is not None:
            k, v = k.to(q.dtype) * k_scale.to(q.dtype), v.to(q.dtype) * v_scale.to(q.dtype)
        return f(q, k, v, lengths, **more)

    return attend


def part(name: str, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    arguments = [name, "--out", str(out), "--until", "1e11", "--device", "cpu", "--tiny"]
    status = gpu_parts.main([*arguments, *more])
    return status, read(out / f"{name}.json") or {}


def test_every_case_runs(
    place: gpu_case.Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_parts, "Compiler", lambda seconds: place.compiler)
    for module in (gpu_attention.lf, reference):
        patched = with_fp8_caches(module.attention_with_kvcache)
        monkeypatch.setattr(module, "attention_with_kvcache", patched)
    status, found = part("limits", tmp_path)
    assert status == 0 and [r["shape"] for r in found["rows"]] == ["copy", "read", "bf16", "fp8"]
    status, found = part("ops", tmp_path)
    assert status == 0, found["failed"]
    assert found["complete"] and not found["failed"] and not found["skipped"]
    specs = gpu_parts.specs(place)
    assert len(found["rows"]) == len(specs) and {r["tag"] for r in found["rows"]} == {
        spec.tag for spec in specs
    }
    for r in found["rows"]:
        label = f"{r['op']} {r['shape']}"
        assert r["rate"] > 0 and r["of_limit"] > 0 and not r["wrong"], label
        assert r["backend"] == "cpu" and r["bytes"] > 0 and r["flops"] > 0, label
        assert len(r["seconds"]) == len(r["times"]) + 1 and list(r["backends"]) == ["cpu"], label
        if r["op"] in ("rms_norm", "add_rms_norm", "apply_rope", "silu_and_mul", "quantize_fp8"):
            assert "torch.compile" in r["times"], label
    assert len(capsys.readouterr().out.splitlines()) == len(specs) + 4


@pytest.mark.parametrize("name", ["tune", "model", "profile"])
def test_other_parts_run(name: str, place: gpu_case.Place, tmp_path: Path) -> None:
    """Without limits.json: they measure their own."""
    status, found = part(name, tmp_path)
    assert status == 0, found["failed"]
    assert found["complete"] and found["rows"]
    if name == "model":
        assert {"decode FP8 1", "decode bf16 2", "generate bf16 1"} <= {
            r.get("tag") for r in found["rows"]
        }


def test_part_takes_limits_from_the_report(place: gpu_case.Place, tmp_path: Path) -> None:
    rows = [{"shape": "copy", "rate": 1e30}]
    stored = {"environment": {"gpu": None}, "complete": True, "rows": rows}
    write(tmp_path / "report.json", {"parts": {"limits": stored}})
    if not torch.cuda.is_available():
        _, found = part("ops", tmp_path, "--case", "add_rms_norm")
        assert [r["limit_rate"] for r in found["rows"]] == [1e21] * 3
        _, found = part("ops", tmp_path, "--case", "attention packed")
        assert found["rows"][0]["of_limit"] is None  # no such limit


def test_limits_that_fail_are_told(
    place: gpu_case.Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no FP8 here")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert part("limits", tmp_path)[1]["skipped"] == {"fp8": "torch._scaled_mm: no FP8 here"}
    (tmp_path / "limits.json").unlink()
    part("ops", tmp_path, "--case", "no such case")
    assert "limit fp8: torch._scaled_mm: no FP8 here" in capsys.readouterr().out


def test_wrong_kernel_is_noticed(
    place: gpu_case.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros for the last queries, whose outputs are small beside the first ones'."""
    right = gpu_attention.lf.attention

    def wrong(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        out = right(q, *rest, **options)
        out[:, -1:] = 0
        return out

    monkeypatch.setattr(gpu_attention.lf, "attention", wrong)
    monkeypatch.setattr(gpu_attention, "CHECKED_ROWS", 4)
    status, found = part("ops", tmp_path, "--case", "attention causal")
    assert status == WRONG and all(r["wrong"] for r in found["rows"])


def test_interrupted_process_exits_130(
    place: gpu_case.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_parts, "_measured", interrupted)
    assert part("ops", tmp_path, "--case", "rms_norm")[0] == 130


def test_ends() -> None:
    rows = torch.arange(1000.0)[:, None].repeat(1, 3)
    assert gpu_case.ends(rows)[:, 0].tolist() == [*range(64), *range(936, 1000)]
    q, _ = reference.quantize_fp8(rows)
    assert gpu_case.ends(q).dtype == q.dtype and gpu_case.ends(q).shape == (128, 3)


def test_worst_pair() -> None:
    nan = float("nan")
    assert gpu_attention.worst([(0.1, 0.2), (0.3, 0.1)]) == (0.3, 0.1)
    assert gpu_attention.worst([(nan, 0.1), (0.3, 0.1)])[0] != 0.3


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


# ---- what it stands on ----


def test_grouped_heads_are_repeated_for_who_knows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention

    def knows_no_groups(*args: Any, enable_gqa: bool, **options: Any) -> torch.Tensor:
        if enable_gqa:
            raise RuntimeError("No available kernel. Aborting execution.")
        return right(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", knows_no_groups)
    q, kv = torch.randn(1, 8, 4, 16), torch.randn(2, 1, 8, 2, 16)
    to = baselines.Baselines(lambda i: None)
    baselines.offer_sdpa(to, lambda _: (q, *kv.unbind()), True)
    out = to.runs["SDPA flash, K/V repeated"](0)
    torch.testing.assert_close(out.transpose(1, 2), reference.attention(q, *kv.unbind()))
    assert to.skipped["SDPA flash"].startswith("No available kernel")


def test_compiling_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    compiler = baselines.Compiler(1e-9)
    for skipped in (False, True):
        to = baselines.Baselines(lambda i: None)
        compiler.offer(to, torch.neg, lambda i: (torch.ones(2),))
        assert ("torch.compile" in to.skipped) == skipped != ("torch.compile" in to.runs)


def test_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        GPUS = {"H200": "figures"}

        @staticmethod
        def predict(op: str, gpu: str, **shape: int) -> argparse.Namespace:
            assert gpu == "figures" and shape == {"rows": 1}
            if op != "rms_norm":
                raise KeyError(op)
            return argparse.Namespace(seconds=1e-3, limit="copy", bytes=1.0, flops=2.0)

    monkeypatch.setattr(prediction.importlib, "import_module", lambda name: Model)
    found = prediction.predicted("rms_norm", {"rows": 1}, "NVIDIA H200")
    assert found == {"seconds": 1e-3, "limit": "copy", "bytes": 1.0, "flops": 2.0}
    found = prediction.predicted("other", {"rows": 1}, "NVIDIA H200")
    assert found == {"error": "KeyError: 'other'"}
    assert prediction.predicted("rms_norm", {}, "NVIDIA H200") is None
    assert prediction.predicted("rms_norm", {"rows": 1}, "NVIDIA H100") is None

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(prediction.importlib, "import_module", missing)
    assert prediction.predicted("rms_norm", {"rows": 1}, "NVIDIA H200") is None


@pytest.mark.parametrize("words", [1, 4095, 65536, 70001])
def test_read_probe_reads_every_word(words: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=device)
    sums = read_probe.checksums(data)
    assert functools.reduce(operator.xor, sums.tolist()) == functools.reduce(
        operator.xor, data.tolist()
    )
    assert sums.numel() == -(-words // (read_probe.BLOCK * read_probe.STEPS))


def test_gpu_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool(tmp_path, "nvidia-smi", "echo '580.65, 1980, 1980, 3201, 700.00, 121.4, 31, Disabled'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda *_: argparse.Namespace(total_memory=141 << 30, L2_cache_size=50 << 20),
    )
    found = report.environment(torch.device("cuda"))
    assert found["sm"] == "sm_90" and found["driver"] == "580.65" and found["sm_mhz"] == "1980"
    assert found["gpu_memory_gib"] == 141.0 and found["triton"]
    assert "driver" not in report.environment()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert report.gpu_state() == {}
    assert case.cache_bytes(torch.device("cuda")) == 200 << 20


def test_as_many_layers_as_fit() -> None:
    config = gpu_model.lf.LlamaConfig.llama_3_1_8b()
    layers = [gpu_model.fitting(config, n << 30).num_hidden_layers for n in (1, 20, 68, 130)]
    assert layers[0] == 1 < layers[1] < layers[2] == layers[3] == 32


# ---- the suite on a GPU ----


def test_suite_times_by_the_gpus_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    spec = cases.spec("tiny", device=cpu)
    made = [plan.make() for plan in cases.plan(spec, ["attention", "attention_with_kvcache"])]
    on_gpu = [cases.on(dataclasses.replace(spec, device=cuda), case) for case in made]
    assert [c.uncapturable for c in on_gpu] == [(), ("eager",)]
    assert all(c.device == cuda and not c.targets for c in on_gpu)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(gpu_timing, "measure", lambda runs, budget, **options: seen.update(options))
    session = argparse.Namespace(device=cuda, args=argparse.Namespace(level="default"))
    suite.Session._times(session, {}, on_gpu[1])  # type: ignore[arg-type]
    assert seen["uncapturable"] == ("eager",)
    tokens = [shapes.sweep("8b", device, "default").tokens for device in (cpu, cuda)]
    assert tokens[0] < tokens[1]


def test_suite_runs_the_model_on_a_gpu(place: gpu_case.Place) -> None:
    said: list[str] = []
    found = gpu_model.run(torch.device("cpu"), 0.0, said.append, tiny=True)
    assert {r["shape"] for r in found["rows"]} == {"bf16", "FP8"} and found["logits"]
    assert "transformers bf16" in found["logits"] and any("measured" in s for s in said)
    assert _cpu.isa()
