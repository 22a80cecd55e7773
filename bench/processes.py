"""Processes of a GPU report: in sessions of their own, with an end, and what they print kept.
Imports nothing of llama_fast or torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 4.0  # seconds for a process to end when asked to, and again when killed
live: list[subprocess.Popen[bytes]] = []
interrupted = threading.Event()


def start(command: list[str], output: Any = None, **environment: str) -> subprocess.Popen[bytes]:
    """In a session of its own, so that its children can be ended with it."""
    if interrupted.is_set():
        raise RuntimeError("interrupted")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )
    live.append(process)
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """First as Ctrl-C would, so that pytest can end its own children. A process that a driver holds
    cannot be ended: it is left behind."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    live.remove(process)


def end_all() -> None:
    """For an interrupt: a wait for one of them ends, and no other is started."""
    interrupted.set()
    for process in list(live):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def limited(
    command: list[str], seconds: float, log: Path, **environment: str
) -> tuple[str, int | None]:
    """What it prints, kept in log; the exit code: None when it had to be stopped."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = start(command, output, **environment)
        code: int | None = None
        try:
            code = process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(process)
    return log.read_text(errors="replace"), code


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """What `timeout` sends ends the report as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """What this process and its children print, kept in path as well."""
    sys.stdout.flush()
    tee = subprocess.Popen(["tee", str(path)], stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    before = [os.dup(number) for number in (1, 2)]
    for number in (1, 2):
        os.dup2(tee.stdin.fileno(), number)
    tee.stdin.close()
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)
            os.close(old)
        with contextlib.suppress(subprocess.TimeoutExpired):
            tee.wait(2)  # a process that could not be ended still holds it
        tee.kill()


def tool(name: str) -> str | None:
    """On PATH, beside this Python (a virtual environment that is not activated), in CUDA's folders,
    or beside the nvcc that PATH leads to."""
    cuda = [os.environ[n] for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    places = [Path(sys.executable).parent, *(Path(home) / "bin" for home in cuda)]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parent)
    places.append(Path("/usr/local/cuda/bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))


def tail(output: str, lines: int = 1) -> str:
    return "\n".join([*filter(None, map(str.rstrip, output.splitlines()))][-lines:])[-2000:]
