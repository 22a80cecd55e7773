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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import compiled

# What is looked for: name -> pattern in a kernel's operation codes.
SASS = {
    **compiled.SASS,
    "mma e4m3": r"\bQMMA\.\S*E4M3",
    "e4m3 to fp16": r"\bF2FP\.F16\.E4M3\.UNPACK",
    "ldmatrix": r"\bLDSM\.",
    "setmaxnreg": r"\bUSETMAXREG\.",
    "TMA multicast": r"\bUTMALDG\.\S*MULTICAST",
    "ex2": r"\bMUFU\.EX2",
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
    ahead: int = 0  # bytes that a thread copies by 16-byte cp.async before it waits or multiplies

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
        dumps = pool.map(lambda arch: _operations(arch, binary), archs)
        operations = {key: value for dump in dumps for key, value in dump.items()}
    kernels = []
    for (arch, symbol), (registers, stack, shared) in resources.items():
        codes, wgmmas, groups = operations[arch, symbol]
        ahead = _ahead(codes)
        file, name, arguments = _parse(symbol)
        found = tuple(compiled._search(SASS, "\n".join(set(codes))))
        if int(arch[3:5]) >= 90:
            shared = max(0, shared - RESERVED)
        kernels.append(
            Kernel(
                file, name, arguments, arch, registers, stack, shared, found, wgmmas, groups, ahead
            )
        )
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


# Of one line of a dump: its address, perhaps a predicate, the operation and the operands.
_LINE = re.compile(r"        /\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?([A-Z][\w.]*)(.*?);")


def _operations(arch: str, binary: Path) -> dict[tuple[str, str], tuple[Iterable[str], int, int]]:
    """(arch, symbol) -> the operations, how many are wgmma, and wgmma that ends a group (gsb0: what
    a wait waits for)."""
    command = [str(cuobjdump()), "--dump-sass", "-arch", arch, str(binary)]
    found: dict[tuple[str, str], tuple[Iterable[str], int, int]] = {}
    symbol, codes, wgmmas, groups = "", list[str](), 0, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("        /*"):
                if match := _LINE.match(line):
                    codes.append(match[1])
                    # Without operands it only drains the pipeline.
                    if "GMMA." in match[1] and "gdesc[URZ]" not in match[2]:
                        wgmmas, groups = wgmmas + 1, groups + ("gsb0" in match[2])
            elif line.startswith("\t\tFunction : "):
                symbol, codes, wgmmas, groups = line.split()[2], [], 0, 0
            elif line.startswith("\t\t......") and symbol:
                found[arch, symbol] = codes, wgmmas, groups
    if process.returncode:
        raise ToolError(f"cuobjdump --dump-sass -arch {arch} {binary}: exit {process.returncode}")
    return found


def _ahead(operations: Iterable[str]) -> int:
    """Kernel.ahead, by the operations in the order of the code."""
    count = 0
    for operation in operations:
        if "MMA." in operation or "DEPBAR.LE" in operation:
            break
        count += operation.startswith("LDGSTS.") and ".128" in operation
    return 16 * count


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
