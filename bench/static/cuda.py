"""python -m bench.static cuda: check the CUDA kernels that were built, without a GPU.

Read registers, local memory, shared memory and instructions of every kernel on every architecture
that llama_fast/_cuda was compiled for, and hold them against PLANS. An instance that is planned and
missing, or there and not planned, is a problem too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import llama_fast
from llama_fast.kernels import common

from . import LINEAR
from .binary import Kernel, ToolError, read
from .occupancy import MULTIPROCESSORS, Occupancy, occupancy

EPILOG = """Exit code 1: a kernel spills, is not there, has lost an instruction that it is built on,
or leaves fewer blocks on a multiprocessor than planned. 2: there is nothing to read."""

Arguments = tuple[str, ...]
PORTABLE, HOPPER = ("sm_80", "sm_89", "sm_90"), ("sm_90a",)
REGISTERS = 65536  # of a multiprocessor


def chip(arch: str) -> str:
    return arch.removesuffix("a")


@dataclass(frozen=True)
class Plan:
    """What a kernel template is planned to take. A callable receives an instance's template
    arguments; `needs` and `launched` receive the architecture as well."""

    file: str
    kernel: str
    instances: Sequence[Arguments]
    threads: int | Callable[[Arguments], int]
    blocks: int | Callable[[Arguments], int]  # on a multiprocessor, where shared memory has room
    needs: Callable[[Arguments, str], Iterable[str]] = lambda a, arch: ()  # keys of binary.SASS
    shared: int | Callable[[Arguments], int] = 0  # dynamic, bytes a block
    cpp: str = ""  # the same as the launcher's expression, {0} ... the template arguments
    archs: tuple[str, ...] = PORTABLE
    streams: bool = False  # elementwise: nothing but memory should bound it
    # Bytes of cp.async on a multiprocessor before anything waits for them.
    ahead: int | Callable[[Arguments], int] = 0
    launched: Callable[[Arguments, str], bool] = lambda a, arch: True

    def of(self, name: str, arguments: Arguments) -> int:
        """threads, blocks, shared or ahead of an instance."""
        value = getattr(self, name)
        return value(arguments) if callable(value) else value


# ---- the plans ----

HALF, BF16, F32, E4M3 = "__half", "__nv_bfloat16", "float", "unsigned char"
TYPES, BOTH, T = (HALF, BF16, F32), ("false", "true"), "true"
LOADS, STORES = "16-byte loads", "16-byte stores"
# What memory's latency asks for: an H200's 4.8 TB/s times 0.7 us, for each of 132 multiprocessors,
# are 26 KB. The elementwise kernels' blocks are as many as have that much on the way.
IN_FLIGHT = 32 << 10


def vectors(*names: str, at: int = 1) -> Callable[[Arguments, str], list[str]]:
    """The needs of elementwise kernels: aligned rows move 16 bytes at a time."""
    return lambda a, arch: [n for n in names if a[at] == T or n not in (LOADS, STORES)]


def decode_shape(a: Arguments) -> tuple[int, int]:
    """DecodeShape's warps and shared_bytes."""
    d, row_tiles = int(a[2]), int(a[3])
    row_bytes = d * (1 if a[1] == E4M3 else 2)
    keys = 32 if row_bytes <= 128 and d * row_tiles <= 128 else 16
    warps, stage = 2 if row_bytes > 256 else 4, 2 * keys * row_bytes
    stages = 3 if stage > 4096 else 5
    kept = 48 + 4 * warps * (stages + 16 * row_tiles)  # Part, seen, scale
    return warps, warps * stages * stage + -(-kept // 8) * 8


def attention_shared(a: Arguments) -> int:
    rows, keys = (64, 32) if int(a[1]) > 128 else (128, 64)
    return 2 * int(a[1]) * (rows + 2 * keys) + 16


def many_rows_shared(a: Arguments) -> int:
    """Stages, the output's buffers, scales, the bias, barriers."""
    n = int(a[1])
    scales = 4 * 4 * (128 + n // 128) if a[2] == T else 4 * (128 + n)
    return 4 * 128 * (128 + n) + 4 * 8192 + scales + n * (4 if a[0] == F32 else 2) + 80


def few_rows_needs(a: Arguments, arch: str) -> list[str]:
    """sm_90 has e4m3 in wgmma only: of mma.sync ptxas makes two of fp16."""
    matrix = "mma e4m3" if a[0] == E4M3 and arch == "sm_89" else "mma"
    return [matrix, "cp.async", LOADS] if a[3] == T else [matrix]


def rows(file: str, kernel: str, instances: Iterable[Arguments], *names: str) -> Plan:
    """An elementwise kernel with a block of 1,024 threads for a row."""
    return Plan(file, kernel, [*instances], 1024, 1, vectors(*names), 32 * 4, streams=True)


def pieces(file: str, kernel: str, *names: str, shared: int = 0) -> Plan:
    """An elementwise kernel with blocks of 256 threads."""
    instances = [*product(TYPES, BOTH)]
    return Plan(file, kernel, instances, 256, 4, vectors(*names), shared, streams=True)


# fmt: off
PLANS = [
    Plan(
        "rms_norm", "rms_norm_kernel", [*product(TYPES, BOTH, "02", BOTH)], 1024, 1,
        lambda a, arch: vectors(LOADS, *[STORES] * (a[3] != T))(a, arch), 33 * 4, streams=True,
    ),
    pieces("activation", "silu_and_mul_kernel", "ex2", LOADS, STORES),
    # FP8 out of 16 bits leaves 8 bytes a thread: no 16-byte stores.
    rows("activation", "silu_and_mul_fp8_kernel",
         [a for a in product(TYPES, BOTH, "024") if (a[0], a[2]) != (HALF, "4")], "ex2", LOADS),
    rows("quantize", "by_row_kernel", product(TYPES, BOTH, "024"), LOADS),
    pieces("quantize", "by_block_kernel", LOADS),
    pieces("quantize", "by_square_kernel", LOADS, shared=32 * 4),
    pieces("quantize", "tensor_amax_kernel", LOADS, shared=32 * 4),
    pieces("quantize", "tensor_quantize_kernel", LOADS),
    Plan("quantize", "clear_kernel", [()], 1, 1),
    Plan("quantize", "tensor_scale_kernel", [()], 1, 1),
    Plan(
        "rope", "rope_kernel",
        [(t, cache, step, x) for t in TYPES for cache in ("void", t, E4M3)
         for step in ("1", "4" if t == F32 else "8") for x in BOTH],
        256, 4, lambda a, arch: [LOADS, STORES] if a[2] != "1" else [], streams=True,
    ),
    Plan(  # 2 blocks: one's softmax beside the other's products
        "attention", "attention_kernel",
        [*product((HALF, BF16), ("64", "128", "256"), (T,)),
         *product((HALF, BF16), ("128", "256"), ("false",))],
        128, 2,
        lambda a, arch: ["mma", "ldmatrix", "ex2", *["cp.async", STORES] * (a[2] == T)],
        attention_shared, "Shape<{1}>::q_bytes + 2 * Shape<{1}>::kv_bytes + sizeof(Output<{0}>)",
    ),
    # fp32: right rather than fast; as many blocks as ptxas does not spill for.
    Plan("attention", "attention_fp32_kernel", [()], 128, 4, lambda a, arch: ["ex2"],
         4608, "kFp32SharedBytes"),
    Plan(  # two consumers and a producer are what a multiprocessor's registers hold
        "attention_sm90", "attention_kernel", [*product((HALF, BF16), ("64", "128"))], 384, 1,
        lambda a, arch: ["wgmma", "TMA", "TMA stores", "setmaxnreg", "ex2"],
        lambda a: 6 * 128 * 2 * int(a[1]) + 80, "sizeof(Shared<{1}>)", HOPPER,
    ),
    Plan(  # 2 blocks: one starts and ends beside the other's stream
        "decode_attention", "decode_kernel",
        [(t, cache, d, n) for t, cache in ((HALF, HALF), (BF16, BF16), (HALF, E4M3))
         for d, n in (*product(("64", "128"), "12"), ("256", "1"))],
        lambda a: 32 * decode_shape(a)[0], 2,
        lambda a, arch: ["mma", "ldmatrix", "ex2", "cp.async",
                         *["e4m3 to fp16"] * (a[1] == E4M3 and arch != "sm_80")],
        lambda a: decode_shape(a)[1], "DecodeShape<{1}, {2}, {3}>::shared_bytes", ahead=IN_FLIGHT,
    ),
    Plan(  # short blocks: their latency is all there is to hide
        "decode_attention", "combine_kernel", [()], 128, 8,
        lambda a, arch: ["ex2", LOADS, *["griddepcontrol.wait"] * (arch == "sm_90")], 4 * 260 * 4,
    ),
    Plan("decode_attention", "decode_fp32_kernel", [(F32,), (E4M3,)], 128, 4,
         lambda a, arch: ["ex2"], 4608, "kFp32SharedBytes"),
    Plan(  # up to 16 rows 2 blocks, as of decode_kernel
        LINEAR, "few_rows_kernel",
        [(x, out, n, aligned, blockwise)
         for x, out in [(HALF, HALF), (BF16, BF16), *product((E4M3,), TYPES)]
         for n, aligned in [("1", "false"), ("1", T), ("2", T), ("4", T)]
         for blockwise in BOTH if (n, blockwise) != ("4", T)],
        256, lambda a: 2 if a[2] == "1" else 1, few_rows_needs,
        8 * 3 * 32 * 128, "kWarps * kStages * kStage",
        ahead=lambda a: IN_FLIGHT if a[3] == T else 0,
        launched=lambda a, arch: a[0] != E4M3 or arch != "sm_80",
    ),
    # A warp an output, without matrix instructions.
    Plan(LINEAR, "plain_kernel", [(F32, F32), *product((E4M3,), TYPES)], 256, 4),
    Plan(  # persistent; registers as of attention_sm90
        f"{LINEAR}_sm90", "many_rows_kernel",
        [a for a in product(TYPES, ("128", "256"), BOTH) if a[0] != F32 or a[1] == "128"], 384, 1,
        lambda a, arch: ["wgmma e4m3", "TMA", "TMA multicast", "setmaxnreg",
                         *["TMA stores"] * (a[0] != F32)],
        many_rows_shared, "sizeof(Shared<{0}, {1}, {2}>)", HOPPER,
    ),
]
# fmt: on


# ---- the rules ----


def slow_steps(plan: Plan, kernel: Kernel) -> list[str]:
    """What would bind a kernel that memory should bound to the issue of instructions. A division
    is ten of them and a branch, of 64-bit integers a call of a hundred; a mean and a scale need a
    reciprocal each. Of loads, all but two indices and a scale are of 16 bytes."""
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
    """What is wrong with an instance, in words; nothing, if all is well."""
    a, limit = kernel.arguments, common.CHIPS[chip(kernel.arch)].shared_memory
    threads, shared, ahead = (plan.of(name, a) for name in ("threads", "shared", "ahead"))
    local = f"{kernel.stack} bytes of local memory a thread: spills, or an array"
    if not plan.launched(a, kernel.arch):
        return [local] if kernel.stack or "local memory" in kernel.instructions else []
    missing = sorted({*plan.needs(a, kernel.arch)} - {*kernel.instructions})
    # One warpgroup is the producer; ptxas hands out registers for each thread of all of them.
    groups = threads // 128
    pool = min(groups * kernel.registers, REGISTERS // 128)
    resident, m = fits(plan, kernel), MULTIPROCESSORS[chip(kernel.arch)]
    room = m.shared // (-(-shared // 128) * 128 + m.shared_reserved)
    blocks = max(1, min(plan.of("blocks", a), room))
    copied = kernel.ahead * threads * resident.blocks
    rules = [
        (kernel.stack or "local memory" in kernel.instructions, local),
        (
            kernel.shared,
            f"{kernel.shared} bytes of static shared memory: it is planned as dynamic",
        ),
        (shared > limit, f"{shared} bytes of shared memory, the chip has {limit}"),
        (missing, f"no {', '.join(missing)}"),
        (
            kernel.serialized,
            f"wgmma is serialized: {kernel.wgmma_groups} groups of {kernel.wgmmas} instructions",
        ),
        *((True, step) for step in (slow_steps(plan, kernel) if plan.streams else ())),
        (
            kernel.wide_compares > kernel.wgmmas,
            f"{kernel.wide_compares} compares of 64 bits in a loop of wgmma",
        ),
        (kernel.early_loads, f"{kernel.early_loads} loads before griddepcontrol.wait"),
        (
            kernel.taken and kernel.released + (groups - 1) * kernel.taken > pool,
            f"setmaxnreg asks for {kernel.released} and {groups - 1} x {kernel.taken} registers of "
            f"{groups} x {kernel.registers}: the last warpgroup waits for ever",
        ),
        (
            resident.blocks < blocks,
            f"{kernel.registers} registers: {resident.blocks} blocks a multiprocessor for want of "
            f"{resident.limit}, planned {blocks}",
        ),
        (
            copied < ahead,
            f"{copied} bytes of copies on a multiprocessor before it waits, planned {ahead}",
        ),
    ]
    return [text for broken, text in rules if broken]


def unexpected(kernels: Iterable[Kernel], plans: Iterable[Plan]) -> list[str]:
    """Instances that are planned and missing, or there and not planned. A build may do without
    sm_89, as the Makefile's does on a machine that has no GPU."""
    there = {(k.file, k.name, k.arguments, k.arch) for k in kernels}
    spared = {"sm_89"} if there and not any(k[3] == "sm_89" for k in there) else set()
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
        k, o = self.kernel, self.occupancy
        name = f"{k.file}: {k.name}" + (f"<{', '.join(k.arguments)}>" if k.arguments else "")
        return (
            f"{name.replace(BF16, 'bf16').replace(HALF, 'fp16'):<66}{k.arch:<8}"
            f"{k.registers:>5}{self.shared:>8}  {o.blocks:>2} x {o.warps // max(o.blocks, 1):<10} "
            f"{', '.join(k.instructions)}" + "".join(f"  WRONG: {p}" for p in self.problems)
        )


HEADER = f"{'kernel':<66}{'chip':<8}{'regs':>5}{'shared':>8}  {'blocks x warps':<15} instructions"


def check(kernels: Iterable[Kernel], plans: Iterable[Plan] = PLANS) -> tuple[list[Row], list[str]]:
    """A row for each planned instance, and every problem in words."""
    kernels, plans = list(kernels), list(plans)
    by_instance = {(p.file, p.kernel, arguments): p for p in plans for arguments in p.instances}
    found = [
        Row(k, k.shared + p.of("shared", k.arguments), fits(p, k), problems(p, k))
        for k in kernels
        if (p := by_instance.get((k.file, k.name, k.arguments)))
    ]
    wrong = [f"{row.kernel.text}: {problem}" for row in found for problem in row.problems]
    return found, [*unexpected(kernels, plans), *wrong]


def extension() -> Path | None:
    """The extension beside the package; None where none was built."""
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
