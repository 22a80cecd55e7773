"""The parts of a GPU report that come before its figures: versions, the build, tests/gpu, and
kernels compiled ahead of their measurement.

No pip, no setuptools and no network: CMake and pytest, with what the environment has. Imports
nothing of llama_fast or torch. Each part is a function of (args, seconds), writes what its
processes print into DIR/logs, and returns what became of it: complete, and counts, failed, skipped
or error. It ends in time, whatever its processes do.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from . import processes
from .files import commit

ROOT = processes.ROOT
WORKERS = 14  # of pytest-xdist: compiling kernels and importing torch is what takes the time
# Not loadgroup, loadfile or loadscope: with those pytest-xdist 3.8 waits for ever, or runs the same
# test again, where a worker was lost (its issues 1323, 1327 and 1378).
LARGE = "big or large"  # marks: takes gigabytes
SIDE_BY_SIDE = ("--dist", "worksteal", "--max-worker-restart", "200")
# A hung kernel holds a test for ever; the thread ends its process, and xdist starts another one.
TIMEOUTS = {"cuda": "20", "triton": "90"}  # seconds a test; Triton's compile as they run
NO_TESTS = 5  # pytest's exit code: nothing of that kind
LAUNCH = 30.0  # seconds of a process that launches an op for the first time
# What costs a process its GPU context, as torch names it, and our launches after it.
LOST = re.compile("CUDA error|an illegal |misaligned address|unspecified launch failure")
FAMILIES = {  # tests/gpu/test_<family>.py -> the ops whose kernels it is about
    "rms_norm": ("rms_norm", "add_rms_norm", "rms_norm_fp8"),
    "activation": ("silu_and_mul", "silu_and_mul_fp8"),
    "rope": ("apply_rope", "apply_rope_and_append"),
    "attention": ("attention",),
    "decode_attention": ("attention_with_kvcache",),
    "quantize": ("quantize_fp8",),
    "fp8_gemm": ("fp8_gemm", "fp8_linear"),
}
OPS = tuple(op for ops in FAMILIES.values() for op in ops)

Content = dict[str, Any]


# ---- what is here ----

VERSIONS = """
import importlib.metadata, json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda}
for name in ("triton", "transformers", "pytest", "pytest-xdist", "pytest-timeout", "matplotlib"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
if torch.cuda.is_available():
    found["gpu"] = torch.cuda.get_device_name()
    found["sm"] = "sm_" + "".join(map(str, torch.cuda.get_device_capability()))
print(json.dumps(found))
"""


def versions(seconds: float) -> Content:
    """environment: what figures depend on. Asked in a process: a driver may hang."""
    with tempfile.TemporaryDirectory(prefix="llama_fast-versions-") as folder:
        log = Path(folder) / "log"
        output, code = processes.limited([sys.executable, "-c", VERSIONS], seconds, log)
        if code != 0:
            why = f"no end within {seconds:.0f} s" if code is None else processes.tail(output)
            return {"complete": False, "error": f"torch does not start here: {why}"}
        found = json.loads(processes.tail(output))
        for name in ("nvcc", "cmake", "compute-sanitizer"):
            tool = processes.tool(name)
            said = processes.limited([tool, "--version"], 10.0, log)[0] if tool else ""
            found[name] = next(iter(re.findall(r"\d+\.\d+[.\d]*", said)), None)
    return {"complete": True, "environment": {**found, "commit": commit()}}


# ---- the build ----


def build(target: str, args: argparse.Namespace, seconds: float) -> Content:
    """_cpu by itself first: what nvcc does or does not do costs Triton's kernels nothing. Outside a
    checkout there is nothing to build."""
    if not (ROOT / "setup.py").exists():
        return {"complete": True, "what": "installed, nothing to build"}
    cmake, ninja = processes.tool("cmake"), processes.tool("ninja")
    if cmake is None:
        return {"complete": False, "error": "cmake is not installed"}
    folder = ROOT / "build" / f"report-{sys.implementation.cache_tag}"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DLLAMA_FAST_CUDA={'on' if target == '_cuda' else 'off'}"]
    configure += ["--no-warn-unused-cli"]
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    chip = os.environ.get("CMAKE_CUDA_ARCHITECTURES") or f"{args.sm[3:] or 90}-real"
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={chip}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    make = [cmake, "--build", str(folder), "--target", target, "--parallel", jobs]
    end, nvcc = time.monotonic() + seconds, processes.tool("nvcc") or "nvcc"
    for what, command in (("configure", configure), ("build", make)):
        log = args.out / "logs" / f"{what}{target}.log"
        output, code = processes.limited(command, end - time.monotonic(), log, CUDACXX=nvcc)
        if code != 0:
            why = f"cmake ended with {code}" if code else f"not built within {seconds:.0f} s"
            print(processes.tail(output, 30), flush=True)
            return {"complete": False, "error": f"{target}: {why}", "output": output[-6000:]}
    return {"complete": True}


# ---- tests/gpu ----


def launch(args: argparse.Namespace, seconds: float) -> Content:
    """Each CUDA op for the first time: the small cases of each family, and the op alone on a GPU,
    every one in a process that is killed after LAUNCH. struck_off: the families that hung or lost
    their GPU context, and why; the tests after this leave them out."""
    if why := _missing("cuda", args):
        return {"complete": True, "what": why}
    struck_off = args.struck_off = {}
    jobs = {name: [f"tests/gpu/test_{name}.py", "-m", "sanitize"] for name in FAMILIES}
    alone = "tests/gpu/test_hardware.py::test_matches_the_reference"
    if args.device == "cuda":
        jobs |= {op: [f"{alone}[{op}]"] for op in OPS}
    end = time.monotonic() + seconds

    def one(name: str) -> Content | None:
        left = end - time.monotonic()
        if left < LAUNCH / 2 or processes.interrupted.is_set():  # it would say nothing of the op
            return None
        return _pytest(f"launch-{name}", "cuda", jobs[name], min(LAUNCH, left), args)

    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        ended = {n: found for n, found in zip(jobs, pool.map(one, jobs), strict=True) if found}
    for name, found in ended.items():
        lost = [row.strip() for why in found["failed"].values() for row in why.splitlines()]
        lost = [row for row in lost if LOST.search(row)]
        if error := found.get("error") or next(iter(lost), None):
            family = next(f for f, ops in FAMILIES.items() if name in (f, *ops))
            struck_off[family] = f"{name}: {error}"[:300]
    content = {**_joined(ended), "struck_off": struck_off, "planned": [*jobs], "done": [*ended]}
    return {**content, "complete": len(ended) == len(jobs)}


def _joined(runs: dict[str, Content]) -> Content:
    """Several runs of pytest as one; what has no test to blame bears the run's name."""
    joined: Content = {"complete": all(found["complete"] for found in runs.values())}
    for key in ("counts", "passed"):
        joined[key] = dict(sum((Counter(found[key]) for found in runs.values()), Counter()))
    for key in ("failed", "skipped", "slowest"):
        joined[key] = {name: what for found in runs.values() for name, what in found[key].items()}
    joined["failed"] |= {name: found["error"] for name, found in runs.items() if "error" in found}
    return joined


def tests(backend: str, args: argparse.Namespace, seconds: float) -> Content:
    """All of tests/gpu but what torch.compile takes minutes for; with --tiny the small cases. What
    takes gigabytes comes last and two at a time: fourteen of them exceed a GPU's memory."""
    content: Content = {"complete": True, "commit": commit()}
    if why := _missing(backend, args):
        return {**content, "what": why}
    struck_off = args.struck_off if backend == "cuda" else {}
    what = ["tests/gpu", "-k", _without(struck_off)]
    what += [f"--ignore=tests/gpu/test_{family}.py" for family in struck_off]
    end, found = time.monotonic() + seconds, {}
    every = ((f"not ({LARGE})", WORKERS), (LARGE, 2))
    for only, workers in (("sanitize", 2),) if args.tiny else every:
        beside = ["-n", str(min(workers, os.cpu_count() or 1)), *SIDE_BY_SIDE]
        chosen = [*what, "-m", only, *(beside if importlib.util.find_spec("xdist") else ())]
        name, left = f"tests-{backend}{'-large' * (only == LARGE)}", end - time.monotonic()
        found[name] = _pytest(name, backend, chosen, left, args)
    content |= _joined(found)
    if struck_off:  # choices are made from what ran to its end
        content["complete"] = False
        content["skipped"] |= {f"tests of {family}": why for family, why in struck_off.items()}
    return content


def _without(struck_off: Iterable[str]) -> str:
    """For pytest's -k. The model's tests launch every op."""
    ops = [op for family in struck_off for op in FAMILIES[family]]
    also = f" and not (test_hardware and ({' or '.join(ops)})) and not test_model" if ops else ""
    return f"not compiles_without{also}"


def _missing(backend: str, args: argparse.Namespace) -> str | None:
    if not (ROOT / "tests" / "gpu").exists():
        return "no tests in this installation"
    module = "_cuda" if args.device == "cuda" else "_cuda_emulated"
    built = any((ROOT / "llama_fast").glob(f"{module}.*so"))
    return None if backend == "triton" or built else f"llama_fast.{module} was not built"


def _pytest(
    name: str, backend: str, what: list[str], seconds: float, args: argparse.Namespace
) -> Content:
    """complete, counts, passed (a number for each test function), failed, skipped, slowest; error
    where pytest itself failed or the time ran out, with the tests that were running."""
    with tempfile.TemporaryDirectory(prefix="llama_fast-tests-") as folder:
        results = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "bench.pytest_results", "--timeout", TIMEOUTS[backend]]
        command += ["--timeout-method", "thread", *what]
        emulated = {"LLAMA_FAST_CUDA_EMULATOR": "1"} if args.device == "cpu" else {}
        environment = {"LLAMA_FAST_RESULTS": str(results), "LLAMA_FAST_TEST_BACKEND": backend}
        environment |= emulated if backend == "cuda" else {}
        began, log = time.monotonic(), args.out / "logs" / f"{name}.log"
        output, code = processes.limited(command, seconds, log, **environment)
        lines = results.read_text().splitlines() if results.exists() else []
    content = _counted([json.loads(line) for line in lines])
    content.update(complete=code in (0, 1, NO_TESTS), seconds=round(time.monotonic() - began, 1))
    running = ", ".join(content.pop("running"))[:300]
    if code is None:
        content["error"] = f"not done within {seconds:.0f} s" + (running and f", in {running}")
    elif not content["complete"]:
        said = f" in {running}" if running else f": {processes.tail(output)}"
        content["error"] = f"pytest ended with {code}{said}"
    print(f"{name}: {processes.tail(output)}", flush=True)
    return content


def _counted(lines: list[dict[str, Any]]) -> Content:
    ended = [r for r in lines if r["outcome"] != "started"]
    settled = {r["test"] for r in ended}
    slowest = sorted(ended, key=lambda r: -r["seconds"])[:10]
    return {
        "counts": dict(Counter(r["outcome"] for r in ended)),
        "passed": dict(Counter(r["test"].split("[")[0] for r in ended if r["outcome"] == "passed")),
        "failed": {r["test"]: r["why"] for r in ended if r["outcome"] in ("failed", "error")},
        "skipped": {r["test"]: r["why"] for r in ended if r["outcome"] == "skipped"},
        "slowest": {r["test"]: r["seconds"] for r in slowest},
        "running": [r["test"] for r in lines if r["test"] not in settled],
    }


# ---- compute-sanitizer, and kernels ahead of time ----


def sanitize(tool: str, args: argparse.Namespace, seconds: float) -> Content:
    """tests/gpu/sanitize.py on the CUDA kernels, as far as the time goes."""
    if args.device == "cpu" or (why := _missing("cuda", args)):
        return {"complete": True, "what": "needs a GPU" if args.device == "cpu" else why}
    logs = args.out / "logs"
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--tool", tool, "--backend", "cuda"]
    command += ["--seconds", f"{max(1.0, seconds - 3):.0f}", "--json", str(logs / f"{tool}.json")]
    if struck_off := args.struck_off:
        command += ["-k", " and ".join(f"not test_{family}.py" for family in struck_off)]
    output, code = processes.limited([*command, "--logs", str(logs)], seconds, logs / f"{tool}.log")
    print(processes.tail(output), flush=True)
    if code not in (0, 1):
        return {"complete": False, "error": f"{tool}: {processes.tail(output) or 'did not end'}"}
    (found,) = json.loads((logs / f"{tool}.json").read_text())["runs"]
    bad = found["errors"] or {"failed", "error"} & {*found["cases"]}  # not: cut short
    wrong = {tool: found["why"]} if bad else {}
    return {"complete": found["passed"], "counts": found["cases"], "failed": wrong, **found}


def precompile(args: argparse.Namespace, seconds: float) -> Content:
    """What the ops and the model launch, compiled by every core into Triton's cache, where the
    processes that measure find it."""
    chip = args.sm or "sm_90"
    path = args.out / "logs" / "static.json"
    command = [sys.executable, "-m", "bench.static", "triton", "--served", chip]
    command += ["--json", str(path), *(("--kernel", "rms_norm") if args.tiny else ())]
    output, code = processes.limited(command, seconds, args.out / "logs" / "precompile.log")
    if code not in (0, 1) or not path.exists():
        why = f"not done within {seconds:.0f} s" if code is None else processes.tail(output)
        return {"complete": False, "error": f"precompile: {why}"}
    rows = json.loads(path.read_text())["rows"]
    wrong = {f"{r['kernel']} {r['cases'][0]}": "; ".join(r["problems"]) for r in rows}
    failed = {name: why for name, why in wrong.items() if why}
    return {"complete": True, "counts": {"compiled": len(rows)}, "failed": failed}


PARTS: dict[str, Callable[[argparse.Namespace, float], Content]] = {
    "build-cpu": partial(build, "_cpu"),
    "build-cuda": partial(build, "_cuda"),
    "launch": launch,
    "tests-cuda": partial(tests, "cuda"),
    "memcheck": partial(sanitize, "memcheck"),
    "synccheck": partial(sanitize, "synccheck"),
    "precompile": precompile,
    "tests-triton": partial(tests, "triton"),
}
