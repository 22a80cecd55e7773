"""What a compiled kernel must be like: the words for it, and what is wrong when it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from llama_fast.kernels import common

from .compiled import Facts
from .occupancy import Occupancy, occupancy

# Needs in the words of static_cases.py -> what fulfils them on each chip, any of the alternatives.
WORDS: dict[str, dict[str, str]] = {
    "matrix": {
        "sm_80": "mma",
        "sm_89": "mma",
        "sm_90": "wgmma",
        "sm_100": "tcgen05",
        "gfx942": "mfma",
    },
    # Tiles of fewer than 64 rows are below what wgmma and tcgen05 take.
    "small matrix": {
        "sm_80": "mma",
        "sm_89": "mma",
        "sm_90": "mma|wgmma",
        "sm_100": "mma|tcgen05",
        "gfx942": "mfma",
    },
    "16-bit matrix": {"sm_80": "mma", "gfx942": "mfma"},  # where e4m3 has none
    "e4m3 matrix": {"sm_89": "mma e4m3", "sm_90": "wgmma e4m3", "sm_100": "tcgen05 e4m3"},
    "small e4m3 matrix": {
        "sm_89": "mma e4m3",
        "sm_90": "mma e4m3|wgmma e4m3",
        "sm_100": "mma e4m3|tcgen05 e4m3",
    },
    "async copy": {
        "sm_80": "cp.async",
        "sm_89": "cp.async",
        "sm_90": "cp.async|TMA",
        "sm_100": "cp.async|TMA",
    },
    "TMA": {"sm_90": "TMA", "sm_100": "TMA"},
    "16-byte loads": dict.fromkeys(common.CHIPS, "16-byte loads|TMA|cp.async"),
    "16-byte stores": dict.fromkeys(common.CHIPS, "16-byte stores|TMA stores"),
    "hardware e4m3": dict.fromkeys(("sm_89", "sm_90", "sm_100"), "cvt e4m3"),
    "ex2": dict.fromkeys(common.CHIPS, "ex2"),
}


MAY_SERIALISE = "may serialise"  # among a kernel's needs: wgmma that waits is known, and why


@dataclass(frozen=True)
class Case:
    """One call of a launcher, with tensors on the meta device."""

    op: str  # its file in kernels/
    name: str
    call: Callable[[], object]
    # kernel -> the words above that its machine code must fulfil
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # kernel -> blocks that must fit on one multiprocessor of sm_90, first configuration
    blocks: dict[str, int] = field(default_factory=dict)
    chips: tuple[str, ...] = tuple(common.CHIPS)
    # a field of Facts -> a group of cases that promise the same bits, and so have it in common
    alike: dict[str, str] = field(default_factory=dict)


def problems(
    arch: str, facts: Facts, shared_limit: int, needs: Iterable[str], blocks: int
) -> list[str]:
    """What is wrong with a kernel, in words; nothing, if all is well."""
    wrong = []
    if facts.spills:
        wrong.append(f"spills {facts.spills} {'registers' if arch[0] == 'g' else 'bytes'}")
    if facts.stack or "local memory" in facts.instructions:
        wrong.append(f"{facts.stack} bytes of local memory a thread")
    if facts.shared > shared_limit:
        wrong.append(f"{facts.shared} bytes of shared memory, the chip has {shared_limit}")
    if facts.serialized and MAY_SERIALISE not in needs:
        wrong.append("wgmma is serialised")
    if "tf32" in facts.instructions:
        wrong.append("tf32")
    for need in sorted(set(needs) - {MAY_SERIALISE}):
        accepted = WORDS[need].get(arch)
        if accepted and not set(accepted.split("|")) & set(facts.instructions):
            wrong.append(f"no {accepted.replace('|', ' or ')} ({need})")
    resident = fits(arch, facts)
    if resident.blocks < max(blocks, 1):
        wrong.append(f"{resident.blocks} blocks a multiprocessor for want of {resident.limit}")
    return wrong


def compare(cases: Iterable[Case], rows: Iterable[Any]) -> None:
    """Adds a problem to each row (static.Row) that differs from the first of its group in what the
    bits of a result hang on (Case.alike)."""
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


def fits(arch: str, f: Facts) -> Occupancy:
    return occupancy(arch, f.registers, f.shared, f.threads, f.tensor_memory)
