"""The first two parts of a GPU report: the extension is built in place, and tests/gpu is run.

No pip, no setuptools and no network: CMake alone, with what the environment has. Imports nothing of
llama_fast.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .files import commit, write

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("triton", "cuda")
WORKERS = 6  # of pytest-xdist, where that is installed: compiling kernels is what takes the time


def build(seconds: float, root: Path = ROOT) -> dict[str, Any]:
    """Outside a checkout there is nothing to build."""
    content: dict[str, Any] = {"part": "build", "complete": True}
    if not (root / "setup.py").exists():
        return {**content, "what": "installed, nothing to build"}
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None:
        return {**content, "complete": False, "error": "cmake is not installed"}
    folder = root / "build" / f"report-{sys.implementation.cache_tag}"
    configure = [cmake, "-S", str(root), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    architectures = os.environ.get("CMAKE_CUDA_ARCHITECTURES")
    if architectures:
        configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", "--no-warn-unused-cli"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    end = time.monotonic() + seconds
    for command in (configure, [cmake, "--build", str(folder), "--parallel", jobs]):
        output, code = _limited(command, end - time.monotonic(), root)
        if code != 0:
            why = f"cmake ended with {code}" if code else f"not built within {seconds:.0f} s"
            print("\n".join(output.splitlines()[-30:]), flush=True)
            return {**content, "complete": False, "error": why, "output": output[-6000:]}
    return content


def _tool(name: str) -> str | None:
    """On PATH, or beside this Python: a virtual environment that is not activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def test(path: Path, seconds: float, tests: tuple[str, ...] = ("tests/gpu",)) -> None:
    """Writes path: what tests/gpu says of each GPU backend, one after the other. Whatever has ended
    when the time is over counts."""
    content: dict[str, Any] = {"part": "tests", "complete": False, "commit": commit()}
    content.update(counts={}, failed={}, skipped={}, backends={})
    if not all((ROOT / t.split("::")[0]).exists() for t in tests):
        write(path, {**content, "complete": True, "what": "no tests in this installation"})
        return
    end = time.monotonic() + seconds
    for i, backend in enumerate(BACKENDS):
        missing = _missing(backend)
        if missing:
            content["backends"][backend] = {"complete": True, "what": missing}
            print(f"{backend}: not tested, {missing}", flush=True)
            continue
        left = (end - time.monotonic()) / (len(BACKENDS) - i)
        try:
            _test(backend, left, tests, content["backends"])
        finally:
            write(path, {**content, **_together(content["backends"])})
    content.update(_together(content["backends"]))
    content["complete"] = all(found["complete"] for found in content["backends"].values())
    write(path, content)


def _missing(backend: str) -> str | None:
    built = any((ROOT / "llama_fast").glob("_cuda.*so"))
    return None if backend == "triton" or built else "llama_fast._cuda was not built"


def _together(backends: dict[str, Any]) -> dict[str, Any]:
    """All backends' results as one; a test's name is followed by its backend."""
    counts: Counter[str] = Counter()
    merged: dict[str, Any] = {"failed": {}, "skipped": {}}
    errors = [f"{name}: {found['error']}" for name, found in backends.items() if "error" in found]
    for name, found in backends.items():
        counts.update(found.get("counts", {}))
        for key, into in merged.items():
            into.update({f"{test} on {name}": why for test, why in found.get(key, {}).items()})
    return {"counts": dict(counts), **merged, **({"error": "; ".join(errors)} if errors else {})}


def _test(backend: str, seconds: float, tests: tuple[str, ...], into: dict[str, Any]) -> None:
    """into[backend]: complete, counts, passed (a number for each test function), failed, skipped,
    slowest; error and output where pytest itself failed or the time ran out."""
    content: dict[str, Any] = {"complete": False}
    into[backend] = content
    with tempfile.TemporaryDirectory(prefix="llama_fast-tests-") as folder:
        results = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_results"]
        command += ["--timeout", "120", *tests]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(WORKERS), "--dist", "worksteal"]
        environment = {
            "LLAMA_FAST_RESULTS": str(results),
            "LLAMA_FAST_TEST_BACKEND": backend,
            "PYTHONUNBUFFERED": "1",
        }
        began = time.monotonic()
        try:
            output, code = _limited(command, seconds, ROOT, **environment)
        finally:
            lines = results.read_text().splitlines() if results.exists() else []
            content.update(_counted([json.loads(line) for line in lines]))
            content["seconds"] = round(time.monotonic() - began, 1)
    content["complete"] = code in (0, 1)
    if code is None:
        content["error"] = f"not done within {seconds:.0f} s; counted is what was"
    elif code not in (0, 1):
        content.update(error=f"pytest ended with {code}", output=output[-4000:])
    print(f"{backend}:", "\n".join(output.splitlines()[-12:]), flush=True)


def _counted(ended: list[dict[str, Any]]) -> dict[str, Any]:
    slowest = sorted(ended, key=lambda r: -r["seconds"])[:10]
    return {
        "counts": dict(Counter(r["outcome"] for r in ended)),
        "passed": dict(Counter(r["test"].split("[")[0] for r in ended if r["outcome"] == "passed")),
        "failed": {r["test"]: r["why"] for r in ended if r["outcome"] in ("failed", "error")},
        "skipped": {r["test"]: r["why"] for r in ended if r["outcome"] == "skipped"},
        "slowest": {r["test"]: r["seconds"] for r in slowest},
    }


def _limited(
    command: list[str], seconds: float, folder: Path, **environment: str
) -> tuple[str, int | None]:
    """The output, and the exit code: None when it had to be stopped, with all its children."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                _stop(process)
        log.seek(0)
        return log.read(), code


def _stop(process: subprocess.Popen[bytes], patience: float = 8.0) -> None:
    """First as Ctrl-C would, so that pytest can end its own children."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        end = time.monotonic() + patience
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
