"""Check the compiled CUDA kernels without a GPU: python -m bench.static cuda.

It reads registers, local memory, shared memory and instructions of every kernel on every
architecture that llama_fast/_cuda was compiled for, and compares them with PLANS. A planned
instance that is missing, or one that is not planned, is a problem too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import llama_fast
from llama_fast.kernels import common

from .binary import Kernel, ToolError, read
from .occupancy import MULTIPROCESSORS, Occupancy, occupancy
from .plans import BF16, F32, HALF, LOADS, PLANS, Plan, chip

EPILOG = """Exit code 1: a kernel spills, is missing, lacks a planned instruction, or fits fewer
blocks on a multiprocessor than planned. 2: there is nothing to read."""

REGISTERS = 65536  # of a multiprocessor


# ---- the rules ----


def slow_steps(plan: Plan, kernel: Kernel) -> list[str]:
    """List what would make instruction issue the limit of a kernel that memory should bound. A
    division is ten instructions and a branch, one of 64-bit integers a call of a hundred; a mean
    and a scale need a reciprocal each. All loads except two indices and a scale have 16 bytes."""
    vectors = LOADS in plan.needs(kernel.arguments, kernel.arch)
    limits = {
        "divisions": 0,
        "reciprocals": 99 if "ex2" in kernel.instructions else 2,
        "4-byte loads": 3 if vectors and kernel.arguments[0] != F32 else 99,
    }
    found = {what: kernel.counts.get(what, 0) for what in limits}
    return [f"{n} {what}, at most {limits[what]}" for what, n in found.items() if n > limits[what]]


def fits(plan: Plan, kernel: Kernel) -> Occupancy:
    shared, threads = (plan.of(name, kernel.arguments) for name in ("shared", "threads"))
    return occupancy(chip(kernel.arch), kernel.registers, kernel.shared + shared, threads)


def problems(plan: Plan, kernel: Kernel) -> list[str]:
    """List what is wrong with an instance."""
    a, limit = kernel.arguments, common.CHIPS[chip(kernel.arch)].shared_memory
    threads, shared, ahead = (plan.of(name, a) for name in ("threads", "shared", "ahead"))
    local = f"{kernel.stack} bytes of local memory a thread: spills, or an array"
    if not plan.launched(a, kernel.arch):
        return [local] if kernel.stack or "local memory" in kernel.instructions else []
    missing = sorted({*plan.needs(a, kernel.arch)} - {*kernel.instructions})
    # One warpgroup is the producer; ptxas allocates equal registers for the threads of all.
    groups = threads // 128
    pool = min(groups * kernel.registers, REGISTERS // 128)
    resident, m = fits(plan, kernel), MULTIPROCESSORS[chip(kernel.arch)]
    room = m.shared // (-(-shared // 128) * 128 + m.shared_reserved)
    blocks = max(1, min(plan.of("blocks", a), room))
    copied = kernel.ahead * threads * resident.blocks
    k = kernel
    rules = [
        (k.stack or "local memory" in k.instructions, local),
        (k.shared, f"{k.shared} bytes of static shared memory: it is planned as dynamic"),
        (shared > limit, f"{shared} bytes of shared memory, the chip has {limit}"),
        (missing, f"no {', '.join(missing)}"),
        (k.serialized, f"wgmma is serialized: {k.wgmma_groups} groups of {k.wgmmas} instructions"),
        *((True, step) for step in (slow_steps(plan, k) if plan.streams else ())),
        (k.wide_compares > k.wgmmas, f"{k.wide_compares} compares of 64 bits in a loop of wgmma"),
        (k.early_loads, f"{k.early_loads} loads before griddepcontrol.wait"),
        (
            kernel.taken and kernel.released + (groups - 1) * kernel.taken > pool,
            f"setmaxnreg asks for {kernel.released} and {groups - 1} x {kernel.taken} registers of "
            f"{groups} x {kernel.registers}: the last warpgroup waits forever",
        ),
        (
            resident.blocks < blocks,
            f"{kernel.registers} registers: {resident.blocks} blocks a multiprocessor, limited by "
            f"{resident.limit}, planned {blocks}",
        ),
        (
            copied < ahead,
            f"{copied} bytes of copies on a multiprocessor before it waits, planned {ahead}",
        ),
    ]
    return [text for broken, text in rules if broken]


def unexpected(kernels: Iterable[Kernel], plans: Iterable[Plan]) -> list[str]:
    """List instances that are planned and missing, or there and not planned. A build may omit
    sm_80 and sm_89, as the Makefile's does on a machine without a GPU."""
    there = {(k.file, k.name, k.arguments, k.arch) for k in kernels}
    spared = {"sm_80", "sm_89"} - {k[3] for k in there} if there else set()
    planned = {
        (p.file, p.kernel, arguments, arch)
        for p in plans
        for arguments in p.instances
        for arch in {*p.archs} - spared
    }
    return [
        f"{file}.cu: {kernel}<{', '.join(arguments)}> on {arch}: {what}"
        for those, what in ((planned - there, "missing"), (there - planned, "not planned"))
        for file, kernel, arguments, arch in sorted(those)
    ]


# ---- the command ----


class Row(NamedTuple):
    """A planned instance on one architecture."""

    kernel: Kernel
    shared: int  # bytes a block, static and dynamic
    occupancy: Occupancy
    problems: list[str]

    def __str__(self) -> str:
        k = self.kernel
        name = f"{k.file}: {k.name}" + (f"<{', '.join(k.arguments)}>" if k.arguments else "")
        return (
            f"{name.replace(BF16, 'bf16').replace(HALF, 'fp16'):<66}{k.arch:<8}"
            f"{k.registers:>5}{self.shared:>8}  {self.occupancy!s:<15} "
            f"{', '.join(k.instructions)}" + "".join(f"  WRONG: {p}" for p in self.problems)
        )


HEADER = f"{'kernel':<66}{'chip':<8}{'regs':>5}{'shared':>8}  {'blocks x warps':<15} instructions"


def check(kernels: Iterable[Kernel], plans: Iterable[Plan] = PLANS) -> tuple[list[Row], list[str]]:
    """Return a row for each planned instance, and every problem. A file without a plan gets one of
    256 threads and no spills."""
    kernels, plans = list(kernels), list(plans)
    files = {plan.file for plan in plans}
    unplanned = [k for k in kernels if k.file not in files]
    plans += [Plan(k.file, k.name, [k.arguments], 256, 1, archs=(k.arch,)) for k in unplanned]
    by_instance = {(p.file, p.kernel, arguments): p for p in plans for arguments in p.instances}
    found = [
        Row(k, k.shared + p.of("shared", k.arguments), fits(p, k), problems(p, k))
        for k in kernels
        if (p := by_instance.get((k.file, k.name, k.arguments)))
    ]
    wrong = [f"{row.kernel.text}: {problem}" for row in found for problem in row.problems]
    return found, [*unexpected(kernels, plans), *wrong]


def extension() -> Path | None:
    """Return the package's extension; None if none was built."""
    found = sorted(Path(llama_fast.__file__).parent.glob("_cuda.*.so"))
    return found[-1] if found else None


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m bench.static cuda", None, __doc__, EPILOG)
    p.add_argument("--binary", type=Path, metavar="FILE", help="default: llama_fast/_cuda*.so")
    binary = p.parse_args(argv).binary or extension()
    start = time.perf_counter()
    try:
        if binary is None or not binary.exists():
            missing = binary or "llama_fast/_cuda*.so"
            raise ToolError(f"no {missing}: install where nvcc is on PATH")
        found, wrong = check(read(binary))
    except ToolError as error:
        print(f"static cuda: {error}", file=sys.stderr)
        return 2
    print(HEADER, *found, sep="\n")
    print(f"{len(found)} kernels, {time.perf_counter() - start:.0f} s, {len(wrong)} problems")
    print("".join(f"{problem}\n" for problem in wrong), end="")
    return 1 if wrong else 0
