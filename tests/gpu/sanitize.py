"""Run compute-sanitizer over tests/gpu's small cases: python -m tests.gpu.sanitize, in the
checkout.

This needs a GPU, compute-sanitizer (part of the CUDA toolkit) and, for the cuda backend, a built
extension. The cases are marked `sanitize`: the smallest of each op and of each kernel's path. A run
is one tool on one backend. It passes if the tool found nothing, the tool printed its summary,
pytest passed and at least one case ran. A tool may report no errors because the tests crashed
early.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from llama_fast.bench.gpu import processes
from llama_fast.bench.gpu.tests import counted

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("triton", "cuda")
FOUND = 66  # the tool's exit code if it found something; pytest never returns it
SECONDS = 280.0  # a run's limit: two fit a command of ten minutes
SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
RACES = re.compile(
    r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)",
    re.MULTILINE,
)
VERSION = re.compile(r"Version (\d+)\.(\d+)")
OPTIONS = {
    # PyTorch asks CUDA for things that may be absent and handles the answer: not a kernel's error.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
    "synccheck": (),
}


class Doubt(NamedTuple):
    """Describe an error that a tool's release notes admit before a version, on sm_90 and later. Its
    errors count all the same; the note only says which version to try again."""

    tool: str
    before: tuple[int, int]
    what: str


DOUBTS = (
    Doubt("memcheck", (2026, 2), "does not check TMA loads"),
    Doubt("racecheck", (2026, 1), "reports races between warpgroups that are synchronized"),
    Doubt("racecheck", (2026, 3), "may report races where an mbarrier counts a TMA load's bytes"),
    Doubt("initcheck", (2026, 1), "takes what TMA stores wrote for uninitialized"),
    Doubt("synccheck", (2025, 2), "mistakes arrivals at barriers that count bytes"),
)


class Excluded(NamedTuple):
    """Exclude a kernel from a tool, by a part of its name, with the reason."""

    tool: str
    kernel: str
    why: str


# Empty until a run on a GPU shows a false alarm. Never exclude a fault of our own.
EXCLUDED: tuple[Excluded, ...] = ()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m tests.gpu.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--tool", action="append", choices=TOOLS, help="repeatable; default: all")
    p.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable; default: both")
    p.add_argument("-k", default="", metavar="EXPR", help="pytest's, to split what takes too long")
    p.add_argument(
        "--seconds", type=float, default=SECONDS, help="of each run, default %(default)g"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    p.add_argument("--logs", type=Path, metavar="DIR", help="keep each run's whole output there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Return 0 if nothing was found, 1 if a run found an error or did not end, 2 if none can
    run."""
    args = parser().parse_args(argv)
    sanitizer = processes.tool("compute-sanitizer")
    if sanitizer is None:
        return _refuse(
            "compute-sanitizer was not found on PATH, in $CUDA_HOME/bin or beside nvcc: install "
            "CUDA's toolkit (package cuda-sanitizer), or set CUDA_HOME"
        )
    if not _has_gpu():
        return _refuse("torch sees no GPU here")
    version = _version(sanitizer)
    print(f"{sanitizer}, version {'.'.join(map(str, version)) if version else 'unknown'}")
    results = []
    for backend in args.backend or BACKENDS:
        if backend == "cuda" and not any((ROOT / "llama_fast").glob("_cuda.*so")):
            print("cuda      not run: llama_fast._cuda was not built", flush=True)
            results.append({"backend": backend, "tool": None, "passed": bool(not args.backend)})
            continue
        for tool in args.tool or TOOLS:
            results.append(run(sanitizer, version, tool, backend, args))
            print(line(results[-1]), flush=True)
            if args.json:  # after each, since a longer command's limit may end this one
                args.json.write_text(json.dumps({"runs": results}, indent=1) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


def _refuse(message: str) -> int:
    print(f"sanitize: {message}", file=sys.stderr)
    return 2


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _version(sanitizer: str) -> tuple[int, int] | None:
    out = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    found = VERSION.search(out)
    return (int(found[1]), int(found[2])) if found else None


def command(sanitizer: str, tool: str, k: str, seconds: float, results: Path) -> list[str]:
    """Return the command. pytest ends before the limit, so that the tool can print its summary."""
    excluded = [f"kernel_substring={e.kernel}" for e in EXCLUDED if e.tool == tool]
    return [
        *(sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"),
        *OPTIONS[tool],
        *(option for name in excluded for option in ("--kernel-name-exclude", name)),
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "0"),
        *("--session-timeout", f"{0.85 * seconds:.0f}"),
        *("--junitxml", str(results), "-m", "sanitize", "tests/gpu"),
        *(("-k", k) if k else ()),
    ]


def run(
    sanitizer: str,
    version: tuple[int, int] | None,
    tool: str,
    backend: str,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Run one tool on one backend. Return what it found and whether that passes."""
    print(f"{backend:<8}{tool:<10} ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="llama_fast-sanitize-") as folder:
        results, log = Path(folder) / "results.xml", Path(folder) / "output"
        environment = {
            **os.environ,
            "LLAMA_FAST_TEST_BACKEND": backend,
            "PYTHONUNBUFFERED": "1",
            # A cached block is larger than its tensor and hides a read past the end. The tool takes
            # segments that grow for writes out of bounds.
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
        }
        began = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command(sanitizer, tool, args.k, args.seconds, results),
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _wait(process, began + args.seconds)
        seconds = time.monotonic() - began
        text = log.read_text(errors="replace")
        found = counted(results)
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        (args.logs / f"{backend}-{tool}.log").write_text(text)
    groups = {"passed": found["passed"], "failed": len(found["failed"])}
    cases = Counter({**groups, "skipped": len(found["skipped"])}) + Counter()  # without zeros
    found = judge(tool, text, code, cases, args.seconds)
    notes = doubts(tool, version) if found["errors"] else []
    if not found["passed"]:
        print("\n".join(_excerpt(text)), flush=True)
    return {
        "backend": backend,
        "tool": tool,
        **found,
        "cases": dict(cases),
        "seconds": round(seconds, 1),
        "notes": notes,
        "excluded": [e._asdict() for e in EXCLUDED if e.tool == tool],
    }


def _wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    """Return the exit code, or kill the process group at the time limit and return None."""
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        code = process.poll()
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code


def judge(
    tool: str, text: str, code: int | None, cases: Counter[str], limit: float
) -> dict[str, Any]:
    """Return errors (the tool's count, races included; None without a summary), passed, why."""
    pattern = RACES if tool == "racecheck" else SUMMARY
    counts = [int(found[1]) for found in pattern.finditer(text)]  # one for each process
    errors = sum(counts) if counts else None
    why = []
    if code is None or "session-timeout: " in text:
        why.append(f"not done within {limit:.0f} s; split it with -k")
    elif code not in (0, FOUND):
        why.append(f"ended with {code}")
    if errors is None:
        why.append(f"no summary of {tool}")
    elif errors or code == FOUND:
        why.append(f"{errors} {'hazards' if tool == 'racecheck' else 'errors'}")
    if bad := cases["failed"]:
        why.append(f"{bad} cases failed")
    elif not cases["passed"]:
        why.append("no case ran")
    return {"errors": errors, "passed": not why, "why": "; ".join(why)}


def doubts(tool: str, version: tuple[int, int] | None) -> list[str]:
    return [
        f"on sm_90 and later, {tool} before {d.before[0]}.{d.before[1]} {d.what}"
        for d in DOUBTS
        if d.tool == tool and (version is None or version < d.before)
    ]


def _excerpt(text: str) -> list[str]:
    """Return the tool's first report and the end of the output."""
    lines = text.splitlines()
    reports = [row for row in lines if row.startswith("=========")]
    return [*reports[:25], "...", *lines[-8:]]


def line(result: dict[str, Any]) -> str:
    cases = sum(n for outcome, n in result["cases"].items() if outcome != "skipped")
    state = "passed" if result["passed"] else f"FAILED: {result['why']}"
    notes = "".join(f"\n         note: {note}" for note in result["notes"])
    errors = "?" if result["errors"] is None else result["errors"]
    return (
        f"{result['backend']:<8}{result['tool']:<10}{errors:>5} errors {cases:>4} cases "
        f"{result['seconds']:>6.0f} s  {state}{notes}"
    )


if __name__ == "__main__":
    sys.exit(main())
