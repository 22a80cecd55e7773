"""Everything about a GPU in two calls of a few minutes, each of which may find a bare machine.

Call 1 builds, launches every CUDA op and tests the CUDA kernels, also under compute-sanitizer.
Call 2 builds, compiles ahead, tests Triton's kernels and measures: limits, ops on both backends,
the model. A call leaves DIR/callN.tar.gz and DIR/callN.log, and call 2 goes on from the report in a
DIR/call1.tar.gz. Without --call both run one after the other, and report.json, the plots and logs/
lie in DIR itself. Each part runs in processes of its own with an end: a kernel that faults or hangs
costs its own op, and whatever was found is kept.
Needs an environment with torch, triton, pytest, cmake, ninja and pybind11, and no network.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import build_and_test, processes
from .files import BROKEN, WRONG, read, write
from .gpu_summary import merge, problems, summary

# Of each call, the steps: parts that run side by side, and the seconds that they may take at most.
# What a step leaves goes to those after it; the last one has all of it.
Steps = tuple[tuple[tuple[str, ...], float], ...]
CALLS: dict[int, Steps] = {
    1: (
        (("build-cpu",), 120),
        (("build-cuda",), 110),
        (("launch",), 60),
        (("tests-cuda", "memcheck", "synccheck"), 75),
    ),
    2: (
        (("build-cpu",), 120),
        (("build-cuda", "precompile", "tests-triton"), 160),
        (("limits",), 25),
        (("ops",), 140),
        (("model",), 150),
        (("plots",), 30),
    ),
}
VERSIONS_SECONDS = 40.0
SECONDS = {1: 215.0, 2: 450.0}  # of a call; with what it takes to stop the last part 230 and 470
PARTS = [*dict.fromkeys(part for steps in CALLS.values() for parts, _ in steps for part in parts)]
GRACE = 15.0  # of a part's seconds, for the task that runs when the others are over
STALL = 60.0  # seconds without a task's end: a hung kernel, or one that compiles for ever
EPILOG = f"""parts, in this order: {" ".join(PARTS)}

examples:
  python -m bench --gpu-report DIR                    both calls, one after the other
  python -m bench --gpu-report DIR --call 1
  python -m bench --gpu-report DIR --only limits,ops --case attention --seconds 900
  python -m bench --gpu-report DIR --call 2 --tiny --device cpu    a rehearsal without a GPU

Exit code 1: a test failed, a result was wrong, or a part did not run. Missed targets and cases that
the time did not suffice for are told, and are no errors."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench --gpu-report",
        description=__doc__,
        epilog=EPILOG,
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
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    wanted = {part.strip() for part in args.only.split(",") if part.strip()}
    unknown = sorted(wanted - {*PARTS})
    if unknown or not wanted:
        got = ", ".join(unknown) or "nothing"
        return _refuse(f"--only: got {got}, want any of {', '.join(PARTS)}")
    if args.device == "cpu" and not args.tiny:
        return _refuse("--device cpu: only with --tiny; `python -m bench` measures a CPU")
    processes.interrupted.clear()
    began = time.monotonic()
    here = build_and_test.versions(VERSIONS_SECONDS)
    if "error" in here:
        return _refuse(here["error"])
    args.sm = here["environment"].get("sm", "")
    if args.device == "cuda" and not args.sm:
        return _refuse("torch sees no GPU here; `python -m bench` measures this machine's CPU")
    args.out, args.struck_off = args.out.resolve(), {}
    calls, status = [args.call] if args.call else [*CALLS], 0
    with (
        processes.terminated_as_interrupted(),
        _packed(args) if args.call else contextlib.nullcontext(),
    ):
        print("  ".join(f"{name} {value}" for name, value in here["environment"].items()))
        write(args.out / "versions.json", {**here, "wall_s": time.monotonic() - began})
        try:
            for call in calls:
                _run(args, call, wanted, began)
                began = time.monotonic()
        except KeyboardInterrupt:
            print("interrupted: what was measured is kept", file=sys.stderr)
            status = 130
        found = merge(args.out, ["versions", *PARTS])
        print(summary(found), flush=True)
    due = [p for call in calls for parts, _ in CALLS[call] for p in parts if p in wanted]
    return status or (1 if problems(found, [*dict.fromkeys(due)]) else 0)


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _packed(args: argparse.Namespace) -> Iterator[None]:
    """A call's files lie elsewhere, and DIR has them as one file, beside all that is printed: what
    takes files from a rented machine may take few, and none from deep folders."""
    folder, name = args.out, f"call{args.call}"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="llama_fast-", ignore_cleanup_errors=True) as work,
        processes.logged(folder / f"{name}.log"),
    ):
        if args.call == 2 and (folder / "call1.tar.gz").exists():
            with tarfile.open(folder / "call1.tar.gz") as earlier:
                earlier.extract("report.json", work, filter="data")
        args.out, args.pack = Path(work), folder / f"{name}.tar.gz"
        try:
            yield
        finally:
            _pack(args)


def _pack(args: argparse.Namespace) -> None:
    partial = args.pack.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(args.out.iterdir()):
            archive.add(path, path.name)
    partial.replace(args.pack)


def _run(args: argparse.Namespace, call: int, wanted: set[str], began: float) -> None:
    """The call's steps, as far as the time goes; each one's findings are in the report at once."""
    steps = [([p for p in parts if p in wanted], most) for parts, most in CALLS[call]]
    steps = [(parts, most) for parts, most in steps if parts]
    seconds = args.seconds or SECONDS[call]
    end = began + seconds
    for parts, most in steps:
        left = end - time.monotonic()
        share = left if parts is steps[-1][0] else min(left, most * seconds / SECONDS[call])
        if share < 2:
            print(f"--- {' '.join(parts)}: no time left", flush=True)
            continue
        print(f"--- {' '.join(parts)} (up to {share:.0f} s)", flush=True)
        with ThreadPoolExecutor(len(parts)) as pool:
            try:
                for running in [pool.submit(_part, part, args, share) for part in parts]:
                    running.result()
            except KeyboardInterrupt:
                processes.end_all()
                raise
        found = merge(args.out, ["versions", *PARTS])["parts"]
        if args.call:
            _pack(args)
        if "build-cpu" in parts and not found["build-cpu"]["complete"]:
            print("the build failed: nothing after it can run", flush=True)
            break


def _part(part: str, args: argparse.Namespace, seconds: float) -> None:
    """Writes DIR/<part>.json, whatever happens."""
    began, path = time.monotonic(), args.out / f"{part}.json"
    path.unlink(missing_ok=True)
    try:
        if part in ("limits", "ops", "model"):
            work(part, args, seconds)
        else:
            run = plots if part == "plots" else build_and_test.PARTS[part]
            write(path, {"part": part, **run(args, seconds)})
    except Exception as error:  # the report's own fault: the other parts are still worth having
        write(path, {"part": part, "complete": False, "error": f"{type(error).__name__}: {error}"})
    content = read(path)
    if content is not None:
        write(path, {**content, "wall_s": round(time.monotonic() - began, 1)})


def plots(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.gpu_plot", str(args.out)]
    output, code = processes.limited(command, seconds, args.out / "logs" / "plots.log")
    if code == 0:
        return {"complete": True}
    return {"complete": False, "what": (output.strip().splitlines() or ["out of time"])[-1]}


def work(part: str, args: argparse.Namespace, seconds: float) -> None:
    """One of gpu_parts.py's. Started again, after the task that broke it, as long as time lasts."""
    path = args.out / f"{part}.json"
    end = time.monotonic() + seconds - GRACE
    resume = False
    while True:
        command = [sys.executable, "-m", f"{__package__}.gpu_parts", part, "--out", str(args.out)]
        until = time.time() + end - time.monotonic()
        command += ["--until", f"{until:.0f}", "--device", args.device]
        command += ["--case", args.case] + ["--tiny"] * args.tiny + ["--resume"] * resume
        process = processes.start(command)
        try:
            why = watch(process, path, end)
        finally:
            processes.stop(process)
        content = read(path)
        if content is None:
            write(path, {"part": part, "complete": False, "error": f"did not start ({why})"})
            return
        if not why:
            return
        name = content["running"]
        if why == "time":
            pass
        elif name:
            content["failed"][name] = why
            print(f"FAILED {name}: {why}", flush=True)
        elif why != BROKE:  # outside of every task: it would again
            content["error"] = why
        write(path, {**content, "running": None})
        if why == "time" or "error" in content or time.monotonic() > end - 10:
            return
        resume = True


BROKE = "its process lost the GPU"


def watch(
    process: subprocess.Popen[bytes],
    path: Path,
    end: float,
    stall: float = STALL,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Until the process ends: "" for an orderly end, else what became of it."""
    changed, stamp = clock(), _stamp(path)
    while (code := process.poll()) is None:
        now = clock()
        if _stamp(path) != stamp:
            changed, stamp = now, _stamp(path)
        if now > end + GRACE:
            return "time"
        if now - changed > stall:
            return f"no end within {stall:.0f} s: killed"
        sleep(0.1)
    if code in (0, WRONG, 130):
        return ""
    return BROKE if code == BROKEN else f"its process ended with {code}"


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
