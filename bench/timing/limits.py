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
    size = float(tensors[0].nbytes) if work is None else work
    n = len(tensors)
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
        return (_fp8_product(device) if fp8 else None) or _product(dtype, device)
    how, _ = speed.fastest(dtype)
    if how != "fma":
        return _product(torch.bfloat16 if how == "bf16" else torch.float32, device)
    pairs, threads = dtype == torch.bfloat16, torch.get_num_threads()

    def run(_: int) -> float:
        return _cpu.multiply_add_probe(pairs, FMA_FLOPS, threads)

    return Limit(run, run(0), "fma")


def _operands(device: torch.device) -> tuple[Tensor, Tensor, float]:
    m, n, k = (512, 4096, 2048) if device.type == "cpu" else (8192, 8192, 8192)
    a, b = (torch.randn(rows, k, device=device) for rows in (m, n))
    return a, b, 2.0 * math.prod((m, n, k))


def _product(dtype: torch.dtype, device: torch.device) -> Limit:
    a, b, flops = _operands(device)
    a, b = a.to(dtype), b.to(dtype)
    return Limit(lambda _: a @ b.t(), flops, "matmul")


def _fp8_product(device: torch.device) -> Limit | None:
    a, b, flops = _operands(device)
    a, b = (t.to(torch.float8_e4m3fn) for t in (a, b))
    one = torch.ones((), device=device)

    def run(_: int) -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        run(0)
    except RuntimeError:
        return None
    return Limit(run, flops, "FP8 matmul")
