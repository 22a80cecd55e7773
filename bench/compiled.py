"""One recorded launch, compiled for a chip that need not be there, and what came out.

The specialisation is the one that a real launch would have: Triton's own binder decides which
arguments are constants and which divide by 16. Registers, spills and the stack come from ptxas's
own report (AMD: from the assembly's metadata), which also says when it could not let wgmma overlap;
instructions from the PTX and, on demand, from the disassembled machine code as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from llama_fast import use_backend
from llama_fast.kernels import common
from llama_fast.kernels.common import Chip, Launch, Recording

# What is looked for: name -> pattern in the PTX or AMD's assembly. cp.async.cg moves 16 bytes.
PTX = {
    "wgmma": r"wgmma\.mma_async\S*\.(bf16|f16)\b",
    "wgmma e4m3": r"wgmma\.mma_async\S*e4m3\.e4m3",
    "mma": r"\bmma\.sync\S*\.(bf16|f16)\.f32|\bmma\.sync\S*\.f32\.f16\.f16",
    "mma e4m3": r"\bmma\.sync\S*e4m3\.e4m3",
    "tcgen05": r"tcgen05\.mma\S*kind::f16",
    "tcgen05 e4m3": r"tcgen05\.mma\S*kind::f8f6f4",
    "TMA": r"cp\.async\.bulk\.tensor\S*\.shared::\w+\.global",
    "TMA stores": r"cp\.async\.bulk\.tensor\S*\.global\.shared",
    "cp.async": r"cp\.async\.cg\.shared",
    "16-byte loads": r"ld\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64)|ld\.global\S*\.v8\.[bfu]32",
    "16-byte stores": r"st\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64)|st\.global\S*\.v8\.[bfu]32",
    "cvt e4m3": r"cvt\.rn\.satfinite\.e4m3x2|cvt\.rn\.f16x2\.e4m3x2",
    "ex2": r"ex2\.approx",
    "setmaxnreg": r"setmaxnreg",
    "tf32": r"tf32",
}
AMDGCN = {
    "mfma": r"v_mfma_f32_\S*(bf16|f16)",
    "16-byte loads": r"(global|buffer)_load_dwordx4",
    "16-byte stores": r"(global|buffer)_store_dwordx4",
    "ex2": r"v_exp_f32",
    "tf32": r"xf32",
}
# The same in sm_90's machine code, where ptxas has had its say.
SASS = {
    "wgmma": r"\bHGMMA\.\S*",
    "wgmma e4m3": r"\bQGMMA\.\S*E4M3",
    "mma": r"\bHMMA\.\S*F32",
    "TMA": r"\bUTMALDG",
    "TMA stores": r"\bUTMASTG",
    "cp.async": r"\bLDGSTS\.\S*128",
    "16-byte loads": r"\bLDG\.\S*128|\bLDGSTS\.\S*128",
    "16-byte stores": r"\bSTG\.\S*128",
    "local memory": r"\b(LDL|STL)\b",
    "tf32": r"GMMA\.\S*TF32|HMMA\.\S*TF32",
}


@dataclass(frozen=True)
class Facts:
    """What one compiled kernel takes and contains. Sizes in bytes, registers per thread."""

    registers: int
    spills: int  # bytes stored and loaded again (AMD: registers spilled)
    stack: int  # bytes of local memory a thread
    shared: int
    threads: int
    serialized: bool  # ptxas could not overlap wgmma and says so
    tensor_memory: int = 0  # sm_100's, columns
    instructions: tuple[str, ...] = field(default=())
    # What the bits of a result hang on: the shape and layout of each fp32 reduction, and, on
    # NVIDIA's chips, how many fp32 instructions of each kind: a * b + c fused, or not.
    reductions: tuple[str, ...] = field(default=())
    arithmetic: tuple[str, ...] = field(default=())

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Facts:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class _Meta(TorchDispatchMode):
    """Our ops on the meta device as a GPU's tensors have them: the implementation, launches and
    all, where torch would give shapes only."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if op.namespace == "llama_fast":
            cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            return op.redispatch(cpu, *args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def record(chip: Chip, config_index: int = 0) -> Iterator[Recording]:
    """kernels.common.record for calls of the public ops on the meta device."""
    with common.record(chip, config_index) as recording, use_backend("triton"), _Meta():
        yield recording


def target_of(chip: Chip) -> GPUTarget:
    return GPUTarget(chip.backend, chip.arch, chip.warp_size)


@dataclass(frozen=True)
class Specialised:
    """A launch bound to a chip, ready to be compiled; equal keys compile to the same code."""

    key: str
    compile: Callable[[], Any]


def specialise(launch: Launch, chip: Chip) -> Specialised:
    """What kernel[grid](...) would compile on the chip."""
    kernel, target = launch.kernel, target_of(chip)
    backend = make_backend(target)
    keywords = {
        "enable_fp_fusion": True,  # as common.launch does
        **launch.constants,
        **dict(launch.config.constants),
        "num_warps": launch.config.num_warps,
        "num_stages": launch.config.num_stages,
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialisation, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    parts = (kernel.__module__, kernel.__name__, target, signature, constants, attributes, options)
    return Specialised(
        repr(parts), lambda: triton.compile(source, target=target, options=options.__dict__)
    )


def compile_facts(specialised: Specialised, sass: bool = False) -> Facts:
    """Compiles, or takes from Triton's cache, where the facts lie beside the code. sass: what
    sm_90's machine code does not confirm does not count."""
    compiled, log = _compile(specialised)
    folder = Path(triton.knobs.cache.dir) / "llama_fast_static_2"
    stored = folder / f"{compiled.hash}{'.sass' if sass else ''}.json"
    if not log and "ptx" in compiled.asm:  # compiled before: ptxas said nothing
        if stored.exists():
            return Facts.from_json(json.loads(stored.read_text()))
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            compiled, log = _compile(specialised)
    found = _nvidia(compiled, log, sass) if "ptx" in compiled.asm else _amd(compiled)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as partial:
        json.dump(asdict(found), partial)
    Path(partial.name).replace(stored)
    return found


def _compile(specialised: Specialised) -> tuple[Any, str]:
    """The kernel and ptxas's report, empty when the kernel was in the cache."""
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        return specialised.compile(), said.getvalue()


def _nvidia(compiled: Any, log: str, sass: bool) -> Facts:
    ptx = compiled.asm["ptx"]
    found = _search(PTX, ptx)
    if sass:
        found = _confirmed(found, _search(SASS, _disassembled(compiled.asm["cubin"])))
    threads = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if threads is None or not spilled or not registers:
        raise RuntimeError(f"ptxas: no report of registers and spills in {log!r}")
    return Facts(
        registers=max(map(int, registers)),
        spills=sum(map(int, spilled)),
        stack=max(map(int, re.findall(r"(\d+) bytes stack frame", log))),
        shared=compiled.metadata.shared,
        threads=int(threads[1]),
        serialized="wgmma.mma_async instructions are serialized" in log,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        instructions=tuple(found),
        reductions=_reductions(compiled.asm["ttgir"]),
        arithmetic=_arithmetic(ptx),
    )


def _amd(compiled: Any) -> Facts:
    text = compiled.asm["amdgcn"]

    def stated(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    return Facts(
        registers=stated("vgpr_count"),
        spills=stated("vgpr_spill_count") + stated("sgpr_spill_count"),
        stack=stated("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        threads=64 * compiled.metadata.num_warps,
        serialized=False,
        instructions=tuple(_search(AMDGCN, text)),
        reductions=_reductions(compiled.asm["ttgir"]),
    )


def _reductions(ttgir: str) -> tuple[str, ...]:
    """'1x4096 #ttg.blocked<...>' for each reduction of fp32, in the order of the program."""
    layouts = dict(re.findall(r"^(#\w+) = (#\S+<.*>)$", ttgir, re.MULTILINE))
    operands = re.findall(
        r'"tt\.reduce".*?^\s*\}\) : \(tensor<(\S+)xf32, (.*?)>\) ->',
        ttgir,
        re.MULTILINE | re.DOTALL,
    )
    return tuple(f"{shape} {layouts.get(layout, layout)}" for shape, layout in operands)


def _arithmetic(ptx: str) -> tuple[str, ...]:
    found = Counter(re.findall(r"^\s*(fma\.rn|mul|add|sub)(?:\.rn)?\.f32", ptx, re.MULTILINE))
    return tuple(f"{name} {count}" for name, count in sorted(found.items()))


def _search(patterns: dict[str, str], text: str) -> list[str]:
    return [name for name, pattern in patterns.items() if re.search(pattern, text)]


def _confirmed(in_ptx: list[str], in_sass: list[str]) -> list[str]:
    """Of what machine code shows too, only what it shows; and what only it can show."""
    kept = [name for name in in_ptx if name in in_sass or name not in SASS]
    return kept + [
        name for name in in_sass if name in ("local memory", "tf32") and name not in kept
    ]


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
