"""What is wrong with compiled CUDA kernels, by the plans in static_cuda_plans.py."""

from __future__ import annotations

from collections.abc import Iterable

from llama_fast.kernels import common

from .occupancy import Occupancy, occupancy
from .static_cuda_binary import Kernel
from .static_cuda_plans import Plan, chip

REGISTERS = 65536  # of a multiprocessor


def fits(plan: Plan, kernel: Kernel) -> Occupancy:
    shared = kernel.shared + plan.shared(kernel.arguments)
    return occupancy(chip(kernel.arch), kernel.registers, shared, plan.threads(kernel.arguments))


def slow_steps(plan: Plan, kernel: Kernel) -> list[str]:
    """Of a kernel that memory should bound: what would bind it to the issue of instructions. A
    division is ten of them and a branch, of 64-bit integers a call of a hundred; a mean and a scale
    need a reciprocal each. Of loads, all but two indices and a scale are of 16 bytes."""
    if not plan.streams:
        return []
    vectors = "16-byte loads" in plan.needs(kernel.arguments, kernel.arch)
    limits = {
        "divisions": 0,
        "reciprocals": 99 if "ex2" in kernel.instructions else 2,
        "4-byte loads": 3 if vectors and kernel.arguments[0] != "float" else 99,
    }
    found = {what: kernel.counts.get(what, 0) for what in limits}
    return [f"{n} {what}, at most {limits[what]}" for what, n in found.items() if n > limits[what]]


def problems(plan: Plan, kernel: Kernel) -> list[str]:
    """What is wrong with an instance, in words; nothing, if all is well."""
    wrong = []
    if kernel.stack or "local memory" in kernel.instructions:
        wrong.append(f"{kernel.stack} bytes of local memory a thread: spills, or an array")
    if not plan.launched(kernel.arguments, kernel.arch):
        return wrong
    if kernel.shared:
        wrong.append(f"{kernel.shared} bytes of static shared memory: it is planned as dynamic")
    limit, shared = common.CHIPS[chip(kernel.arch)].shared_memory, plan.shared(kernel.arguments)
    if shared > limit:
        wrong.append(f"{shared} bytes of shared memory, the chip has {limit}")
    missing = set(plan.needs(kernel.arguments, kernel.arch)) - set(kernel.instructions)
    if missing:
        wrong.append(f"no {', '.join(sorted(missing))}")
    if kernel.wgmmas < 2 * kernel.wgmma_groups:
        wrong.append(
            f"wgmma is serialised: {kernel.wgmma_groups} groups of {kernel.wgmmas} instructions"
        )
    wrong += slow_steps(plan, kernel)
    if kernel.wide_compares > kernel.wgmmas:
        wrong.append(f"{kernel.wide_compares} compares of 64 bits in a loop of wgmma")
    if kernel.early_loads:
        wrong.append(f"{kernel.early_loads} loads before griddepcontrol.wait")
    # One warpgroup is the producer; ptxas hands out registers for each thread of all of them.
    groups = plan.threads(kernel.arguments) // 128
    pool, taken = groups * kernel.registers, kernel.released + (groups - 1) * kernel.taken
    if kernel.taken and taken > min(pool, REGISTERS // 128):
        wrong.append(
            f"setmaxnreg asks for {kernel.released} and {groups - 1} x {kernel.taken} registers of "
            f"{groups} x {kernel.registers}: the last warpgroup waits for ever"
        )
    resident, wanted = fits(plan, kernel), plan.wanted_blocks(kernel.arguments, kernel.arch)
    if resident.blocks < wanted:
        wrong.append(
            f"{kernel.registers} registers: {resident.blocks} blocks a multiprocessor for want of "
            f"{resident.limit}, planned {wanted} ({plan.why})"
        )
    ahead = kernel.ahead * plan.threads(kernel.arguments) * resident.blocks
    if ahead < plan.ahead(kernel.arguments):
        wrong.append(
            f"{ahead} bytes of copies on a multiprocessor before it waits, "
            f"planned {plan.ahead(kernel.arguments)}"
        )
    return wrong


def unexpected(kernels: Iterable[Kernel], plans: Iterable[Plan]) -> list[str]:
    """Instances that are planned and missing, or there and not planned. A build may do without
    sm_89, as the Makefile's does on a machine that has no GPU."""
    there = {(k.file, k.name, k.arguments, k.arch) for k in kernels}
    spared = set() if not there or any(k[3] == "sm_89" for k in there) else {"sm_89"}
    planned = {
        (p.file, p.kernel, arguments, arch)
        for p in plans
        for arguments in p.instances
        for arch in p.archs
        if arch not in spared
    }
    text = "{0}.cu: {1}<{2}> on {3}".format
    return [
        f"{text(file, kernel, ', '.join(arguments), arch)}: {what}"
        for those, what in ((planned - there, "missing"), (there - planned, "not planned"))
        for file, kernel, arguments, arch in sorted(those)
    ]
