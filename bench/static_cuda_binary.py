"""What is in a compiled CUDA extension: every kernel instance's resources and instructions, as
cuobjdump reads them out of the machine code. Nothing is compiled and no GPU is needed."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import compiled

# What is looked for: name -> pattern in a kernel's operation codes.
SASS = {
    **compiled.SASS,
    "mma e4m3": r"\bQMMA\.\S*E4M3",
    "e4m3 to fp16": r"\bF2FP\.F16\.E4M3\.UNPACK",
    "ldmatrix": r"\bLDSM\.",
    "setmaxnreg": r"\bUSETMAXREG\.",
    "TMA multicast": r"\bUTMALDG\.\S*MULTICAST",
    "griddepcontrol.wait": r"\bACQBULK\b",
    "ex2": r"\bMUFU\.EX2",
}
# What is counted: name -> pattern of whole operation codes.
COUNTED = {
    "divisions": r"FCHK|RET\..*|I2F\.U32\.RP",  # fp32, what is called, 32-bit integers
    "reciprocals": r"MUFU\.RCP",
    "4-byte loads": r"LDG\.E",
}
RESERVED = (
    1024  # bytes of shared memory that cuobjdump counts as static from sm_90 on: the system's
)


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel template in one architecture's machine code."""

    file: str  # stem of its .cu
    name: str
    arguments: tuple[str, ...]  # of the template, as C++ prints them
    arch: str
    registers: int  # per thread
    stack: int  # bytes a thread: spills, and arrays that need an address
    shared: int  # static, bytes a block, without the system's
    instructions: tuple[str, ...]  # keys of SASS that occur
    wgmmas: int = 0
    wgmma_groups: int = 0  # that end with something to wait for
    counts: Mapping[str, int] = field(default_factory=dict)  # of COUNTED
    ahead: int = 0  # bytes that a thread copies by 16-byte cp.async before it waits or multiplies
    wide_compares: int = 0  # of 64 bits, in the loop of wgmma that has most
    early_loads: int = 0  # from global memory before griddepcontrol.wait
    released: int = 0  # registers per thread that setmaxnreg leaves a producer; 0: there is none
    taken: int = 0  # and gives a consumer

    @property
    def text(self) -> str:
        arguments = f"<{', '.join(self.arguments)}>" if self.arguments else ""
        return f"{self.file}.cu: {self.name}{arguments} on {self.arch}"


class ToolError(RuntimeError):
    """cuobjdump is missing or does not understand the file."""


@functools.cache
def cuobjdump() -> Path:
    """nvcc's, or Triton's copy of it."""
    folders = []
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parent)
    folders += [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "cuobjdump").exists():
            return folder / "cuobjdump"
    looked = ", ".join(map(str, folders))
    raise ToolError(f"no cuobjdump in {looked}: install the CUDA toolkit, or set CUDA_HOME")


def _run(*arguments: str | Path) -> str:
    done = subprocess.run([str(cuobjdump()), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"cuobjdump {arguments[-1]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def read(binary: Path) -> list[Kernel]:
    """Every kernel of an extension, object file or fatbin."""
    resources = _resources(_run("--dump-resource-usage", binary))
    archs = sorted({arch for arch, _ in resources})
    with ThreadPoolExecutor(2) as pool:  # the waiting is for cuobjdump, which takes a core
        dumps = pool.map(lambda arch: _machine_code(arch, binary), archs)
        fields = {key: value for dump in dumps for key, value in dump.items()}
    kernels = []
    for (arch, symbol), (registers, stack, shared) in resources.items():
        if int(arch[3:5]) >= 90:
            shared = max(0, shared - RESERVED)
        kernel = (*_parse(symbol), arch, registers, stack, shared)
        kernels.append(Kernel(*kernel, **fields[arch, symbol]))
    return sorted(kernels, key=lambda k: (k.file, k.name, k.arch, k.arguments))


def _resources(text: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(arch, symbol) -> registers, stack and static shared memory."""
    found, arch, symbol = {}, "", ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.split()[2]
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[arch, symbol] = registers, stack + local, shared
    return found


class _Line(NamedTuple):
    """Of a dump, without its predicate."""

    address: int
    operation: str
    operands: str

    @property
    def wgmma(self) -> bool:
        """Without operands it only drains the pipeline."""
        return "GMMA." in self.operation and "gdesc[URZ]" not in self.operands

    @property
    def number(self) -> int:
        """The last operand: where a branch goes, how many registers."""
        match = re.search(r"0x([0-9a-f]+)$", self.operands.rstrip())
        return int(match[1], 16) if match else -1


_LINE = re.compile(r"        /\*([0-9a-f]{4,})\*/ +(?:@!?\w+ +)?([A-Z][\w.]*)(.*?);")


_LOAD = re.compile(r"(LD|LDG|LDGSTS|UTMALDG|UBLKCP)(\.|$)")


def _machine_code(arch: str, binary: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(arch, symbol) -> the Kernel's fields that its machine code tells."""
    command = [str(cuobjdump()), "--dump-sass", "-arch", arch, str(binary)]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        symbol, code = "", list[_Line]()
        for line in process.stdout:
            if match := _LINE.match(line):
                code.append(_Line(int(match[1], 16), match[2], match[3]))
            elif line.startswith("\t\tFunction : "):
                symbol, code = line.split()[2], []
            elif line.startswith("\t\t......") and symbol:
                found[arch, symbol] = _fields(code)
    if process.returncode:
        raise ToolError(f"cuobjdump --dump-sass -arch {arch} {binary}: exit {process.returncode}")
    return found


def _fields(code: list[_Line]) -> dict[str, Any]:
    operations = "\n".join({line.operation for line in code})
    wgmmas = [line for line in code if line.wgmma]
    moved: dict[str, list[int]] = {"DEALLOC": [0], "TRY_ALLOC": [0]}
    for line in code:
        if line.operation.startswith("USETMAXREG."):
            moved[line.operation.split(".")[1]].append(line.number)
    wide = [
        sum(re.match(r"U?ISETP\S*\.EX", line.operation) is not None for line in loop)
        for loop in (_loops(code) if wgmmas else [])
    ]
    waits = [line.operation for line in code].index("ACQBULK") if "ACQBULK" in operations else 0
    return {
        "instructions": tuple(compiled._search(SASS, operations)),
        "counts": {
            what: sum(bool(re.fullmatch(pattern, line.operation)) for line in code)
            for what, pattern in COUNTED.items()
        },
        "ahead": _ahead([line.operation for line in code]),
        "wgmmas": len(wgmmas),
        "wgmma_groups": sum("gsb0" in line.operands for line in wgmmas),
        "wide_compares": max(wide, default=0),
        "early_loads": sum(bool(_LOAD.match(line.operation)) for line in code[:waits]),
        "released": max(moved["DEALLOC"]),
        "taken": max(moved["TRY_ALLOC"]),
    }


def _ahead(operations: Iterable[str]) -> int:
    """Kernel.ahead, by the operations in the order of the code."""
    count = 0
    for operation in operations:
        if "MMA." in operation or "DEPBAR.LE" in operation:
            break
        count += operation.startswith("LDGSTS.") and ".128" in operation
    return 16 * count


def _loops(code: list[_Line]) -> list[list[_Line]]:
    """The loops that hold wgmma and no other such loop. A branch back over an exit is none: it
    ends a wait whose retries lie past the kernel's end."""
    loops: list[list[_Line]] = []
    for end, line in enumerate(code):
        if not (line.operation.startswith("BRA") and 0 <= line.number <= line.address):
            continue
        body = [x for x in code[: end + 1] if x.address >= line.number]
        innermost = not any(body[0].address <= loop[0].address for loop in loops)
        if innermost and any(x.wgmma for x in body) and all(x.operation != "EXIT" for x in body):
            loops.append(body)
    return loops


def _parse(symbol: str) -> tuple[str, str, tuple[str, ...]]:
    """A mangled name's file, function and template arguments. nvcc puts the file into the name of
    an anonymous namespace."""
    file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", symbol)
    text = _demangle(symbol).replace("(anonymous namespace)::", "")
    match = re.match(r"(?:void )?(?:\w+::)*(\w+)(?:<(.*?)>)?\(", text)
    if match is None:
        raise ToolError(f"no kernel's name: {text}")
    arguments = (part.strip() for part in (match[2] or "").split(",") if part)
    return file[1] if file else "", match[1], tuple(arguments)


def _demangle(symbol: str) -> str:
    """The C++ runtime's own, which the extensions link."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if status.value or not address:
        return symbol
    text = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    return text
