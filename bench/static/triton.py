"""Compile every Triton kernel and check it, without a GPU: python -m bench.static triton.

It calls each op on tensors without memory and records its launches (common.record), for every chip
and every configuration offered there. It compiles each distinct launch as for that chip, and prints
its facts and problems. A Tuner's configurations after the first are compiled only for the largest
calls of a kernel and, on sm_90, for those that promise equal bits.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton

from llama_fast.kernels import common
from llama_fast.kernels.common import Launch

from .compiled import Facts, compile_facts, record, specialize
from .occupancy import Occupancy, occupancy

EPILOG = """Exit code 1: a kernel spills, exceeds a chip's limits, or lacks an instruction that it
needs. Without --every, --served and --largest, every configuration on every chip (minutes)."""

# A need -> chip -> the instructions that meet it, "|" between alternatives. Tiles of fewer than 64
# rows ("small") are too small for wgmma and tcgen05.
_MMA = {"sm_80": "mma", "sm_89": "mma", "gfx942": "mfma"}
WORDS: dict[str, dict[str, str]] = {
    "matrix": {**_MMA, "sm_90": "wgmma", "sm_100": "tcgen05"},
    "small matrix": {**_MMA, "sm_90": "mma|wgmma", "sm_100": "mma|tcgen05"},
    "16-bit matrix": {"sm_80": "mma", "gfx942": "mfma"},  # chips that do not multiply e4m3
    "e4m3 matrix": {"sm_89": "mma e4m3", "sm_90": "wgmma e4m3", "sm_100": "tcgen05 e4m3"},
    "small e4m3 matrix": {
        "sm_89": "mma e4m3",
        "sm_90": "mma e4m3|wgmma e4m3",
        "sm_100": "mma e4m3|tcgen05 e4m3",
    },
    "async copy": {
        **dict.fromkeys(("sm_80", "sm_89"), "cp.async"),
        **dict.fromkeys(("sm_90", "sm_100"), "cp.async|TMA"),
    },
    "16-byte loads": dict.fromkeys(common.CHIPS, "16-byte loads|TMA|cp.async"),
    "16-byte stores": dict.fromkeys(common.CHIPS, "16-byte stores|TMA stores"),
    "hardware e4m3": dict.fromkeys(("sm_89", "sm_90", "sm_100"), "cvt e4m3"),
    "ex2": dict.fromkeys(common.CHIPS, "ex2"),
}
ANY = ""  # in a case's needs: every kernel that they do not name
MAY_SERIALIZE = "may serialize"  # among a kernel's needs: its wgmma may be serialized


@dataclass(frozen=True)
class Case:
    """One call of a public op, with tensors on the meta device."""

    op: str  # its file in kernels/
    name: str
    call: Callable[[], object]
    # kernel -> the WORDS that its code must meet
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # field of Facts -> a group of cases that promise the same bits, and so share its value
    alike: Mapping[str, str] = field(default_factory=dict)
    # Whether no other case needs more of the same kernel in the same tile.
    largest: bool = True
    chips: tuple[str, ...] = tuple(common.CHIPS)
    # kernel -> programs that must fit on one multiprocessor of sm_90, first configuration
    blocks: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Row:
    """One kernel for one chip: the launch to compile, then its facts and problems."""

    op: str
    kernel: str
    arch: str
    config: str = ""
    cases: list[str] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)
    blocks: int = 1  # that must fit on a multiprocessor
    compile: Callable[[], Any] | None = None
    facts: Facts | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.kernel:<28}{self.arch:<8}{self.config:<52}"
        if f := self.facts:
            limit = common.CHIPS[self.arch].shared_memory
            text += f"{f.registers:>5}{f.stack:>7}{f.shared:>8}/{limit:<7} "
            text += f"{resident(self.arch, f)} {', '.join(f.instructions)}"
        return text + "".join(f"  WRONG: {problem}" for problem in self.problems)


HEADER = (
    f"{'kernel':<28}{'chip':<8}{'configuration':<52}{'regs':>5}{'local':>7}{'shared/limit':>16}"
    f" {'blocks x warps':<8} instructions"
)


# ---- what has to be compiled ----


EVERY, SERVED, LARGEST = "every", "served", "largest"  # how much of a chip is compiled


def collect(cases: Iterable[Case], chips: Mapping[str, str]) -> list[Row]:
    """Record the cases on the chips, each to its depth; equal launches become one row."""
    rows: dict[str, Row] = {}
    for arch, depth in chips.items():
        for case in cases:
            matters = case.largest or (bool(case.alike) and arch == "sm_90")
            if arch not in case.chips or (depth == LARGEST and not matters):
                continue
            index, offered = 0, 1
            while index < offered:
                try:
                    with record(common.CHIPS[arch], index) as recording:
                        case.call()
                    for launch in recording.launches:
                        _add(rows, case, arch, index, launch)
                except Exception as error:  # a row of its own, so that the others stay
                    row = Row(case.op, case.op, arch, cases=[case.name])
                    row.problems.append(_brief(error))
                    rows[f"{arch} {case.op} {case.name}"] = row
                    break
                if depth == EVERY and matters:
                    offered = max((len(o) for o in recording.offers.values()), default=1)
                index += 1
    return list(rows.values())


def _add(rows: dict[str, Row], case: Case, arch: str, index: int, launch: Launch) -> None:
    key, compiler = specialize(launch, common.CHIPS[arch])
    kernel = launch.kernel.__name__
    new = Row(case.op, kernel, arch, str(launch.config), compile=compiler)
    row = rows.setdefault(key, new)
    if case.name not in row.cases:
        row.cases.append(case.name)
    row.needs |= set(case.needs.get(kernel, case.needs.get(ANY, ())))
    if index == 0 and arch == "sm_90":
        planned = dict(launch.config.constants).get("PER_SM", 1)  # programs of a persistent grid
        row.blocks = max(row.blocks, planned, case.blocks.get(kernel, 1))


def _brief(error: BaseException) -> str:
    """Return one line: the innermost reason, and where Triton was."""
    reason = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    lines = [" ".join(text.split()) for text in (str(error), str(reason))]
    at = lines[0].split(":", 2)[:2] if reason is not error else []
    return f"{type(reason).__name__}: {lines[1][-400:]}" + (f" ({':'.join(at)})" if at else "")


# ---- compiling ----


_rows: list[Row] = []  # inherited by the forked workers, since compilers do not pickle


def _compile_index(index: int) -> tuple[int, Facts | str]:
    row = _rows[index]
    try:
        assert row.compile
        return index, compile_facts(row.compile, row.arch)
    except Exception as error:
        return index, f"does not compile: {_brief(error)}"


def run(rows: list[Row], processes: int, tick: Callable[[Row], object] = lambda row: None) -> None:
    """Compile in forked processes and check each row when it is done."""
    _rows[:] = rows
    todo = [i for i, row in enumerate(rows) if row.compile]
    gc.collect()
    gc.freeze()  # otherwise each worker's collections would copy this process's pages
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for index, found in pool.imap_unordered(_compile_index, todo):
            row = rows[index]
            if isinstance(found, Facts):
                row.facts = found
                row.problems += problems(row.arch, found, row.needs, row.blocks)
            else:
                row.problems.append(found)
            tick(row)
    gc.unfreeze()


# ---- the rules ----


def resident(arch: str, f: Facts) -> Occupancy:
    return occupancy(arch, f.registers, f.shared, f.threads, f.tensor_memory)


def problems(arch: str, facts: Facts, needs: Iterable[str], blocks: int) -> list[str]:
    """List what is wrong with a kernel."""
    limit, fits = common.CHIPS[arch].shared_memory, resident(arch, facts)
    rules = [
        (facts.stack, f"{facts.stack} bytes of local memory a thread: spills, or an array"),
        (facts.shared > limit, f"{facts.shared} bytes of shared memory, the chip has {limit}"),
        (facts.serialized and MAY_SERIALIZE not in needs, "wgmma is serialized"),
        ("tf32" in facts.instructions, "tf32"),
        *((True, lost) for lost in _lost(arch, facts, needs)),
        (fits.blocks < blocks, f"{fits.blocks} blocks a multiprocessor, limited by {fits.limit}"),
    ]
    return [text for broken, text in rules if broken]


def _lost(arch: str, facts: Facts, needs: Iterable[str]) -> Iterator[str]:
    for need in sorted({*needs} - {MAY_SERIALIZE}):
        accepted = WORDS[need].get(arch)
        if accepted and not {*accepted.split("|")} & {*facts.instructions}:
            yield f"no {accepted.replace('|', ' or ')} ({need})"


def compare(cases: Iterable[Case], rows: Iterable[Row]) -> None:
    """Add a problem to each row that differs from its group's first one in what the bits of a
    result depend on (Case.alike)."""
    wanted = {(case.op, case.name): case.alike for case in cases}
    first: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {}
    for row in rows:
        for name in row.cases if row.facts else ():
            for fact, group in wanted[row.op, name].items():
                found = getattr(row.facts, fact)
                key = (row.op, row.kernel, row.arch, row.config, fact, group)
                other, expected = first.setdefault(key, (name, found))
                if found != expected:
                    row.problems.append(f"other {fact} than {other}: {found}, not {expected}")


# ---- the command ----


def to_json(rows: list[Row]) -> dict[str, Any]:
    kept = ("op", "kernel", "arch", "config", "cases", "problems")
    found = [
        {**{k: getattr(row, k) for k in kept}, "facts": row.facts and asdict(row.facts)}
        for row in rows
    ]
    return {"triton": triton.__version__, "rows": found}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.static triton", description=__doc__, epilog=EPILOG
    )
    for depth, what in (
        (EVERY, "compile every configuration"),
        (SERVED, "the first of each Tuner, which runs without tuning"),
        (LARGEST, "of those, each kernel's largest calls; sm_90: and those of equal bits"),
    ):
        p.add_argument(
            f"--{depth}", nargs="+", choices=common.CHIPS, default=[], metavar="CHIP", help=what
        )
    p.add_argument("--kernel", nargs="+", metavar="NAME", help="only these files of kernels/")
    p.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--cases", default=f"{__package__}.calls", metavar="MODULE", help="other calls")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if common.INTERPRETED:  # its kernels cannot be compiled: repeat in a process without it
        ambient = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", __package__, "triton", *argv]
        return subprocess.call(command, env=ambient)
    start = time.perf_counter()
    cases = importlib.import_module(args.cases).CASES
    cases = [case for case in cases if not args.kernel or case.op in args.kernel]
    if not cases:
        print(f"static triton: no kernel named {', '.join(args.kernel or ())}", file=sys.stderr)
        return 2
    depths = (LARGEST, SERVED, EVERY)
    chips = {chip: depth for depth in depths for chip in getattr(args, depth)}
    rows = collect(cases, chips or dict.fromkeys(common.CHIPS, EVERY))
    print(
        f"Triton {triton.__version__}: {len(rows)} kernels to compile", HEADER, sep="\n", flush=True
    )
    run(rows, args.jobs, lambda row: print(row, flush=True))
    compare(cases, rows)
    wrong = [row for row in rows if row.problems]
    print("".join(f"{row}\n" for row in wrong), end="")
    seconds = time.perf_counter() - start
    print(f"{len(rows)} kernels, {len(wrong)} with problems, {seconds:.0f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(to_json(rows), indent=1) + "\n")
    return 1 if wrong else 0
