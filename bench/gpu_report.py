"""Everything about a GPU in one run: the build, the tests, and each figure beside its target.

Writes DIR/report.json and plots. Each part runs in a process of its own, so that a kernel that
faults or hangs costs its own case; whatever was measured is kept, also when the time runs out.
Needs an environment with torch, triton, pytest, cmake, ninja and pybind11, and no network.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import build_and_test, targets
from .files import BROKEN, WRONG, read, unreached, write

# Seconds of the whole, and how they are shared out. What a part leaves goes to those after it.
BUDGET = 515.0  # with GRACE, this process's start and the plots below 540
GRACE = 15.0  # for the task that runs when a part's time is over
SHARES = {"build": 90, "tests": 150, "limits": 20, "ops": 150, "tune": 45, "model": 85}
PARTS = [*SHARES, "profile"]  # the last only when asked for
STALL = 90.0  # seconds without a task's end: a hung kernel, or one that compiles for ever
STALL_TUNE = 300.0  # which compiles and times many configurations in one task
EPILOG = f"""parts, in this order: {" ".join(SHARES)}; and profile, when asked for

examples:
  python -m bench --gpu-report DIR
  python -m bench --gpu-report DIR --only limits,ops --case attention
  python -m bench --gpu-report DIR --only tune --seconds 1500

Exit code 1: a test failed, a result was wrong, or a case did not run. Missed targets and cases that
the time did not suffice for are told, and are no errors."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench --gpu-report",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--gpu-report", type=Path, required=True, metavar="DIR", dest="out")
    p.add_argument(
        "--only", default=",".join(SHARES), metavar="PART,...", help="default: %(default)s"
    )
    p.add_argument(
        "--seconds", type=float, default=BUDGET, help="for all of it, default %(default)g"
    )
    p.add_argument("--case", default="", metavar="TEXT", help="only cases with this in their name")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --tiny")
    p.add_argument(
        "--tiny", action="store_true", help="tiny shapes: whether the report itself runs"
    )
    return p


class Budget:
    """Seconds for each part: its share of what is left."""

    def __init__(
        self, seconds: float, parts: list[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._shares = {part: SHARES.get(part, 30) for part in parts}

    @property
    def left(self) -> float:
        return max(0.0, self._end - self._clock())

    def of(self, part: str) -> float:
        """Called as the part begins; those before it no longer count."""
        names = list(self._shares)
        waiting = names[names.index(part) :]
        return self.left * self._shares[part] / sum(self._shares[name] for name in waiting)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    wanted = [part.strip() for part in args.only.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        got = ", ".join(unknown) or "nothing"
        return _refuse(f"--only: got {got}, want any of {', '.join(PARTS)}")
    if args.device == "cpu" and not args.tiny:
        return _refuse("--device cpu: only with --tiny; `python -m bench` measures a CPU")
    if args.device == "cuda" and not _has_gpu():
        return _refuse("torch sees no GPU here; `python -m bench` measures this machine's CPU")
    parts = [part for part in PARTS if part in wanted]
    args.out.mkdir(parents=True, exist_ok=True)
    status = _run(args, parts)
    found = merge(args.out)
    print(summary(found), flush=True)
    return status or (1 if problems(found, parts) else 0)


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(args: argparse.Namespace, parts: list[str]) -> int:
    """0, or 130 when interrupted."""
    budget = Budget(args.seconds, parts)
    for part in parts:
        began, seconds = time.monotonic(), budget.of(part)
        path = args.out / f"{part}.json"
        path.unlink(missing_ok=True)
        print(f"--- {part} (up to {seconds:.0f} s)", flush=True)
        try:
            if part == "build":
                write(path, build_and_test.build(seconds))
            elif part == "tests":
                build_and_test.test(path, seconds)
            else:
                work(part, args, seconds)
        except KeyboardInterrupt:
            print("interrupted: what was measured is kept", file=sys.stderr)
            return 130
        finally:
            content = read(path)
            if content is not None:
                write(path, {**content, "wall_s": round(time.monotonic() - began, 1)})
        if part == "build" and not (content or {}).get("complete"):
            print("the build failed: nothing after it can run", flush=True)
            break
    return 0


def work(part: str, args: argparse.Namespace, seconds: float) -> None:
    """One of gpu_parts.py's. Started again, after the task that broke it, as long as time lasts."""
    path = args.out / f"{part}.json"
    end = time.monotonic() + seconds
    resume = False
    while True:
        command = [sys.executable, "-m", f"{__package__}.gpu_parts", part, "--out", str(args.out)]
        until = time.time() + end - time.monotonic()
        command += ["--until", f"{until:.0f}", "--device", args.device]
        command += ["--case", args.case] + ["--tiny"] * args.tiny + ["--resume"] * resume
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "LLAMA_FAST_TUNED": str(args.out),  # the model runs with what tune found
        }
        process = subprocess.Popen(command, env=environment)
        try:
            why = watch(process, path, end, STALL_TUNE if part == "tune" else STALL)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
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


def merge(out: Path) -> dict[str, Any]:
    """All parts in DIR/report.json, those of earlier runs included; plots beside it."""
    path = out / "report.json"
    found = read(path) or {"parts": {}}
    for part in PARTS:
        content = read(out / f"{part}.json")
        if content is not None:
            found["parts"][part] = {**content, "unreached": unreached(content)}
    rows = [row for part in found["parts"].values() for row in part.get("rows", [])]
    environments = [p["environment"] for p in found["parts"].values() if "environment" in p]
    found["environment"] = environments[-1] if environments else {}
    found["targets"] = targets.compare(rows, found["environment"].get("gpu") or "")
    write(path, found)
    for part in PARTS:  # once it is in the report
        (out / f"{part}.json").unlink(missing_ok=True)
    if any("tag" in row for row in rows):
        try:
            from . import gpu_plot

            gpu_plot.draw(found, out)
        except ImportError as error:
            print(f"no plots: {error}; pip install 'llama_fast[bench]'", file=sys.stderr)
    return found


def problems(found: dict[str, Any], parts: list[str]) -> list[str]:
    """What is wrong, a line each, of these parts."""
    lines = []
    for part in parts:
        content = found["parts"].get(part)
        if content is None:
            lines.append(f"{part}: did not run")
            continue
        if content.get("error"):
            lines.append(f"{part}: {content['error'].strip().splitlines()[-1]}")
        for name, error in content.get("failed", {}).items():
            lines.append(f"{part}: {name}: {error.strip().splitlines()[-1][:200]}")
        for row in content.get("rows", []):
            lines += [f"{part}: {row['op']} {row['shape']}: {what}" for what in _faults(row)]
    return lines


def _faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, of the backend that serves and of the other one."""
    eager = f"eager's {row.get('eager_error')}"
    found = [f"WRONG, error {row.get('error')}, {eager}"] if row.get("wrong") else []
    for name, entry in row.get("backends", {}).items():
        if name != row["backend"] and entry.get("wrong"):
            found.append(f"WRONG on {name}, error {entry['error']}, {eager}")
        if "failed" in entry:
            found.append(f"failed on {name}: {entry['failed']}")
    return found


def summary(found: dict[str, Any]) -> str:
    """The end of what is printed: a screen at most."""
    env = found["environment"]
    names = ("gpu", "sm", "driver", "cuda", "torch", "triton", "sm_mhz", "max_sm_mhz", "commit")
    lines = ["", "  ".join(f"{n} {env[n]}" for n in names if env.get(n))]
    for part, content in found["parts"].items():
        counts = [f"{len(content.get('rows', []))} rows"] if "rows" in content else []
        counts += [f"{n} {what}" for what, n in content.get("counts", {}).items()]
        for key in ("failed", "skipped", "unreached"):
            if "counts" not in content and content.get(key):
                counts.append(f"{len(content[key])} {key}")
        state = "" if content.get("complete") else "  INCOMPLETE"
        lines.append(f"{part:<8}{content.get('wall_s', 0):>6.0f} s  {', '.join(counts)}{state}")
        for name, why in list(content.get("skipped", {}).items())[:5]:
            lines.append(f"    left out: {name}: {why[:120]}")
        if content.get("unreached"):
            names_left = ", ".join(content["unreached"])
            lines.append(f"    out of time: {names_left[:300]}")
    ops = found["parts"].get("ops", {}).get("rows", [])
    lines += targets.side_by_side(ops)
    lines += [f"growth of {what}: n^{value:.2f}" for what, value in targets.growth(found).items()]
    if any(entry["got"] is not None for entry in found["targets"]):
        lines.append(targets.table(found["targets"]))
    wrong = problems(found, list(found["parts"]))
    lines += [f"PROBLEM {line}" for line in wrong[:20]] or ["nothing was wrong"]
    return "\n".join(lines)
