"""Describe this machine, and measure in a second or two how fast it is.

Its rates size jobs, rounds and baselines, and the fastest one is the limit of products. Where bf16
products are no faster than fp32's, the fp32 baselines are measured too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import llama_fast as lf
from llama_fast import _cpu

PRODUCT = (128, 2048, 2048)  # M, N, K: 0.05 s where bf16 has no instruction (11 GFLOP/s a core)
FLOPS = 2e8  # of multiply-adds in registers per call
BUFFER = 128 << 20  # bytes
SECONDS = 0.3  # for each rate
CALLS = 8  # of a product or a read at most, so that jobs fit a busy machine
# A bf16 instruction does at least twice the operations of an fp32 one; with conversions bf16 is
# slower than fp32. This is half way between, on a logarithmic scale.
WITH_INSTRUCTION = 2**0.5
# A product beats multiply-adds in registers only if it has other instructions than ours (AMX, or a
# larger set), and then by far. A smaller difference is a neighbor's load.
BY_FAR = 1.25
# Our rate, estimated: a share of multiply-adds in registers, at most a multiple of PyTorch's.
REACHED, TIMES = 0.75, 1.3


@dataclass(frozen=True)
class Speed:
    """Operations a second of PyTorch's products of 128 rows and of multiply-adds in registers (with
    llama_fast's instruction set), and bytes read a second; the best of the calls."""

    bf16: float
    fp32: float
    fma: float  # fp32
    fma_bf16: float  # summed in fp32; equal to fma without such an instruction
    read: float

    @property
    def bf16_is_slow(self) -> bool:
        """Return whether eager PyTorch's bf16 products are no faster than fp32's. PyTorch's own
        rates decide, since it may be restricted to fewer instructions than the processor has."""
        return self.bf16 < WITH_INSTRUCTION * self.fp32

    @property
    def ours(self) -> float:
        """Estimate the operations a second of our products."""
        return min(REACHED * self.fma_bf16, TIMES * max(self.bf16, self.fp32))

    def fastest(self, dtype: torch.dtype) -> tuple[str, float]:
        """Return the fastest, "fma" or the dtype of a product, and its operations a second."""
        rates = {"fp32": self.fp32, "fma": BY_FAR * self.fma}
        if dtype == torch.bfloat16:
            rates |= {"bf16": self.bf16, "fma": BY_FAR * max(self.fma, self.fma_bf16)}
        name = max(rates, key=lambda name: rates[name])
        return name, rates[name] / (BY_FAR if name == "fma" else 1)

    def __str__(self) -> str:
        products, fma = (
            f"bf16 {bf16 / 1e12:.3g}, fp32 {fp32 / 1e12:.3g} TFLOP/s"
            for bf16, fp32 in ((self.bf16, self.fp32), (self.fma_bf16, self.fma))
        )
        slow = "; bf16 products are slow here, fp32's stand beside them" * self.bf16_is_slow
        return f"products {products}; in registers {fma}; reads {self.read / 1e9:.3g} GB/s{slow}"


# Makes no size smaller: for tests at tiny shapes and for GPUs.
UNBOUND = Speed(bf16=2e18, fp32=1e18, fma=1e18, fma_bf16=2e18, read=1e18)


def measure() -> Speed:
    threads = torch.get_num_threads()
    m, n, k = PRODUCT
    a, b = torch.randn(m, k), torch.randn(n, k)
    a16, b16 = a.bfloat16(), b.bfloat16()
    buffer = torch.zeros(BUFFER, dtype=torch.uint8)
    flops = 2.0 * m * n * k
    return Speed(
        bf16=_rate(lambda: a16 @ b16.t(), flops),
        fp32=_rate(lambda: a @ b.t(), flops),
        fma=_rate(lambda: _cpu.multiply_add_probe(False, FLOPS, threads), FLOPS, calls=1000),
        fma_bf16=_rate(lambda: _cpu.multiply_add_probe(True, FLOPS, threads), FLOPS, calls=1000),
        read=_rate(
            lambda: _cpu.read_bandwidth_probe(buffer.data_ptr(), BUFFER, threads), float(BUFFER)
        ),
    )


def _rate(call: Callable[[], object], work: float, calls: int = CALLS) -> float:
    call()
    best, begun = float("inf"), time.perf_counter()
    for _ in range(calls):
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - begun > SECONDS:
            break
    return work / best


def halved(size: int, seconds: float, budget: float, least: int) -> int:
    """Halve size, which takes `seconds`, until it fits the budget or half is less than `least`."""
    while seconds > budget and size // 2 >= least:
        size, seconds = size // 2, seconds / 2
    return size


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Describe hardware, versions, threads and commit, without the host name, since the file is
    meant to be shared. device: where the run measures; a GPU adds its driver, clocks and compilers.
    """
    return {
        "cpu": _cpu_name(),
        "isa": _cpu.isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llama_fast": lf.__version__,
        "commit": commit,
        **(_gpu() if device.type == "cuda" else {}),
    }


# nvidia-smi's queries, and the names of the answers. Nothing is ever set.
_SMI = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.limit": "power_limit_w",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
    "mig.mode.current": "mig",
}


def _gpu() -> dict[str, Any]:
    """Describe what figures on a GPU depend on besides its name, without clocks if nvidia-smi is
    missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        answers = [text.strip() for text in asked.stdout.partition("\n")[0].split(",")]
    except (OSError, subprocess.SubprocessError):
        answers = []
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {
        "sm": "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "gpu_memory_gib": round(torch.cuda.get_device_properties().total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: installed.get(name) for name in ("triton", "transformers")},
        **dict(zip(_SMI.values(), answers, strict=False)),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
