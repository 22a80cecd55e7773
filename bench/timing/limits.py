"""Make the limits that are measured with the kernels: a copy of the same bytes, a read of the same
memory, and the machine's fastest arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama_fast import _cpu

from .figures import Run
from .machine import Speed

FMA_FLOPS = 2e9  # 4 ms at 0.5 TFLOP/s


class Limit(NamedTuple):
    run: Run
    work: float  # bytes or operations of one run
    name: str  # "copy", "read", "matmul", "FP8 matmul" or "fma"

    @property
    def computes(self) -> bool:
        return self.name not in ("copy", "read")


def copy(tensors: Sequence[Tensor]) -> Limit:
    out, n = torch.empty_like(tensors[0]), len(tensors)
    return Limit(lambda i: out.copy_(tensors[i % n]), 2.0 * out.nbytes, "copy")


def read(tensors: Sequence[Tensor], work: float | None = None) -> Limit:
    """Make a run that reads a rotating tensor's memory at full speed. work: bytes to count."""
    size, n = float(tensors[0].nbytes) if work is None else work, len(tensors)
    return Limit(lambda i: read_once(tensors[i % n]), size, "read")


def read_once(t: Tensor) -> None:
    if t.device.type == "cpu":
        _cpu.read_bandwidth_probe(t.data_ptr(), t.numel() * t.itemsize, torch.get_num_threads())
        return
    from .read_probe import checksums  # needs Triton

    checksums(t.view(-1).view(torch.int32))


def compute(dtype: torch.dtype, device: torch.device, speed: Speed, fp8: bool = False) -> Limit:
    """Make the fastest arithmetic here: multiply-adds in registers, or a matrix product. fp8: use
    torch's e4m3 product if this GPU has one."""
    if device.type != "cpu":
        if fp8:
            limit = _product(torch.float8_e4m3fn, device)
            try:
                limit.run(0)
                return limit
            except RuntimeError:
                pass
        return _product(dtype, device)
    how, _ = speed.fastest(dtype)
    if how != "fma":
        return _product(torch.bfloat16 if how == "bf16" else torch.float32, device)
    pairs, threads = dtype == torch.bfloat16, torch.get_num_threads()

    def run(_: int) -> float:
        return _cpu.multiply_add_probe(pairs, FMA_FLOPS, threads)

    return Limit(run, run(0), "fma")


def _product(dtype: torch.dtype, device: torch.device) -> Limit:
    m, n, k = (512, 4096, 2048) if device.type == "cpu" else (8192, 8192, 8192)
    a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    flops = 2.0 * math.prod((m, n, k))
    if dtype != torch.float8_e4m3fn:
        return Limit(lambda _: a @ b.t(), flops, "matmul")
    one, out = torch.ones((), device=device), torch.bfloat16

    def run(_: int) -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=out, use_fast_accum=True)

    return Limit(run, flops, "FP8 matmul")
