"""Report on a GPU in two calls of a few minutes, each of which may start on a bare machine.

Call 1 builds and tests the CUDA kernels, also under compute-sanitizer. Call 2 builds, tests
Triton's kernels, and runs the suite with both backends side by side, one process per op, then the
forward pass. Without --call both run, one after the other. DIR receives tests-cuda.json,
tests-triton.json, sanitizer.json, bench.json (a run of the suite) and logs/. Each is rewritten as
soon as there is a result, so a call that is killed keeps its results. Every process has a time
limit. A kernel that faults or hangs loses its own op's figures or its own file's tests.
Needs an environment with torch, triton, pytest, cmake, ninja and pybind11, and no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ..results import files
from ..results.files import commit, read, write
from . import processes, tests
from .processes import limited, tail
from .tests import Problems

# Each call's steps: parts that run side by side, and their time limit in seconds. Later steps get
# the time that a step leaves, the last one all of it.
CALLS: dict[int, tuple[tuple[tuple[str, ...], float], ...]] = {
    1: ((("build-cpu",), 120), (("build-cuda",), 110), (("tests-cuda", "sanitizer"), 120)),
    2: (
        (("build-cpu",), 120),
        (("build-cuda", "precompile", "tests-triton"), 160),
        (("ops",), 180),
        (("forward",), 150),
    ),
}
SECONDS = {1: 215.0, 2: 450.0}  # per call; 230 and 470 with the stop of the last part
PARTS = [*dict.fromkeys(part for steps in CALLS.values() for parts, _ in steps for part in parts)]
AN_OP = 60.0  # time limit of an op's process in seconds
HERE = """
import json, torch
there, sm = torch.cuda.is_available(), "sm_{}{}"
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "gpu": torch.cuda.get_device_name() if there else None,
    "sm": sm.format(*torch.cuda.get_device_capability()) if there else "",
}))
"""
EPILOG = f"""parts, in this order: {" ".join(PARTS)}

examples:
  {{prog}} --gpu-report DIR                    both calls, one after the other
  {{prog}} --gpu-report DIR --call 1
  {{prog}} --gpu-report DIR --only ops --case attention --seconds 900
  {{prog}} --gpu-report DIR --call 2 --tiny --device cpu    a rehearsal without a GPU

exit status: 0; 1 a test failed, a result was wrong, or a part did not end; 2 it cannot run here;
130 interrupted"""


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
    add("--tiny", action="store_true", help="tiny shapes, to test the report itself")
    add("--debug", action="store_true", help="show a traceback for errors")
    return p


def prepared(args: argparse.Namespace, prog: str) -> set[str]:
    """Return the wanted parts. Raises ValueError if the report cannot run."""
    wanted = {part.strip() for part in args.only.split(",") if part.strip()}
    unknown = sorted(wanted - {*PARTS})
    if unknown or not wanted:
        got = ", ".join(unknown) or "nothing"
        raise ValueError(f"--only: got {got}, want any of {', '.join(PARTS)}")
    if args.device == "cpu" and not args.tiny:
        raise ValueError(f"--device cpu: only with --tiny; `{prog}` measures a CPU")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        code = limited([sys.executable, "-c", HERE], 40.0, log)  # a driver may hang
        said = tail(log)
    if code != 0:
        raise ValueError(f"torch does not start here: {said}; `{prog}` measures this machine's CPU")
    here = json.loads(said)
    if args.device == "cuda" and not here["sm"]:
        raise ValueError(f"torch sees no GPU here; `{prog}` measures this machine's CPU")
    args.out, args.sm = args.out.resolve(), here["sm"]
    print("  ".join(f"{name} {value}" for name, value in {**here, "commit": commit()}.items()))
    return wanted


def main(argv: list[str], prog: str = "python -m bench") -> int:
    args = parser(prog).parse_args(argv)
    try:
        wanted = prepared(args, prog)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    problems: Problems = []
    status = 0
    with processes.interruptible():
        try:
            for call in [args.call] if args.call else CALLS:
                problems += _run(args, call, wanted)
        except KeyboardInterrupt:
            print("interrupted; the figures measured so far are kept", file=sys.stderr)
            status = 130
    print("\n".join([f"PROBLEM {line}" for line in problems] or ["nothing was wrong"]))
    print(f"written: {args.out}", flush=True)
    return status or (1 if problems else 0)


def _run(args: argparse.Namespace, call: int, wanted: set[str]) -> Problems:
    """Run the call's steps until its time is over."""
    steps = [([p for p in parts if p in wanted], most) for parts, most in CALLS[call]]
    steps = [step for step in steps if step[0]]
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


# ---- figures ----


def ops(args: argparse.Namespace, seconds: float) -> Problems:
    """Run the suite, one process per op. If a process dies, repeat its op on the first backend
    alone, which so keeps its figures when the other one faults."""
    backends = ["triton", "cuda"] if args.device == "cuda" else ["cpu", "reference"]
    if args.device == "cuda" and tests.missing("cuda", args):
        backends = backends[:1]
    listed = args.out / "logs" / "list.log"
    listed.unlink(missing_ok=True)
    every = ["--device", args.device, "--case", args.case, "--full", "--peers", "none", "--list"]
    limited([sys.executable, "-m", "bench", *every], 60.0, listed)
    lines = [line.split() for line in listed.read_text().splitlines()]
    names = list(dict.fromkeys(words[0] for words in lines if words and words[0] != "forward"))
    end, problems = time.monotonic() + seconds, []
    for i, name in enumerate(names):
        # Twice its share at most, so that a slow op leaves time for the later ones.
        share = 2 * (end - time.monotonic()) / (len(names) - i)
        for chosen in [backends, backends[:1]][: len(backends)]:
            left = min(AN_OP, max(15.0, share), end - time.monotonic())
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
    return _measured(args, "forward", ["--op", "forward", "--no-plot"], seconds)


def _measured(args: argparse.Namespace, name: str, options: list[str], seconds: float) -> Problems:
    """Run one process of the suite, and merge what it measured into bench.json."""
    file, log = args.out / "logs" / f"{name}.json", args.out / "logs" / f"{name}.log"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "--device", args.device, "--case", args.case]
    command += ["--model", "tiny", "--quick", "--peers", "none"] if args.tiny else []
    code = limited([*command, *options, "--json", str(file)], seconds, log)
    print(tail(log, 3 if code else 30), flush=True)
    found = read(file) if file.exists() else {"ops": [], "failed": {}}
    if file.exists():
        path = args.out / "bench.json"
        write(path, merged(read(path), found) if path.exists() else found)
    if code is None:
        return [f"{name}: its process had not ended within {seconds:.0f} s"]
    if code not in (0, 1):
        return [f"{name}: its process ended with {code}: {tail(log)}"]
    wrong = [f"{files.name(r)}: WRONG" for r in found["ops"] if r["wrong"]]
    return wrong + [f"{case}: {why}" for case, why in found["failed"].items()]


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Merge two runs of the suite; a later row of a case replaces the earlier one."""
    rows = {files.name(r): r for r in [*one["ops"], *other["ops"]]}
    both = {**one, **other, "ops": list(rows.values())}
    for key in ("skipped", "failed", "peers"):
        both[key] = {**one[key], **other[key]}
    both["complete"] = one["complete"] and other["complete"]
    both["options"] = {**other["options"], "backend": one["options"]["backend"]}
    return both


STEPS: dict[str, Callable[[argparse.Namespace, float], Problems]] = {
    "build-cpu": partial(tests.build, "_cpu"),
    "build-cuda": partial(tests.build, "_cuda"),
    "tests-cuda": partial(tests.run, "cuda"),
    "sanitizer": tests.sanitizer,
    "precompile": tests.precompile,
    "tests-triton": partial(tests.run, "triton"),
    "ops": ops,
    "forward": forward,
}
