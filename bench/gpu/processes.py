"""Processes in sessions of their own, with an end. Imports nothing of llama_fast or torch."""

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

from ..results.files import ROOT

PATIENCE = 4.0  # seconds for a process to end when asked to, and again when killed
interrupted = threading.Event()


def limited(command: list[str], seconds: float, log: Path, **environment: str) -> int | None:
    """Run a command, with what it prints in log. Returns its exit code; None when it had to be
    stopped, with all of its children: first as Ctrl-C would, so that pytest can end its own. A
    process that a driver holds cannot be ended: it is left behind."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for _ in range(max(1, round(10 * seconds))):
                if interrupted.is_set():
                    return None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(0.1)
            return None
        finally:
            for number in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let what `timeout` sends end the report as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        interrupted.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def tool(name: str) -> str | None:
    """Find a tool on PATH, beside this Python (a virtual environment that is not activated), in
    CUDA's folders, or beside the nvcc that PATH leads to."""
    cuda = [os.environ[n] for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    places = [Path(sys.executable).parent, *(Path(home) / "bin" for home in cuda)]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parent)
    places.append(Path("/usr/local/cuda/bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))


def tail(log: Path, lines: int = 1) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join([*filter(None, map(str.rstrip, text.splitlines()))][-lines:])[-2000:]
