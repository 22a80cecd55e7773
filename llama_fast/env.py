"""The report of `llama-fast env`: what runs here, and why."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from . import __version__, _cpu
from . import ops as ops  # registers them
from .dispatch import backends

# Those that kernels are or could be compiled for; a CPU lists hundreds.
_FEATURES = (
    "avx2 fma f16c avx512f avx512bw avx512vl avx512vbmi avx512_vnni avx512_bf16 avx512_fp16 "
    "avx_vnni amx_bf16 amx_int8 asimd asimdhp bf16 i8mm sve sve2"
)
_VARIABLES = (
    "LLAMA_FAST_BACKEND",
    "LLAMA_FAST_CPU_AMX",
    "LLAMA_FAST_CPU_INT16",
    "LLAMA_FAST_CPU_ISA",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "MKL_NUM_THREADS",
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
)


def report() -> str:
    sections = {
        "versions": _versions(),
        "machine": _machine(),
        "llama_fast": _extension(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    lines = []
    for title, values in sections.items():
        lines.append(title)
        lines += [f"  {key:<20}{value}" for key, value in values.items()] or ["  (nothing set)"]
    lines.append("backends")
    lines += [f"  {line}" for line in str(backends()).splitlines()]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    versions = {"llama_fast": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers", "safetensors", "compressed-tensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch CUDA"] = torch.version.cuda or "not built in"
    return versions


def _machine() -> dict[str, str]:
    model, features = _cpu_info()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "system": platform.platform(),
        "cpu": model,
        "cpu features": " ".join(features) or "unknown",
        "cpus": f"{usable} usable of {os.cpu_count()}",
        "memory": _memory(),
    }
    if not torch.cuda.is_available():
        machine["gpu"] = "none that torch can use"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        machine[f"gpu {i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB"
    return machine


def _extension() -> dict[str, str]:
    return {
        "installed in": str(Path(__file__).parent),
        "extension": Path(_cpu.__file__).name,
        "in use": f"{_cpu.isa()}, of {', '.join(_cpu.isas())}",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)",
    }


def _cpu_info() -> tuple[str, list[str]]:
    """Return the CPU's name and features: on Linux from /proc, elsewhere the name only."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key in ("flags", "Features"):
                flags.update(value.split())
    return model, [name for name in _FEATURES.split() if name in flags]


def _memory() -> str:
    """Return free and total memory: the free memory decides whether a model fits."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {key: int(rest.split()[0]) for key, _, rest in (x.partition(":") for x in lines)}
        return f"{kib['MemAvailable'] / 2**20:.1f} GiB free of {kib['MemTotal'] / 2**20:.1f}"
    except (OSError, KeyError, ValueError, IndexError):
        return "unknown"
