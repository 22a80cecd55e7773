"""The parts of a GPU report that come before its figures: versions, the build, tests/gpu, and
kernels compiled ahead of their measurement.

No pip, no setuptools and no network: CMake and pytest, with what the environment has. Imports
nothing of llama_fast or torch. Each part is a function of (args, seconds), writes what its
processes print into DIR/logs, and returns what became of it: complete, and counts, failed, skipped
or error. It ends in time, whatever its processes do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .files import commit

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 4.0  # seconds for a process to end when asked to, and again when killed
WORKERS = 14  # of pytest-xdist: compiling kernels and importing torch is what takes the time
# Not loadgroup, loadfile or loadscope: with those pytest-xdist 3.8 waits for ever, or runs the same
# test again, where a worker was lost (its issues 1323, 1327 and 1378).
SIDE_BY_SIDE = ("--dist", "worksteal", "--max-worker-restart", "200")
# A hung kernel holds a test for ever; the thread ends its process, and xdist starts another one.
TIMEOUTS = {"cuda": "20", "triton": "90"}  # seconds a test; Triton's compile as they run
NO_TESTS = 5  # pytest's exit code: nothing of that kind
LAUNCH = 30.0  # seconds of a process that launches an op for the first time
LOST = "CUDA error"  # how torch names what costs a process its GPU context
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


# ---- processes ----

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
    """For an interrupt: whoever waits for one of them goes on, and starts no other."""
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


def _tool(name: str) -> str | None:
    """On PATH, beside this Python (a virtual environment that is not activated), or in CUDA's."""
    cuda = [os.environ[n] for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    folders = [str(Path(home) / "bin") for home in (*cuda, "/usr/local/cuda")]
    places = (None, str(Path(sys.executable).parent), os.pathsep.join(folders))
    return next((found for path in places if (found := shutil.which(name, path=path))), None)


def _tail(output: str, lines: int = 1) -> str:
    return "\n".join([*filter(None, map(str.rstrip, output.splitlines()))][-lines:])[-2000:]


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
        output, code = limited([sys.executable, "-c", VERSIONS], seconds, log)
        if code != 0:
            why = f"no end within {seconds:.0f} s" if code is None else _tail(output)
            return {"complete": False, "error": f"torch does not start here: {why}"}
        found = json.loads(_tail(output))
        for name in ("nvcc", "cmake", "compute-sanitizer"):
            text = limited([tool, "--version"], 10.0, log)[0] if (tool := _tool(name)) else ""
            found[name] = next((n for n in re.findall(r"\d+\.\d+[.\d]*", text)), None)
    return {"complete": True, "environment": {**found, "commit": commit()}}


# ---- the build ----


def build_cpu(args: argparse.Namespace, seconds: float) -> Content:
    return _build("_cpu", "off", seconds, args)


def build_cuda(args: argparse.Namespace, seconds: float) -> Content:
    """After build_cpu: what nvcc does or does not do costs Triton's kernels nothing."""
    return _build("_cuda", "on", seconds, args, CUDACXX=_tool("nvcc") or "nvcc")


def _build(
    target: str, cuda: str, seconds: float, args: argparse.Namespace, **environment: str
) -> Content:
    """Outside a checkout there is nothing to build."""
    if not (ROOT / "setup.py").exists():
        return {"complete": True, "what": "installed, nothing to build"}
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None:
        return {"complete": False, "error": "cmake is not installed"}
    folder = ROOT / "build" / f"report-{sys.implementation.cache_tag}"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DLLAMA_FAST_CUDA={cuda}", "--no-warn-unused-cli"]
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    chip = os.environ.get("CMAKE_CUDA_ARCHITECTURES") or f"{args.sm[3:] or 90}-real"
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={chip}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    build = [cmake, "--build", str(folder), "--target", target, "--parallel", jobs]
    end = time.monotonic() + seconds
    for what, command in (("configure", configure), ("build", build)):
        log = args.out / "logs" / f"{what}{target}.log"
        output, code = limited(command, end - time.monotonic(), log, **environment)
        if code != 0:
            why = f"cmake ended with {code}" if code else f"not built within {seconds:.0f} s"
            print(_tail(output, 30), flush=True)
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
        left = min(LAUNCH, end - time.monotonic())
        return _pytest(f"launch-{name}", "cuda", jobs[name], left, args) if left > 2 else None

    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        ended = {n: found for n, found in zip(jobs, pool.map(one, jobs), strict=True) if found}
    for name, found in ended.items():
        lost = [why for why in found["failed"].values() if LOST in why]
        if why := found.get("error") or (lost and _line(lost[0], LOST)):
            family = next(f for f, ops in FAMILIES.items() if name in (f, *ops))
            struck_off[family] = f"{name}: {why}"[:300]
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


def tests_cuda(args: argparse.Namespace, seconds: float) -> Content:
    return _tests("cuda", args, seconds)


def tests_triton(args: argparse.Namespace, seconds: float) -> Content:
    return _tests("triton", args, seconds)


def _tests(backend: str, args: argparse.Namespace, seconds: float) -> Content:
    """All of tests/gpu but what torch.compile takes minutes for; with --tiny the small cases. What
    takes gigabytes comes last and two at a time: fourteen of them exceed a GPU's memory."""
    content: Content = {"complete": True, "commit": commit()}
    if why := _missing(backend, args):
        return {**content, "what": why}
    struck_off = args.struck_off if backend == "cuda" else {}
    what = ["tests/gpu", "-k", _without(struck_off)]
    what += [f"--ignore=tests/gpu/test_{family}.py" for family in struck_off]
    end, found = time.monotonic() + seconds, {}
    for only, workers in {"sanitize": 2} if args.tiny else {"not big": WORKERS, "big": 2}.items():
        beside = ["-n", str(min(workers, os.cpu_count() or 1)), *SIDE_BY_SIDE]
        chosen = [*what, "-m", only, *(beside if importlib.util.find_spec("xdist") else ())]
        name, left = f"tests-{backend}-{only.replace(' ', '-')}", end - time.monotonic()
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
        output, code = limited(command, seconds, log, **environment)
        lines = results.read_text().splitlines() if results.exists() else []
    content = _counted([json.loads(line) for line in lines])
    content.update(complete=code in (0, 1, NO_TESTS), seconds=round(time.monotonic() - began, 1))
    running = ", ".join(content.pop("running"))[:300]
    if code is None:
        content["error"] = f"not done within {seconds:.0f} s" + (running and f", in {running}")
    elif not content["complete"]:
        said = f" in {running}" if running else f": {_tail(output)}"
        content["error"] = f"pytest ended with {code}{said}"
    print(f"{name}: {_tail(output)}", flush=True)
    return content


def _line(text: str, word: str) -> str:
    return next(line.strip() for line in text.splitlines() if word in line)


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


def memcheck(args: argparse.Namespace, seconds: float) -> Content:
    return _sanitize("memcheck", args, seconds)


def synccheck(args: argparse.Namespace, seconds: float) -> Content:
    return _sanitize("synccheck", args, seconds)


def _sanitize(tool: str, args: argparse.Namespace, seconds: float) -> Content:
    """tests/gpu/sanitize.py on the CUDA kernels, as far as the time goes."""
    if args.device == "cpu" or (why := _missing("cuda", args)):
        return {"complete": True, "what": "needs a GPU" if args.device == "cpu" else why}
    logs = args.out / "logs"
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--tool", tool, "--backend", "cuda"]
    command += ["--seconds", f"{max(1.0, seconds - 3):.0f}", "--json", str(logs / f"{tool}.json")]
    if struck_off := args.struck_off:
        command += ["-k", " and ".join(f"not test_{family}.py" for family in struck_off)]
    output, code = limited([*command, "--logs", str(logs)], seconds, logs / f"{tool}.log")
    print(_tail(output), flush=True)
    if code not in (0, 1):
        return {"complete": False, "error": f"{tool}: {_tail(output) or 'did not end'}"}
    (found,) = json.loads((logs / f"{tool}.json").read_text())["runs"]
    bad = found["errors"] or {"failed", "error"} & {*found["cases"]}  # not: cut short
    wrong = {tool: found["why"]} if bad else {}
    return {"complete": found["passed"], "counts": found["cases"], "failed": wrong, **found}


def precompile(args: argparse.Namespace, seconds: float) -> Content:
    """What the ops and the model launch, compiled by every core into Triton's cache, where the
    processes that measure find it."""
    chip = args.sm or "sm_90"
    path = args.out / "logs" / "static.json"
    command = [sys.executable, "-m", "bench.static", "--arch", chip, "--first"]
    command += ["--json", str(path), *(("--kernel", "rms_norm") if args.tiny else ())]
    output, code = limited(command, seconds, args.out / "logs" / "precompile.log")
    if code not in (0, 1) or not path.exists():
        why = f"not done within {seconds:.0f} s" if code is None else _tail(output)
        return {"complete": False, "error": f"precompile: {why}"}
    rows = json.loads(path.read_text())["rows"]
    wrong = {f"{r['kernel']} {r['cases'][0]}": "; ".join(r["problems"]) for r in rows}
    failed = {name: why for name, why in wrong.items() if why}
    return {"complete": True, "counts": {"compiled": len(rows)}, "failed": failed}
