"""Run commands with a time limit, each in its own session. Imports neither llama_fast nor torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..results.files import ROOT

PATIENCE = 4.0  # seconds for a process to end after SIGINT, and again after SIGKILL
interrupted = threading.Event()


def limited(command: list[str], seconds: float, log: Path, **environment: str) -> int | None:
    """Run a command with its output in log. Return its exit code, or None if it was stopped with
    all of its children: first by SIGINT, so that pytest can end its own. A process that is stuck in
    a driver cannot be ended and stays."""
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
        end = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < end and not interrupted.is_set():
                time.sleep(0.1)
            return process.returncode
        finally:
            for number in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM, which `timeout` sends, end the report like Ctrl-C."""

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
    """Find a tool on PATH, beside this Python (for a virtual environment that is not activated), in
    CUDA's folders, or beside PATH's nvcc."""
    cuda = [os.environ[n] for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    places = [Path(sys.executable).parent, *(Path(home) / "bin" for home in cuda)]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parent)
    places.append(Path("/usr/local/cuda/bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))


def tail(log: Path, lines: int = 1) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join([*filter(None, map(str.rstrip, text.splitlines()))][-lines:])[-2000:]
