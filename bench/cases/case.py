"""Cases of the suite: ours, its baselines, its limit, and the exact result.

The limit is measured in the same rounds as the rest: a copy of the same bytes for ops on
activations, a read of the same weights or cache for ops that stream them, and the fastest
arithmetic of the machine for ops bound by it. Weights and caches rotate through more memory than
the last-level cache holds, and on a GPU so do activations. On a CPU activations stay in cache: in a
model the op before has just written them. They start at another line of their page in each round,
since loads that wait for stores to the same offset of another page slow an op, and a process would
keep its offsets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, reference

from ..timing import CPU, UNBOUND, Limit, Run, Speed, limits
from .shapes import Shapes, Sweep

CACHE_BYTES = 96 << 20  # more than the last-level caches of the machines this was tried on
LINE, PAGE = 64, 4096  # bytes
PLACES = 16  # offsets within a page at which activations on a CPU start
CHECKED_ROWS = 32  # from each end of an output: the exact result in fp64 is slow
PARTS = 8  # a slow baseline does at least an eighth of the work

Arguments = Callable[[int], tuple[Any, ...]]  # round -> an op's arguments, by its public signature
T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """Shapes, sizes, dtype and device of a run."""

    shapes: Shapes
    sweep: Sweep
    dtype: torch.dtype
    device: torch.device = CPU
    speed: Speed = UNBOUND

    @property
    def fp32_too(self) -> bool:
        """Return whether products are compared with fp32's too: see Speed.bf16_is_slow."""
        return not self.on_gpu and self.dtype == torch.bfloat16 and self.speed.bf16_is_slow

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    def either(self, cpu: T, gpu: T) -> T:
        return gpu if self.on_gpu else cpu

    def randn(self, *shape: int, cache: bool = False) -> Tensor:
        """Draw in fp32 and round, so that every dtype has the same values, in slices, since a large
        weight's fp32 numbers may not fit beside it. cache: ask for huge pages, as KVCache does."""
        out = torch.empty(*shape, dtype=self.dtype, device=self.device)
        if cache and out.is_cpu:
            _cpu.advise_huge_pages(out)
        for part in out.view(-1).split(1 << 26):
            part.copy_(torch.randn(part.numel(), device=self.device))
        return out

    def copies(self, bytes_each: float) -> int:
        """Return how many buffers to rotate through, so that the last-level cache holds none."""
        return max(1, min(8, round(cache_bytes(self.device) / bytes_each) + 1))

    def rotating(self, *shape: int, parts: float = 1.0, count: int = 0) -> list[Tensor]:
        """Make activations to rotate through: on a GPU more than its cache holds, on a CPU views of
        one buffer that start at different lines. parts: the bytes that a case moves, divided by a
        tensor's; count: the number of tensors instead."""
        size, step = math.prod(shape), LINE // self.size
        if self.on_gpu:
            most = math.ceil(cache_bytes(self.device) / (parts * size * self.size))
            return [self.randn(*shape) for _ in range(count or min(32, most))]
        whole = self.randn(size + PAGE // self.size)
        starts = [_places.randrange(PAGE // LINE) * step for _ in range(PLACES)]
        return [whole[start : start + size].view(shape) for start in starts]

    def compute(self, fp8: bool = False) -> Limit:
        return limits.compute(self.dtype, self.device, self.speed, fp8)


_places = random.Random(0)


@dataclass(frozen=True)
class Plan:
    """One op at one shape, before its tensors exist."""

    op: str
    shape: str
    axes: dict[str, int]  # the sizes that vary, by name, for curves
    bytes: float  # each input read and each output written once
    flops: float
    memory: float  # bytes that making and running it takes, estimated
    make: Callable[[], Case]

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    def work(self, limit: Limit) -> float:
        """Return what the rate counts: bytes, or flops where arithmetic is the limit."""
        return self.flops if limit.computes else self.bytes


def checked(result: Any) -> Tensor:
    """Return the checked rows of an op's first output."""
    return ends(result[0] if isinstance(result, tuple) else result)


@dataclass
class Case:
    """A plan's implementations. A run takes the round's number, which selects its buffers."""

    op: str
    arguments: Arguments
    limit: Limit
    exact: Callable[[], Tensor]  # the result in fp64
    value: Callable[[Any], Tensor] = checked  # the part of a run's result that exact corresponds to
    options: Mapping[str, Any] = field(default_factory=dict)  # the op's keyword arguments
    baselines: dict[str, Run] = field(default_factory=dict)
    # Baselines that can run a part: n -> a run of an nth of the work. `baselines` has n = 1.
    parts: dict[str, Callable[[int], Run]] = field(default_factory=dict)
    divides: bool = True  # whether the work divides by PARTS
    inputs: Mapping[str, Any] = field(default_factory=dict)  # by name, for peers; empty: no peers
    targets: Mapping[str, float] = field(default_factory=dict)  # baseline or "limit" -> ratio
    copies: int = 8  # the most buffers that the runs rotate through
    waits: tuple[str, ...] = ()  # runs that wait for a GPU and so cannot be in a CUDA graph
    packed: Arguments | None = None  # the arguments in the layout that our kernel reads

    def __post_init__(self) -> None:
        self.baselines = {**{name: part(1) for name, part in self.parts.items()}, **self.baselines}

    def ours(self, i: int) -> Any:
        return getattr(lf, self.op)(*(self.packed or self.arguments)(i), **self.options)

    def on(self, backend: str) -> Run:
        """Return our run with its op on that backend."""

        def run(i: int) -> object:
            with lf.use_backend(backend, op=self.op):
                return self.ours(i)

        return run

    def user(self, function: Callable[..., object]) -> Run:
        """Return a run of a function with the op's signature."""
        return lambda i: function(*self.arguments(i), **self.options)


def eager(op: str, arguments: Arguments, **options: Any) -> Run:
    twin = getattr(reference, op)
    return lambda i: twin(*arguments(i), **options)


def compiled(op: str, arguments: Arguments) -> Run:
    """Return a run of torch.compile's form of the eager twin, which the first call compiles."""

    @cache
    def twin() -> Callable[..., Any]:
        torch._dynamo.reset()  # each case's shapes count against a limit of variants
        # The cache's key does not hold the instruction set. A graph for AVX-512's vectors, reused
        # under forced AVX2, would skip half of the elements.
        torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
        return torch.compile(getattr(reference, op), dynamic=False)

    return lambda i: twin()(*arguments(i))


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return max |got - exact| / max |exact|; NaN if got has one."""
    exact = exact.double()
    scale = exact.abs().max().clamp(min=1e-30)
    return ((got.double() - exact).abs().max() / scale).item()


def ends(t: Tensor, rows: int = CHECKED_ROWS) -> Tensor:
    """Return the first and the last rows of the first dimension."""
    if t.shape[0] <= 2 * rows:
        return t
    raw = t.view(torch.uint8) if t.itemsize == 1 else t  # not every version concatenates FP8
    return torch.cat((raw[:rows], raw[-rows:])).view(t.dtype)


def cache_bytes(device: torch.device) -> int:
    """Return the bytes that rotating buffers need; four times a GPU's L2, which is not LRU."""
    if device.type == "cpu" or not torch.cuda.is_available():  # or a plan for an absent GPU
        return CACHE_BYTES
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size
