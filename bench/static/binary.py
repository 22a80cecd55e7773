"""Read the registers, memory and instructions of CUDA machine code's kernels with cuobjdump.

The file may be an extension, an object file, a fatbin or a cubin. No GPU is needed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ..gpu.processes import tool

# Instructions that are searched: name -> pattern of an operation code.
SASS = {
    "wgmma": r"\bHGMMA\.\S*",
    "wgmma e4m3": r"\bQGMMA\.\S*E4M3",
    "mma": r"\bHMMA\.\S*F32",
    "mma e4m3": r"\bQMMA\.\S*E4M3",
    "tf32": r"GMMA\.\S*TF32|HMMA\.\S*TF32",
    "TMA": r"\bUTMALDG",
    "TMA multicast": r"\bUTMALDG\.\S*MULTICAST",
    "TMA stores": r"\bUTMASTG",
    "cp.async": r"\bLDGSTS\.\S*128",
    "16-byte loads": r"\bLDG\.\S*128|\bLDGSTS\.\S*128",
    "16-byte stores": r"\bSTG\.\S*128",
    "local memory": r"\b(LDL|STL)\b",
    "ldmatrix": r"\bLDSM\.",
    "e4m3 to fp16": r"\bF2FP\.F16\.E4M3\.UNPACK",
    "ex2": r"\bMUFU\.EX2",
    "setmaxnreg": r"\bUSETMAXREG\.",
    "griddepcontrol.wait": r"\bACQBULK\b",
}
# Instructions that are counted: name -> pattern of a whole operation code.
COUNTED = {
    "divisions": r"FCHK|RET\..*|I2F\.U32\.RP",  # fp32, a called function's, 32-bit integers'
    "reciprocals": r"MUFU\.RCP",
    "4-byte loads": r"LDG\.E",
}
SYSTEM = 1024  # bytes of the system's shared memory, which cuobjdump counts from sm_90 on

_USAGE = re.compile(
    r"^arch = (?P<arch>\S+)|^ Function (?P<symbol>\S+):\n"
    r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
    re.MULTILINE,
)
_LINE = re.compile(r"        /\*([0-9a-f]{4,})\*/ +(?:@!?\w+ +)?([A-Z][\w.]*)(.*?);")
_LOAD = re.compile(r"(LD|LDG|LDGSTS|UTMALDG|UBLKCP)(\.|$)")
_WIDE = re.compile(r"U?ISETP\S*\.EX")


Tool = str | Path | None


class ToolError(RuntimeError):
    """cuobjdump is missing or does not understand the file."""


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel on one architecture. Sizes are in bytes."""

    file: str  # stem of its .cu
    name: str
    arguments: tuple[str, ...]  # template arguments as C++ prints them
    arch: str
    registers: int  # per thread
    stack: int  # per thread: spills, and arrays that need an address
    shared: int  # static, per block, without the system's
    instructions: tuple[str, ...]  # keys of SASS that occur
    counts: Mapping[str, int] = field(default_factory=dict)  # of COUNTED
    wgmmas: int = 0
    wgmma_groups: int = 0  # groups that end with a wait
    wide_compares: int = 0  # the most 64-bit compares in a loop of wgmma
    early_loads: int = 0  # loads from global memory before griddepcontrol.wait
    ahead: int = 0  # bytes that a thread copies by 16-byte cp.async before it waits or multiplies
    released: int = 0  # registers per thread that setmaxnreg leaves a producer; 0: no producer
    taken: int = 0  # registers per thread that it gives a consumer

    @property
    def text(self) -> str:
        arguments = f"<{', '.join(self.arguments)}>" if self.arguments else ""
        return f"{self.file}.cu: {self.name}{arguments} on {self.arch}"

    @property
    def serialized(self) -> bool:
        """Return whether each wgmma waits for the one before, as if ptxas cannot overlap them."""
        return self.wgmmas < 2 * self.wgmma_groups


def search(patterns: Mapping[str, str], text: str) -> tuple[str, ...]:
    """Return the names whose pattern occurs."""
    return tuple(name for name, pattern in patterns.items() if re.search(pattern, text))


def cuobjdump() -> str:
    """Find nvcc's cuobjdump, or Triton's copy of it."""
    triton = importlib.util.find_spec("triton")
    origin = Path(triton.origin).parent if triton and triton.origin else Path()
    copy = shutil.which("cuobjdump", path=str(origin / "backends" / "nvidia" / "bin"))
    if found := tool("cuobjdump") or copy:
        return found
    raise ToolError("no cuobjdump: install the CUDA toolkit, or set CUDA_HOME")


def _run(program: Tool, *arguments: str | Path) -> str:
    done = subprocess.run([program or cuobjdump(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"cuobjdump {arguments[-1]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def read(binary: Path, arch: str = "", program: Tool = None) -> list[Kernel]:
    """Return a file's kernels, sorted by file, name, architecture and arguments. arch: a cubin's,
    which does not name it. program: another cuobjdump, if the compiler is newer than ours."""
    usage = resources(binary, arch, program)
    archs = sorted({arch for arch, _ in usage})
    with ThreadPoolExecutor(2) as pool:  # each waits for a cuobjdump process
        dumps = pool.map(lambda arch: _machine_code(binary, arch, program), archs)
        code = {key: fields for dump in dumps for key, fields in dump.items()}
    names = _names([symbol for _, symbol in usage])
    kernels = [
        Kernel(*names[symbol], arch, *sizes, **code[arch, symbol])
        for (arch, symbol), sizes in usage.items()
    ]
    return sorted(kernels, key=lambda k: (k.file, k.name, k.arch, k.arguments))


def resources(
    binary: Path, arch: str = "", program: Tool = None
) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Return registers, stack and static shared memory by (arch, symbol)."""
    found = {}
    for match in _USAGE.finditer(_run(program, "--dump-resource-usage", binary)):
        arch = match["arch"] or arch
        if symbol := match["symbol"]:
            registers, stack, shared, local = map(int, match.group(3, 4, 5, 6))
            system = SYSTEM if int(re.sub(r"\D", "", arch)) >= 90 else 0
            found[arch, symbol] = registers, stack + local, max(0, shared - system)
    return found


def _names(symbols: Iterable[str]) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Return file, function and template arguments by mangled name. nvcc puts the file into the
    name of an anonymous namespace."""
    mangled = sorted(set(symbols))
    text = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.replace("(anonymous namespace)::", "")
    found = {}
    for symbol, line in zip(mangled, text.splitlines(), strict=True):
        file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", symbol)
        match = re.match(r"(?:void )?(?:\w+::)*(\w+)(?:<(.*?)>)?(?:\(|$)", line)
        if match is None:
            raise ToolError(f"no kernel's name: {line}")
        arguments = tuple(part.strip() for part in (match[2] or "").split(",") if part)
        found[symbol] = (file[1] if file else "", match[1], arguments)
    return found


class _Line(NamedTuple):
    """An instruction of a dump, without its predicate."""

    address: int
    operation: str
    operands: str

    @property
    def wgmma(self) -> bool:
        """Return whether it multiplies; without operands a GMMA only drains the pipeline."""
        return "GMMA." in self.operation and "gdesc[URZ]" not in self.operands

    @property
    def number(self) -> int:
        """Return the last operand: a branch's target or a number of registers."""
        match = re.search(r"0x([0-9a-f]+)$", self.operands.rstrip())
        return int(match[1], 16) if match else -1


def _machine_code(binary: Path, arch: str, program: Tool) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the Kernel's fields that machine code shows, by (arch, symbol)."""
    found = {}
    for block in _run(program, "--dump-sass", "-arch", arch, binary).split("\t\tFunction : ")[1:]:
        lines = (_Line(int(at, 16), *rest) for at, *rest in _LINE.findall(block))
        found[arch, block.split(None, 1)[0]] = _fields(list(lines))
    return found


def _fields(code: list[_Line]) -> dict[str, Any]:
    operations = [line.operation for line in code]
    wait = operations.index("ACQBULK") if "ACQBULK" in operations else 0
    before = takewhile(lambda o: "MMA." not in o and "DEPBAR.LE" not in o, operations)
    wide = [sum(bool(_WIDE.match(line.operation)) for line in loop) for loop in _wgmma_loops(code)]

    def registers(kind: str) -> int:
        moves = [x.number for x in code if x.operation.startswith(f"USETMAXREG.{kind}")]
        return max(moves, default=0)

    return {
        "instructions": search(SASS, "\n".join(set(operations))),
        "counts": {
            name: sum(bool(re.fullmatch(pattern, o)) for o in operations)
            for name, pattern in COUNTED.items()
        },
        "wgmmas": sum(line.wgmma for line in code),
        "wgmma_groups": sum(line.wgmma and "gsb0" in line.operands for line in code),
        "wide_compares": max(wide, default=0),
        "early_loads": sum(bool(_LOAD.match(o)) for o in operations[:wait]),
        "ahead": 16 * sum(o.startswith("LDGSTS.") and ".128" in o for o in before),
        "released": registers("DEALLOC"),
        "taken": registers("TRY_ALLOC"),
    }


def _wgmma_loops(code: list[_Line]) -> list[list[_Line]]:
    """Return the innermost loops with wgmma. A branch back over an exit is not a loop: it ends a
    wait whose retries are past the kernel's end."""
    loops: list[list[_Line]] = []
    if not any(line.wgmma for line in code):
        return loops
    for end, line in enumerate(code):
        if not (line.operation.startswith("BRA") and 0 <= line.number <= line.address):
            continue
        body = [x for x in code[: end + 1] if x.address >= line.number]
        innermost = not any(body[0].address <= loop[0].address for loop in loops)
        if innermost and any(x.wgmma for x in body) and all(x.operation != "EXIT" for x in body):
            loops.append(body)
    return loops
