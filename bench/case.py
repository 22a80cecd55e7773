"""What a case of the suite is made of: ours, whom it is compared with, its limit, and the truth.

The limit is a run of its own, in the same rounds as the rest: a copy of the same bytes for ops on
activations, a read of the same weights or cache for what streams them, and for what computes
whatever this machine computes fastest with: multiply-adds in registers, or a matrix product.
Weights and caches rotate through more memory than the last-level cache holds; activations do not:
in a model the op before has just written them.

Where a tensor begins within its page changes the time of an op that is bound by a copy (loads wait
for stores to the same place of another page), and a process keeps its places. So those cases move
their tensors about while they are timed, and their noise shows what the places make.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llama_fast import _cpu

from . import machine, read_probe
from .shapes import Shapes, Sweep
from .timing import Run

CACHE_BYTES = 96 << 20  # more than the last-level caches of the machines this was tried on
CPU = torch.device("cpu")
LINE, PAGE = 64, 4096  # bytes
CHECKED_ROWS = 32  # from each end of an output: the truth is computed in fp64, which is slow


@dataclass(frozen=True)
class Spec:
    """What a run is about."""

    shapes: Shapes
    sweep: Sweep
    dtype: torch.dtype
    device: torch.device = CPU
    speed: machine.Speed = machine.UNBOUND

    @property
    def fp32_too(self) -> bool:
        """Whether products are compared with fp32's as well: see Speed.bf16_is_slow."""
        on_cpu = self.device.type == "cpu"
        return on_cpu and self.dtype == torch.bfloat16 and self.speed.bf16_is_slow

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    def randn(self, *shape: int) -> Tensor:
        return randn(*shape, dtype=self.dtype, device=self.device)

    def movable(self, *shape: int) -> Tensor:
        """randn, with room behind it to be moved by up to a page."""
        whole = self.randn(math.prod(shape) + PAGE // self.size)
        return whole[: math.prod(shape)].view(shape)


@dataclass(frozen=True)
class Case:
    """One op at one shape. Runs are called with the round's number, to rotate buffers by."""

    op: str
    shape: str
    axes: dict[str, int]  # the sizes that vary, by name: curves are drawn over them
    bytes: float  # that have to move: each input read and each output written once
    flops: float
    ours: Run
    baselines: dict[str, Run]
    limit: Run
    limit_work: float  # what one run of limit moves or computes
    limit_name: str  # "copy", "read", "matmul" or "fma"
    exact: Callable[[], Tensor]  # the truth, in fp64
    value: Callable[[Any], Tensor]  # of what a run returns, the part that exact is about
    arguments: Callable[[int], tuple[Any, ...]]  # of the op, by its public signature
    inputs: Mapping[str, Any] = field(default_factory=dict)  # the same by name, for peers
    targets: dict[str, float] = field(default_factory=dict)  # baseline or "limit" -> ratio wanted
    device: torch.device = CPU
    uncapturable: tuple[str, ...] = ()  # runs that wait for a GPU: no CUDA graph of them
    movable: tuple[Tensor, ...] = ()  # those of Spec.movable, moved while runs are timed
    # Baselines that can do less: called with n, a run of an nth of the work.
    parts: Mapping[str, Callable[[int], Run]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self.limit_name in ("matmul", "fma") else "GB/s"

    @property
    def work(self) -> float:
        """What the rate counts: bytes, or flops where matrices bound."""
        return self.flops if self.unit == "TFLOP/s" else self.bytes

    def move(self) -> None:
        """Every movable tensor begins at another line of its page; who holds it sees no change."""
        for t in self.movable:
            _move(t)

    def user(self, function: Callable[..., object]) -> Run:
        """Somebody's own kernel with the op's signature, as one more implementation."""
        return lambda i: function(*self.arguments(i))


@dataclass(frozen=True)
class Plan:
    """A case before its tensors exist."""

    op: str
    shape: str
    memory: float  # bytes that making and running it takes, about
    make: Callable[[], Case]

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


def relative_error(got: Tensor, exact: Tensor) -> float:
    """max |got - exact| / max |exact|; NaN where got has one."""
    exact = exact.double()
    scale = exact.abs().max().clamp(min=1e-30)
    return ((got.double() - exact).abs().max() / scale).item()


def errors(ours: Callable[[], Tensor], eager: Callable[[], Tensor], exact: Callable[[], Tensor]):
    """A function that gives ours' and eager's relative_error."""

    def compare() -> tuple[float, float]:
        truth = exact()
        return relative_error(ours(), truth), relative_error(eager(), truth)

    return compare


def ends(t: Tensor, rows: int = CHECKED_ROWS) -> Tensor:
    """The first and the last rows of the first dimension."""
    if t.shape[0] <= 2 * rows:
        return t
    raw = t.view(torch.uint8) if t.itemsize == 1 else t  # not every version joins FP8 tensors
    return torch.cat((raw[:rows], raw[-rows:])).view(t.dtype)


def first(result: Any) -> Tensor:
    """An op's first output."""
    return result[0] if isinstance(result, tuple) else result


def checked(result: Any) -> Tensor:
    """The checked rows of an op's first output."""
    return ends(first(result))


def randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Drawn in fp32, whatever the dtype: the same values in each, rounded. In slices: the fp32
    numbers of a large weight would not fit beside it."""
    out = torch.empty(*shape, dtype=dtype, device=device)
    flat, step = out.view(-1), 1 << 26
    for i in range(0, flat.numel(), step):
        part = flat[i : i + step]
        part.copy_(torch.randn(part.numel(), device=device))
    return out


def read(tensors: list[Tensor]) -> Run:
    """Reads a rotating tensor's memory as fast as it can be had."""
    if tensors[0].device.type != "cpu":
        words = [t.flatten().view(torch.int32) for t in tensors]
        return lambda i: read_probe.checksums(words[i % len(words)])
    threads = torch.get_num_threads()

    def run(i: int) -> None:
        t = tensors[i % len(tensors)]
        _cpu.read_bandwidth_probe(t.data_ptr(), t.numel() * t.itemsize, threads)

    return run


_places = random.Random(0)


def _move(t: Tensor) -> None:
    memory, data = t.untyped_storage(), t.clone()
    lines = (memory.nbytes() - t.nbytes) // LINE
    offset = _places.randint(0, lines) * LINE // t.itemsize
    t.set_(memory, offset, t.shape, t.stride()).copy_(data)


def copy(t: Tensor) -> Run:
    out = torch.empty_like(t)
    return lambda _: out.copy_(t)


def _product(device: torch.device) -> tuple[int, int, int]:
    return (512, 4096, 2048) if device.type == "cpu" else (8192, 8192, 8192)


def matmul_flops(device: torch.device) -> float:
    """Of one run of matmul_limit."""
    return 2.0 * math.prod(_product(device))


def matmul_limit(dtype: torch.dtype, device: torch.device = CPU) -> tuple[Run, float]:
    m, n, k = _product(device)
    a, b = randn(m, k, dtype=dtype, device=device), randn(n, k, dtype=dtype, device=device)
    return (lambda _: a @ b.t()), matmul_flops(device)


FMA_FLOPS = 2e9  # 4 ms at 0.5 TFLOP/s


def compute_limit(s: Spec) -> tuple[Run, float, str]:
    """A run of what computes fastest here, its operations, and its name as a limit."""
    if s.device.type != "cpu":
        return *matmul_limit(s.dtype, s.device), "matmul"
    how, _ = s.speed.fastest(s.dtype)
    if how != "fma":
        return *matmul_limit(getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[how])), "matmul"
    pairs, threads = s.dtype == torch.bfloat16, torch.get_num_threads()
    run: Run = lambda _: _cpu.multiply_add_probe(pairs, FMA_FLOPS, threads)  # noqa: E731
    return run, _cpu.multiply_add_probe(pairs, FMA_FLOPS, threads), "fma"


def cache_bytes(device: torch.device) -> int:
    """What rotating buffers have to add up to. Four times a GPU's last level: it is not LRU."""
    if device.type == "cpu":
        return CACHE_BYTES
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size


def copies(bytes_each: float, device: torch.device) -> int:
    """How many buffers to rotate through, so that none is found in the last-level cache."""
    return max(1, min(8, round(cache_bytes(device) / bytes_each) + 1))


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + (
            torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
