"""Compile a recorded launch for a chip that need not be present, and extract facts from the code.

The specialization is that of a real launch. Registers and local memory come from the machine code
(AMD: from the assembly's metadata), instructions from the PTX.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

from .binary import SASS, read, resources, search

# Instructions that are searched: name -> pattern in the PTX or AMD's assembly. cp.async.cg copies
# 16 bytes.
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
    "tf32": r"tf32",
}
AMDGCN = {
    "mfma": r"v_mfma_f32_\S*(bf16|f16)",
    "16-byte loads": r"(global|buffer)_load_dwordx4",
    "16-byte stores": r"(global|buffer)_store_dwordx4",
    "ex2": r"v_exp_f32",
    "tf32": r"xf32",
}


@dataclass(frozen=True)
class Facts:
    """Resources and instructions of a compiled kernel. Sizes are in bytes, registers per thread."""

    registers: int
    stack: int  # local memory per thread; AMD: plus spilled registers
    shared: int
    threads: int
    serialized: bool = False  # each wgmma waits for the one before
    tensor_memory: int = 0  # sm_100's, columns
    instructions: tuple[str, ...] = ()
    # A result's bits depend on these: the shape and layout of each fp32 reduction, and on NVIDIA's
    # chips the number of fp32 instructions of each kind, such as fused a * b + c.
    reductions: tuple[str, ...] = ()
    arithmetic: tuple[str, ...] = ()


class _Meta(TorchDispatchMode):
    """Run our ops' implementation, with its launches, on the meta device, where torch would only
    infer shapes."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if op.namespace == "llama_fast":
            cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            return op.redispatch(cpu, *args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def record(chip: Chip, config_index: int = 0) -> Iterator[Recording]:
    """Record the launches of the public ops on the meta device, see kernels.common.record."""
    with common.record(chip, config_index) as recording, use_backend("triton"), _Meta():
        yield recording


@functools.cache
def _binder(kernel: Any, target: GPUTarget) -> tuple[Any, Any]:
    backend = make_backend(target)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialize(launch: Launch, chip: Chip) -> tuple[str, Callable[[], Any]]:
    """Return a key, equal for equal code, and a function that compiles what kernel[grid](...) would
    compile on the chip. Triton's own binder decides which arguments are constants and which 16
    divides."""
    kernel, target = launch.kernel, GPUTarget(chip.backend, chip.arch, chip.warp_size)
    keywords = {
        "enable_fp_fusion": True,  # as common.launch does
        **launch.constants,
        **dict(launch.config.constants),
        "num_warps": launch.config.num_warps,
        "num_stages": launch.config.num_stages,
    }
    backend, bind = _binder(kernel, target)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, *bind(*launch.arguments, **keywords)
    )
    source = ASTSource(kernel, signature, constants, attributes)
    parts = (kernel.__module__, kernel.__name__, target, signature, constants, attributes, options)
    return repr(parts), lambda: triton.compile(source, target=target, options=options.__dict__)


def compile_facts(compiler: Callable[[], Any], arch: str) -> Facts:
    """Compile, or load from Triton's cache, and return the facts. For sm_90's kernels with wgmma,
    which ptxas rewrites, only instructions that are in the machine code count."""
    compiled = compiler()
    common_facts = {
        "shared": compiled.metadata.shared,
        "reductions": _reductions(compiled.asm["ttgir"]),
    }
    if text := compiled.asm.get("amdgcn"):
        stated = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)\n", text)}
        spilled = stated["vgpr_spill_count"] + stated["sgpr_spill_count"]
        return Facts(
            registers=stated["vgpr_count"],
            stack=stated["private_segment_fixed_size"] + spilled,
            threads=64 * compiled.metadata.num_warps,
            instructions=search(AMDGCN, text),
            **common_facts,
        )
    ptx, serialized = compiled.asm["ptx"], False
    found = search(PTX, ptx)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cubin, tool = Path(file.name), triton.knobs.nvidia.cuobjdump.path
        ((registers, stack, _),) = resources(cubin, arch, tool).values()
        if arch == "sm_90" and "wgmma.mma_async" in ptx:
            (kernel,) = read(cubin, "sm_90a", tool)
            serialized = kernel.serialized
            found = tuple(n for n in found if n in kernel.instructions or n not in SASS)
    threads = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
    assert threads, "no number of threads in the PTX"
    return Facts(
        registers=registers,
        stack=stack,
        threads=int(threads[1]),
        serialized=serialized,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        instructions=found,
        arithmetic=_arithmetic(ptx),
        **common_facts,
    )


def _reductions(ttgir: str) -> tuple[str, ...]:
    """Return '1x4096 #ttg.blocked<...>' for each fp32 reduction, in program order."""
    layouts = dict(re.findall(r"^(#\w+) = (#\S+<.*>)$", ttgir, re.MULTILINE))
    reduce = r'"tt\.reduce".*?^\s*\}\) : \(tensor<(\S+)xf32, (.*?)>\) ->'
    operands = re.findall(reduce, ttgir, re.MULTILINE | re.DOTALL)
    return tuple(f"{shape} {layouts.get(layout, layout)}" for shape, layout in operands)


def _arithmetic(ptx: str) -> tuple[str, ...]:
    found = Counter(re.findall(r"^\s*(fma\.rn|mul|add|sub)(?:\.rn)?\.f32", ptx, re.MULTILINE))
    return tuple(f"{name} {count}" for name, count in sorted(found.items()))
