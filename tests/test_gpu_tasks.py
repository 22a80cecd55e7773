"""One part of the GPU report without a GPU: its tasks in a row, and the process that runs them,
which may fault, hang or run out of time."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.bench import gpu_case, gpu_report, gpu_summary, processes, tasks
from llama_fast.bench.files import BROKEN, WRONG, read, write

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- tasks ----


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


# ---- the process ----


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
    """Starting takes the steps: (changes to path's content, exit code). Returns the commands."""
    commands: list[list[str]] = []

    def start(command: list[str]) -> FakeProcess:
        commands.append(command)
        changes, code = steps.pop(0)
        if changes is not None:
            empty = {"planned": list("abc"), "running": None, "failed": {}, "done": []}
            write(path, {**empty, **(read(path) or {}), **changes})
        return FakeProcess(code)

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(processes, "stop", lambda process: None)
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
    found = gpu_summary.merge(tmp_path, ["ops"])["parts"]["ops"]
    assert found["unreached"] == ["b", "c"] and not found["failed"] and found["running"] is None
