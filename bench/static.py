"""python -m bench.static: every Triton kernel and configuration, compiled and checked, GPU or not.

Each op is called on tensors without memory while its launches are recorded (common.record), for
every chip and every configuration offered there; each distinct launch is then compiled as it would
be on that chip. A row says what came out and what is wrong with it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton

from llama_fast.kernels import common

from . import compiled, static_table
from .occupancy import Occupancy
from .results import report
from .static_rules import Case, compare, fits, problems

EPILOG = """examples:
  python -m bench.static                              everything (minutes)
  python -m bench.static --arch sm_90 --kernel attention
  python -m bench.static --first                      each Tuner's best guess only
  python -m bench.static --write docs/kernels.md      put the table between its markers, and
                                                      static_table.json beside the cost model

Exit code 1: a kernel spills, exceeds a chip, or lost an instruction that it is built on."""


@dataclass
class Row:
    """One kernel as compiled for one chip."""

    op: str
    kernel: str
    cases: list[str]
    config: str
    config_index: int
    arch: str
    grid: tuple[int, ...]
    shared_limit: int
    facts: compiled.Facts | None = None
    occupancy: Occupancy | None = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class Job:
    """A row to be, with what it takes to compile and to judge it."""

    row: Row
    specialised: compiled.Specialised | None
    needs: set[str]
    blocks: int


def collect(cases: Iterable[Case], archs: Iterable[str], first: Container[str] = ()) -> list[Job]:
    """Records every case on every chip with every configuration (in `first`: the first one); equal
    launches become one job."""
    jobs: dict[str, Job] = {}
    for arch in archs:
        chip = common.CHIPS[arch]
        for case in (case for case in cases if arch in case.chips):
            index = offered = 0
            while index == 0 or (index < offered and arch not in first):
                try:
                    with compiled.record(chip, index) as recording:
                        case.call()
                except Exception as error:  # a row of its own: the others are still worth having
                    _failed(jobs, case, arch, index, _brief(error))
                    break
                offered = max((len(offer) for offer in recording.offers.values()), default=1)
                for launch in recording.launches:
                    _add(jobs, case, arch, index, launch)
                index += 1
    return list(jobs.values())


def _failed(jobs: dict[str, Job], case: Case, arch: str, index: int, message: str) -> None:
    row = Row(case.op, case.op, [case.name], "", index, arch, (), 0, problems=[message])
    jobs[f"failed {arch} {case.op} {case.name}"] = Job(row, None, set(), 0)


def _add(jobs: dict[str, Job], case: Case, arch: str, index: int, launch: common.Launch) -> None:
    chip, kernel = common.CHIPS[arch], launch.kernel.__name__
    try:
        specialised = compiled.specialise(launch, chip)
    except Exception as error:
        _failed(jobs, case, arch, index, f"{kernel}: {_brief(error)}")
        return
    job = jobs.get(specialised.key)
    if job is None:
        row = Row(
            op=case.op,
            kernel=kernel,
            cases=[],
            config=str(launch.config),
            config_index=index,
            arch=arch,
            grid=launch.grid,
            shared_limit=chip.shared_memory,
        )
        job = jobs[specialised.key] = Job(row, specialised, set(), 0)
    if case.name not in job.row.cases:
        job.row.cases.append(case.name)
    job.needs |= set(case.needs.get(kernel, ()))
    if index == 0 and arch == "sm_90":
        planned = dict(launch.config.constants).get("PER_SM", 1)  # programs a persistent grid has
        job.blocks = max(job.blocks, planned, case.blocks.get(kernel, 1))


def _brief(error: BaseException) -> str:
    """One line: where Triton was, and the innermost reason."""
    reason = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    lines = [" ".join(text.split()) for text in (str(error), str(reason))]
    at = lines[0].split(":", 2)[:2] if reason is not error else []
    return f"{type(reason).__name__}: {lines[1][-400:]}" + (f" ({':'.join(at)})" if at else "")


def compile_job(job: Job) -> Row:
    row, start = job.row, time.perf_counter()
    if job.specialised is None:
        return row
    try:
        # Disassembling takes as long as compiling: for what is launched unless someone tunes.
        sass = row.arch == "sm_90" and row.config_index == 0
        row.facts = compiled.compile_facts(job.specialised, sass)
    except Exception as error:
        row.problems.append(f"does not compile: {_brief(error)}")
        return row
    row.seconds = time.perf_counter() - start
    facts = row.facts
    row.occupancy = fits(row.arch, facts)
    row.problems += problems(row.arch, facts, row.shared_limit, job.needs, job.blocks)
    return row


_jobs: list[Job] = []  # inherited by the forked workers: a launch does not pickle


def _compile_index(index: int) -> tuple[int, Row]:
    return index, compile_job(_jobs[index])


def run(
    jobs: list[Job], processes: int, tick: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Compiles in forked processes; rows come back in the order of the jobs."""
    _jobs[:] = jobs
    rows: list[Row | None] = [None] * len(jobs)
    with multiprocessing.get_context("fork").Pool(max(1, min(processes, len(jobs)))) as pool:
        for index, row in pool.imap_unordered(_compile_index, range(len(jobs))):
            rows[index] = row
            tick(row)
    return [row for row in rows if row is not None]


def line(row: Row) -> str:
    head = f"{row.kernel:<28}{row.arch:<8}{row.config:<52}"
    if row.facts is None or row.occupancy is None:
        return head + "; ".join(row.problems)
    f, o = row.facts, row.occupancy
    found = ", ".join(name for name in f.instructions if name not in ("tf32", "local memory"))
    text = (
        f"{head}{f.registers:>5}{f.spills:>7}{f.shared:>8}/{row.shared_limit:<7}"
        f"{o.blocks:>3} x {o.warps // max(o.blocks, 1):<3} {found}"
    )
    return text + (f"  WRONG: {'; '.join(row.problems)}" if row.problems else "")


HEADER = (
    f"{'kernel':<28}{'chip':<8}{'configuration':<52}{'regs':>5}{'spills':>7}{'shared/limit':>16}"
    f" {'blocks x warps':<8} instructions"
)


def markdown(rows: Iterable[Row]) -> str:
    """sm_90 with every configuration, the other chips with the first. Cases that share a kernel
    and a configuration share a line: the most registers, and the instructions that all have."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.arch == "sm_90" or row.config_index == 0:
            groups.setdefault((row.arch, row.kernel, row.config), []).append(row)
    lines = [
        "| chip | kernel | configuration | for | registers | spills | shared memory / limit "
        "| blocks x warps an SM | instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (arch, kernel, config), group in sorted(groups.items(), key=lambda g: _ORDER[g[0][0]]):
        facts = [row.facts for row in group if row.facts]
        fits = [row.occupancy for row in group if row.occupancy]
        if len(facts) < len(group):
            lines.append(f"| {arch} | {kernel} | {config} | does not compile | | | | | |")
            continue
        cases = ", ".join(dict.fromkeys(case for row in group for case in row.cases))
        shared = [f.instructions for f in facts]
        found = [name for name in shared[0] if all(name in other for other in shared)]
        tightest = min(fits, key=lambda o: o.blocks)
        lines.append(
            f"| {arch} | `{kernel}` | {config} | {cases} | {max(f.registers for f in facts)} "
            f"| {sum(f.spills for f in facts) or 'none'} "
            f"| {max(f.shared for f in facts)} / {group[0].shared_limit} "
            f"| {tightest.blocks} x {tightest.warps // max(tightest.blocks, 1)} "
            f"| {', '.join(found)} |"
        )
    return "\n".join(lines)


_ORDER = {arch: i for i, arch in enumerate(("sm_90", "sm_80", "sm_89", "sm_100", "gfx942"))}


def to_json(rows: list[Row], seconds: float) -> dict[str, Any]:
    return {
        "triton": triton.__version__,
        "seconds": round(seconds, 1),
        "rows": [asdict(row) for row in rows],
    }


@functools.cache
def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.static",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--arch", nargs="+", choices=common.CHIPS, default=list(common.CHIPS), metavar="CHIP")
    add("--kernel", nargs="+", metavar="NAME", help="only these files of kernels/")
    add(
        "--first",
        nargs="*",
        choices=common.CHIPS,
        metavar="CHIP",
        help="each Tuner's first configuration only, on these chips or all",
    )
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--json", type=Path, metavar="FILE")
    add(
        "--write",
        type=Path,
        metavar="FILE",
        help="put the table between FILE's markers, and one for the cost model beside this file",
    )
    add("--cases", default="static_cases", metavar="MODULE", help="another list of cases")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if common.INTERPRETED:  # its kernels cannot be compiled: again, in a process without
        ambient = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", __spec__.name, *(sys.argv[1:] if argv is None else argv)]
        return subprocess.call(command, env=ambient)
    start = time.perf_counter()
    package = None if "." in args.cases else __package__
    module = importlib.import_module(f".{args.cases}" if package else args.cases, package)
    cases = [case for case in module.CASES if not args.kernel or case.op in args.kernel]
    if not cases:
        print(f"static: no kernel named {', '.join(args.kernel or ())}", file=sys.stderr)
        return 2
    first = () if args.first is None else args.first or args.arch
    jobs = collect(cases, args.arch, first)
    print(f"Triton {triton.__version__}: {len(jobs)} kernels to compile")
    print(HEADER, flush=True)
    rows = run(jobs, args.jobs, lambda row: print(line(row), flush=True))
    compare(cases, rows)
    seconds = time.perf_counter() - start
    wrong = [row for row in rows if row.problems]
    print("".join(f"{line(row)}\n" for row in wrong), end="")
    print(f"{len(rows)} kernels, {len(wrong)} with problems, {seconds:.0f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(to_json(rows, seconds), indent=1) + "\n")
    if args.write:
        title = f"Triton {triton.__version__}, compiled and not run:\n\n"
        report.insert(args.write, title + markdown(rows), "static")
        static_table.save(to_json(rows, seconds))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
