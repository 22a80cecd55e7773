"""python -m bench.static_cuda: the CUDA kernels that were built, checked without a GPU.

Reads the machine code in llama_fast/_cuda, which an install has compiled already: registers, local
memory, shared memory and instructions of every kernel on every architecture that it was compiled
for, against the plans in static_cuda_plans.py. An instance that is planned and not there is a
problem too.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_fast

from .occupancy import Occupancy
from .static_cuda_binary import Kernel, ToolError, read
from .static_cuda_plans import PLANS, Plan
from .static_cuda_rules import fits, problems, unexpected

EPILOG = """examples:
  python -m bench.static_cuda                          every kernel
  python -m bench.static_cuda --binary build/x.o       another file than the installed one

Exit code 1: a kernel spills, is not there, has lost an instruction that it is built on, or leaves
fewer blocks on a multiprocessor than planned. 2: there is nothing to read."""

HEADER = f"{'kernel':<66}{'chip':<8}{'regs':>5}{'shared':>8}  {'blocks x warps':<15} instructions"


@dataclass(frozen=True)
class Row:
    """One instance on one architecture."""

    kernel: Kernel
    shared: int  # bytes a block, static and dynamic
    occupancy: Occupancy
    problems: tuple[str, ...]


def extension() -> Path | None:
    """The extension beside the package; None where none was built."""
    found = sorted(Path(llama_fast.__file__).parent.glob("_cuda.*.so"))
    return found[-1] if found else None


def check(kernels: Iterable[Kernel], plans: Iterable[Plan] = PLANS) -> tuple[list[Row], list[str]]:
    """A row for each planned instance, and every problem in words."""
    kernels, plans = list(kernels), list(plans)
    by_instance = {
        (plan.file, plan.kernel, arguments): plan for plan in plans for arguments in plan.instances
    }
    rows, wrong = [], unexpected(kernels, plans)
    for kernel in kernels:
        plan = by_instance.get((kernel.file, kernel.name, kernel.arguments))
        if plan is None:
            continue  # not planned: said so
        found = tuple(problems(plan, kernel))
        shared = kernel.shared + plan.shared(kernel.arguments)
        rows.append(Row(kernel, shared, fits(plan, kernel), found))
        wrong += [f"{kernel.text}: {problem}" for problem in found]
    return rows, wrong


def line(row: Row) -> str:
    k, o = row.kernel, row.occupancy
    name = f"{k.file}: {k.name}" + (f"<{', '.join(k.arguments)}>" if k.arguments else "")
    text = (
        f"{name.replace('__nv_bfloat16', 'bf16').replace('__half', 'fp16'):<66}{k.arch:<8}"
        f"{k.registers:>5}{row.shared:>8}  {o.blocks:>2} x {o.warps // max(o.blocks, 1):<10} "
        f"{', '.join(k.instructions)}"
    )
    return text + (f"  WRONG: {'; '.join(row.problems)}" if row.problems else "")


def to_json(rows: list[Row], wrong: list[str]) -> dict[str, Any]:
    return {"problems": wrong, "rows": [asdict(row) for row in rows]}


@functools.cache
def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.static_cuda",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--binary", type=Path, metavar="FILE", help="default: llama_fast/_cuda*.so")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    binary = args.binary or extension()
    if binary is None or not binary.exists():
        missing = binary or "llama_fast/_cuda*.so"
        print(f"static_cuda: no {missing}: install where nvcc is on PATH", file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        rows, wrong = check(read(binary))
    except ToolError as error:
        print(f"static_cuda: {error}", file=sys.stderr)
        return 2
    print(HEADER)
    for row in rows:
        print(line(row))
    print(f"{len(rows)} kernels, {time.perf_counter() - start:.0f} s, {len(wrong)} problems")
    for problem in wrong:
        print(problem)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(to_json(rows, wrong), indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
