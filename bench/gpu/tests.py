"""Run a GPU report's parts before its figures: build, tests/gpu, compute-sanitizer, precompile.

They need CMake and pytest, no pip, setuptools or network, and import neither llama_fast nor torch.
Each part is a function of (args, seconds) that returns a line for each problem. It ends in time,
whatever its processes do.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..results.files import ROOT, commit, write
from .processes import limited, tail, tool

# Seconds per test; Triton's compile as they run. A kernel that hangs blocks its test: the timeout's
# thread ends the process, and xdist starts another one.
TIMEOUTS = {"cuda": "20", "triton": "90"}
# Not loadgroup, loadfile or loadscope: with those pytest-xdist 3.8 waits forever, or repeats the
# test, after a lost worker (its issues 1323, 1327 and 1378).
SIDE_BY_SIDE = ("-n", "2", "--dist", "worksteal", "--max-worker-restart", "50")
LARGE = "big or large"  # marks of tests that take gigabytes
NO_TESTS = 5  # pytest's exit code if no test was selected

Problems = list[str]


# ---- the build ----


def build(target: str, args: argparse.Namespace, seconds: float) -> Problems:
    """Build a target, if this is a checkout. _cpu and _cuda are built apart, so that Triton's part
    does not depend on nvcc."""
    if not (ROOT / "setup.py").exists():
        return []
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        return [f"build{target}: cmake is not installed"]
    folder = ROOT / "build" / f"report-{sys.implementation.cache_tag}"
    chip = os.environ.get("CMAKE_CUDA_ARCHITECTURES") or f"{args.sm[3:] or 90}-real"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DLLAMA_FAST_CUDA={'on' if target == '_cuda' else 'off'}"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={chip}", "--no-warn-unused-cli"]
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    make = [cmake, "--build", str(folder), "--target", target, "--parallel", jobs]
    end, nvcc = time.monotonic() + seconds, tool("nvcc") or "nvcc"
    log = args.out / "logs" / f"build{target}.log"
    for command in (configure, make):
        code = limited(command, end - time.monotonic(), log, CUDACXX=nvcc)
        if code != 0:
            why = f"cmake ended with {code}" if code else f"not built within {seconds:.0f} s"
            print(tail(log, 30), flush=True)
            return [f"build{target}: {why}"]
    return []


def precompile(args: argparse.Namespace, seconds: float) -> Problems:
    """Compile the ops' kernels on all cores into Triton's cache, for the processes that measure.
    Failures are not problems; the log has them."""
    command = [sys.executable, "-m", "bench.static", "triton", "--served", args.sm or "sm_90"]
    only = ["--kernel", "rms_norm"] if args.tiny else []
    limited([*command, *only], seconds, args.out / "logs" / "precompile.log")
    return []


# ---- tests/gpu ----


def run(backend: str, args: argparse.Namespace, seconds: float) -> Problems:
    """Run tests/gpu without those where torch.compile takes minutes, one process per file, side by
    side; with --tiny only the small cases. Tests that take gigabytes run last, two at a time."""
    if why := missing(backend, args):
        print(f"tests-{backend}: {why}", flush=True)
        return []
    end, lock = time.monotonic() + seconds, threading.Lock()
    found: dict[str, Any] = {"backend": backend, "commit": commit(), "files": {}}
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))

    def one(name: str, paths: list[Path], marks: str) -> None:
        content = _pytest(args, f"{backend}-{name}", backend, paths, marks, end - time.monotonic())
        with lock:
            found["files"][name] = content
            write(args.out / f"tests-{backend}.json", found)

    marks = "sanitize" if args.tiny else f"not ({LARGE})"
    with ThreadPoolExecutor(2 if args.tiny else len(files)) as pool:
        for future in [pool.submit(one, path.stem, [path], marks) for path in files]:
            future.result()
    if not args.tiny:
        one("large", files, LARGE)
    problems = []
    for name, content in found["files"].items():
        failed = {**content["failed"], **({"": content["error"]} if "error" in content else {})}
        problems += [f"{backend} {name} {test}: {why}" for test, why in failed.items()]
    passed = sum(content["passed"] for content in found["files"].values())
    print(f"tests-{backend}: {passed} passed, {len(problems)} problems", flush=True)
    return problems


def missing(backend: str, args: argparse.Namespace) -> str | None:
    if not (ROOT / "tests" / "gpu").exists():
        return "no tests in this installation"
    module = "_cuda" if args.device == "cuda" else "_cuda_emulated"
    built = any((ROOT / "llama_fast").glob(f"{module}.*so"))
    return None if backend == "triton" or built else f"llama_fast.{module} was not built"


def _pytest(
    args: argparse.Namespace, name: str, backend: str, files: list[Path], marks: str, seconds: float
) -> dict[str, Any]:
    """Run files' tests; return passed, failed, skipped, and error if pytest failed or timed out."""
    results, log = (args.out / "logs" / f"{name}.{kind}" for kind in ("xml", "log"))
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *map(str, files)]
    command += ["--junitxml", str(results), "-m", marks, "-k", "not compiles_without"]
    command += ["--timeout", TIMEOUTS[backend], "--timeout-method", "thread"]
    command += SIDE_BY_SIDE if importlib.util.find_spec("xdist") and not args.tiny else ()
    environment = {"LLAMA_FAST_TEST_BACKEND": backend}
    if backend == "cuda" and args.device == "cpu":
        environment["LLAMA_FAST_CUDA_EMULATOR"] = "1"
    began = time.monotonic()
    code = limited(command, seconds, log, **environment)
    content = {**counted(results), "seconds": round(time.monotonic() - began, 1)}
    if code not in (0, 1, NO_TESTS) or not results.exists():  # such as pytest-timeout's
        why = f"not done within {seconds:.0f} s" if code is None else f"pytest ended with {code}"
        content["error"] = f"{why}: {tail(log)}"
    return content


def counted(results: Path) -> dict[str, Any]:
    """Count a JUnit file's tests; without a file there are none."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    groups = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    for case in ElementTree.parse(results).iter("testcase") if results.exists() else ():
        outcome = next((child for child in case if child.tag in groups), None)
        if outcome is None:
            found["passed"] += 1
        else:
            name = f"{case.get('classname')}::{case.get('name')}"
            found[groups[outcome.tag]][name] = (outcome.get("message") or "").strip()[:500]
    return found


def sanitizer(args: argparse.Namespace, seconds: float) -> Problems:
    """Run memcheck and synccheck on the CUDA kernels by tests/gpu/sanitize.py."""
    if args.device == "cpu" or missing("cuda", args):
        return []
    results, log = args.out / "sanitizer.json", args.out / "logs" / "sanitizer.log"
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--backend", "cuda"]
    command += ["--tool", "memcheck", "--tool", "synccheck", "--json", str(results)]
    code = limited([*command, "--seconds", f"{max(1.0, seconds / 2 - 3):.0f}"], seconds, log)
    return [] if code == 0 else [f"sanitizer: {tail(log) or 'did not end'}"]
