"""Everything about a GPU in two calls of a few minutes, each of which may find a bare machine.

Call 1 builds and tests the CUDA kernels, also under compute-sanitizer. Call 2 builds, tests
Triton's kernels, and runs the suite with both backends side by side, a process an op, then the
forward pass. Without --call both run, one after the other. DIR receives tests-cuda.json,
tests-triton.json, sanitizer.json, bench.json (a run of the suite, with its plots) and logs/, each
rewritten as soon as something is known: a call that is killed keeps what it has. Every process has
an end, and a kernel that faults or hangs costs its own op's figures or its own file's tests.
Needs an environment with torch, triton, pytest, cmake, ninja and pybind11, and no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..results.files import ROOT, commit, read, write
from . import processes
from .processes import limited, tail, tool

# Of each call, the steps: parts that run side by side, and the seconds that they may take at most.
# What a step leaves goes to those after it; the last one has all of it.
CALLS: dict[int, tuple[tuple[tuple[str, ...], float], ...]] = {
    1: ((("build-cpu",), 120), (("build-cuda",), 110), (("tests-cuda", "sanitizer"), 120)),
    2: (
        (("build-cpu",), 120),
        (("build-cuda", "precompile", "tests-triton"), 160),
        (("ops",), 180),
        (("forward",), 150),
    ),
}
SECONDS = {1: 215.0, 2: 450.0}  # of a call; with what it takes to stop the last part 230 and 470
PARTS = [*dict.fromkeys(part for steps in CALLS.values() for parts, _ in steps for part in parts)]
# A hung kernel holds a test for ever; the thread ends its process, and xdist starts another one.
TIMEOUTS = {"cuda": "20", "triton": "90"}  # seconds a test; Triton's compile as they run
# Not loadgroup, loadfile or loadscope: with those pytest-xdist 3.8 waits for ever, or runs the same
# test again, where a worker was lost (its issues 1323, 1327 and 1378).
SIDE_BY_SIDE = ("-n", "2", "--dist", "worksteal", "--max-worker-restart", "50")
LARGE = "big or large"  # marks: takes gigabytes
NO_TESTS = 5  # pytest's exit code: nothing of that kind
AN_OP = 60.0  # seconds of an op's process at most
HERE = """
import importlib.metadata, json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None, "sm": ""}
for name in ("triton", "transformers", "pytest", "matplotlib"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
if torch.cuda.is_available():
    found["gpu"] = torch.cuda.get_device_name()
    found["sm"] = "sm_" + "".join(map(str, torch.cuda.get_device_capability()))
print(json.dumps(found))
"""
EPILOG = f"""parts, in this order: {" ".join(PARTS)}

examples:
  {{prog}} --gpu-report DIR                    both calls, one after the other
  {{prog}} --gpu-report DIR --call 1
  {{prog}} --gpu-report DIR --only ops --case attention --seconds 900
  {{prog}} --gpu-report DIR --call 2 --tiny --device cpu    a rehearsal without a GPU

exit status: 0; 1 a test failed, a result was wrong, or a part did not run to its end; 2 it cannot
run here; 130 interrupted"""

Problems = list[str]


def parser(prog: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=f"{prog} --gpu-report",
        description=__doc__,
        epilog=EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--gpu-report", type=Path, required=True, metavar="DIR", dest="out")
    add("--call", type=int, choices=CALLS, help="default: both")
    add("--only", default=",".join(PARTS), metavar="PART,...", help="default: all of the call's")
    add("--seconds", type=float, help=f"of each call, default {SECONDS[1]:g} and {SECONDS[2]:g}")
    add("--case", default="", metavar="TEXT", help="only cases with this in their name")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --tiny")
    add("--tiny", action="store_true", help="tiny shapes: whether the report itself runs")
    add("--debug", action="store_true", help="show a traceback for errors")
    return p


def main(argv: list[str], prog: str = "python -m bench") -> int:
    args = parser(prog).parse_args(argv)
    wanted = {part.strip() for part in args.only.split(",") if part.strip()}
    unknown = sorted(wanted - {*PARTS})
    if unknown or not wanted:
        got = ", ".join(unknown) or "nothing"
        return _refuse(f"--only: got {got}, want any of {', '.join(PARTS)}")
    if args.device == "cpu" and not args.tiny:
        return _refuse(f"--device cpu: only with --tiny; `{prog}` measures a CPU")
    args.out = args.out.resolve()
    fresh = not args.out.exists()
    log = args.out / "logs" / "versions.log"
    code = limited([sys.executable, "-c", HERE], 40.0, log)  # in a process: a driver may hang
    here = json.loads(tail(log)) if code == 0 else {}
    if code != 0 or (args.device == "cuda" and not here["sm"]):
        why = "torch sees no GPU here" if code == 0 else f"torch does not start here: {tail(log)}"
        if fresh:
            log.unlink()
            log.parent.rmdir(), args.out.rmdir()
        return _refuse(f"{why}; `{prog}` measures this machine's CPU")
    args.sm = here["sm"]
    print("  ".join(f"{name} {value}" for name, value in {**here, "commit": commit()}.items()))
    problems: Problems = []
    status = 0
    with processes.interruptible():
        try:
            for call in [args.call] if args.call else CALLS:
                problems += _run(args, call, wanted)
        except KeyboardInterrupt:
            print("interrupted: what was measured is kept", file=sys.stderr)
            status = 130
    print("\n".join([f"PROBLEM {line}" for line in problems] or ["nothing was wrong"]))
    print(f"written: {args.out}", flush=True)
    return status or (1 if problems else 0)


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace, call: int, wanted: set[str]) -> Problems:
    """The call's steps, as far as the time goes."""
    steps = [([p for p in parts if p in wanted], most) for parts, most in CALLS[call]]
    steps = [(parts, most) for parts, most in steps if parts]
    seconds = args.seconds or SECONDS[call]
    end, problems = time.monotonic() + seconds, []
    for parts, most in steps:
        left = end - time.monotonic()
        share = left if parts is steps[-1][0] else min(left, most * seconds / SECONDS[call])
        if share < 2:
            problems.append(f"{' '.join(parts)}: no time left")
            continue
        print(f"--- {' '.join(parts)} (up to {share:.0f} s)", flush=True)
        with ThreadPoolExecutor(len(parts)) as pool:
            running = [pool.submit(STEPS[part], args, share) for part in parts]
            found = [line for future in running for line in future.result()]
        problems += found
        if "build-cpu" in parts and found:
            problems.append("the build failed: nothing after it can run")
            break
    return problems


# ---- the build ----


def build(target: str, args: argparse.Namespace, seconds: float) -> Problems:
    """_cpu by itself first: what nvcc does or does not do costs Triton's kernels nothing. Outside a
    checkout there is nothing to build."""
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
    """What the ops launch, compiled by every core into Triton's cache, where the processes that
    measure find it. A help, not a test: failures are the log's."""
    command = [sys.executable, "-m", "bench.static", "--arch", args.sm or "sm_90", "--first"]
    only = ["--kernel", "rms_norm"] if args.tiny else []
    limited([*command, *only], seconds, args.out / "logs" / "precompile.log")
    return []


# ---- tests/gpu ----


def tests(backend: str, args: argparse.Namespace, seconds: float) -> Problems:
    """All of tests/gpu but what torch.compile takes minutes for, a process a file, side by side;
    with --tiny the small cases. What takes gigabytes comes last, two at a time."""
    if why := _missing(backend, args):
        print(f"tests-{backend}: {why}", flush=True)
        return []
    end, lock = time.monotonic() + seconds, threading.Lock()
    found: dict[str, Any] = {"backend": backend, "commit": commit(), "files": {}}
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))

    def one(name: str, paths: list[Path], marks: str) -> None:
        content = _pytest(f"{backend}-{name}", backend, paths, marks, end - time.monotonic(), args)
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


def _missing(backend: str, args: argparse.Namespace) -> str | None:
    if not (ROOT / "tests" / "gpu").exists():
        return "no tests in this installation"
    module = "_cuda" if args.device == "cuda" else "_cuda_emulated"
    built = any((ROOT / "llama_fast").glob(f"{module}.*so"))
    return None if backend == "triton" or built else f"llama_fast.{module} was not built"


def _pytest(
    name: str,
    backend: str,
    files: list[Path],
    marks: str,
    seconds: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """passed, failed, skipped; error where pytest itself failed or the time ran out."""
    logs = args.out / "logs"
    results, log = logs / f"{name}.xml", logs / f"{name}.log"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    command += ["--junitxml", str(results), "-m", marks, "-k", "not compiles_without"]
    command += ["--timeout", TIMEOUTS[backend], "--timeout-method", "thread"]
    command += SIDE_BY_SIDE if importlib.util.find_spec("xdist") and not args.tiny else ()
    emulated = backend == "cuda" and args.device == "cpu"
    environment = {"LLAMA_FAST_CUDA_EMULATOR": "1"} if emulated else {}
    began = time.monotonic()
    code = limited(
        [*command, *map(str, files)],
        seconds,
        log,
        LLAMA_FAST_TEST_BACKEND=backend,
        **environment,
    )
    content = {**counted(results), "seconds": round(time.monotonic() - began, 1)}
    if code not in (0, 1, NO_TESTS):
        why = f"not done within {seconds:.0f} s" if code is None else f"pytest ended with {code}"
        content["error"] = f"{why}: {tail(log)}"
    return content


def counted(results: Path) -> dict[str, Any]:
    """A JUnit file's tests; all of them empty where there is none."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(results).iter("testcase") if results.exists() else ():
        outcome = {child.tag: child for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        for tag, group in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if tag in outcome:
                found[group][name] = (outcome[tag].get("message") or "").strip()[:500]
                break
        else:
            found["passed"] += 1
    return found


def sanitizer(args: argparse.Namespace, seconds: float) -> Problems:
    """tests/gpu/sanitize.py's memcheck and synccheck of the CUDA kernels."""
    if args.device == "cpu" or _missing("cuda", args):
        return []
    results, log = args.out / "sanitizer.json", args.out / "logs" / "sanitizer.log"
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--backend", "cuda"]
    command += ["--tool", "memcheck", "--tool", "synccheck", "--json", str(results)]
    code = limited([*command, "--seconds", f"{max(1.0, seconds / 2 - 3):.0f}"], seconds, log)
    return [] if code == 0 else [f"sanitizer: {tail(log) or 'did not end'}"]


# ---- figures ----


def ops(args: argparse.Namespace, seconds: float) -> Problems:
    """The suite, a process an op. Where one dies, once more with its first backend alone, so that
    the other's faults cost it nothing."""
    backends = ["triton", "cuda"] if args.device == "cuda" else ["cpu", "reference"]
    if args.device == "cuda" and _missing("cuda", args):
        backends = backends[:1]
    listed = args.out / "logs" / "list.log"
    listed.unlink(missing_ok=True)
    limited([*_suite(args), "--list"], 60.0, listed)
    lines = [line.split() for line in listed.read_text().splitlines()]
    names = list(dict.fromkeys(words[0] for words in lines if words and words[0] != "forward"))
    end, problems = time.monotonic() + seconds, []
    for name in names:
        for chosen in [backends, backends[:1]][: len(backends)]:
            left = min(AN_OP, end - time.monotonic())
            if left < 5:
                problems.append(f"{name}: no time left")
                break
            options = ["--op", name, "--backend", ",".join(chosen), "--no-plot"]
            found = _measured(args, name, options, left)
            problems += found
            if not any("ended" in line for line in found):
                break
    return problems


def forward(args: argparse.Namespace, seconds: float) -> Problems:
    if args.tiny:
        return []
    return _measured(args, "forward", ["--op", "forward"], seconds)


def _suite(args: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "bench", "--device", args.device, "--case", args.case]
    return [*command, *(["--model", "tiny", "--quick", "--peers", "none"] if args.tiny else [])]


def _measured(args: argparse.Namespace, name: str, options: list[str], seconds: float) -> Problems:
    """One process of the suite, and bench.json with what it measured, whatever became of it."""
    file, log = args.out / "logs" / f"{name}.json", args.out / "logs" / f"{name}.log"
    file.unlink(missing_ok=True)
    code = limited([*_suite(args), *options, "--json", str(file)], seconds, log)
    print(tail(log, 3 if code else 30), flush=True)
    found, path = read(file), args.out / "bench.json"
    if found:
        write(path, merged(read(path), found))
    if code is None:
        return [f"{name}: its process had not ended within {seconds:.0f} s"]
    if code not in (0, 1):
        return [f"{name}: its process ended with {code}: {tail(log)}"]
    wrong = [f"{r['op']} {r['shape']}: WRONG" for r in (found or {})["ops"] if r["wrong"]]
    return wrong + [f"{case}: {why}" for case, why in (found or {})["failed"].items()]


def merged(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Two runs of the suite as one; the later one's rows replace the same cases' earlier ones."""
    if one is None:
        return other
    rows = {f"{r['op']} {r['shape']}": r for r in [*one["ops"], *other["ops"]]}
    both = {**one, **other, "ops": list(rows.values())}
    for key in ("skipped", "failed", "peers"):
        both[key] = {**one[key], **other[key]}
    both["complete"] = one["complete"] and other["complete"]
    both["options"] = {**other["options"], "backend": one["options"]["backend"]}
    return both


STEPS: dict[str, Callable[[argparse.Namespace, float], Problems]] = {
    "build-cpu": partial(build, "_cpu"),
    "build-cuda": partial(build, "_cuda"),
    "tests-cuda": partial(tests, "cuda"),
    "sanitizer": sanitizer,
    "precompile": precompile,
    "tests-triton": partial(tests, "triton"),
    "ops": ops,
    "forward": forward,
}
