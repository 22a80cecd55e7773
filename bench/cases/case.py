"""What a case of the suite is made of: ours, what it is compared with, its limit, and the truth.

The limit is a run of its own, in the same rounds as the rest: a copy of the same bytes for ops on
activations, a read of the same weights or cache for what streams them, and for what computes
whatever this machine computes fastest with. Weights and caches rotate through more memory than the
last-level cache holds, on a GPU activations too. On a CPU activations stay: in a model the op
before has just written them. But they begin at another line of their page from round to round,
since an op bound by a copy is slower where loads wait for stores to the same place of another page,
and a process keeps its places.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu, reference

from ..timing import CPU, Run, limits, machine
from ..timing.limits import Limit
from .shapes import Shapes, Sweep

CACHE_BYTES = 96 << 20  # more than the last-level caches of the machines this was tried on
LINE, PAGE = 64, 4096  # bytes
PLACES = 16  # within a page, that activations on a CPU begin at
CHECKED_ROWS = 32  # from each end of an output: the truth is computed in fp64, which is slow
PARTS = 8  # a slow baseline does an eighth of the work at least

Arguments = Callable[[int], tuple[Any, ...]]  # of an op, by its public signature, in a round


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
        return not self.on_gpu and self.dtype == torch.bfloat16 and self.speed.bf16_is_slow

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    def randn(self, *shape: int, cache: bool = False) -> Tensor:
        """Draw in fp32, whatever the dtype: the same values in each, rounded. In slices: the fp32
        numbers of a large weight would not fit beside it. cache: ask for huge pages, as KVCache
        does."""
        out = torch.empty(*shape, dtype=self.dtype, device=self.device)
        if cache and out.is_cpu:
            _cpu.advise_huge_pages(out)
        flat, step = out.view(-1), 1 << 26
        for i in range(0, flat.numel(), step):
            part = flat[i : i + step]
            part.copy_(torch.randn(part.numel(), device=self.device))
        return out

    def copies(self, bytes_each: float) -> int:
        """How many buffers to rotate through, so that none is found in the last-level cache."""
        return max(1, min(8, round(cache_bytes(self.device) / bytes_each) + 1))

    def rotating(self, *shape: int, parts: float = 1.0, count: int = 0) -> list[Tensor]:
        """Make activations to rotate through: on a GPU more than its cache holds, on a CPU views of
        one buffer, each from another line on. parts: bytes that the case moves, of a tensor's;
        count: how many, instead."""
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
class Case:
    """One op at one shape. Runs are called with the round's number, to rotate buffers by."""

    op: str
    shape: str
    axes: dict[str, int]  # the sizes that vary, by name: curves are drawn over them
    bytes: float  # that have to move: each input read and each output written once
    flops: float
    arguments: Arguments
    ours: Run
    baselines: dict[str, Run]
    limit: Limit
    exact: Callable[[], Tensor]  # the truth, in fp64
    value: Callable[[Any], Tensor]  # of what a run returns, the part that exact is about
    options: Mapping[str, Any] = field(default_factory=dict)  # of the op, by keyword
    inputs: Mapping[str, Any] = field(default_factory=dict)  # by name, for peers; none: no peers
    targets: dict[str, float] = field(default_factory=dict)  # baseline or "limit" -> ratio wanted
    copies: int = 8  # that the runs rotate through at most
    waits: tuple[str, ...] = ()  # runs that wait for a GPU: no CUDA graph of them
    # Baselines that can do less: called with n, a run of an nth of the work.
    parts: Mapping[str, Callable[[int], Run]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self.limit.computes else "GB/s"

    @property
    def work(self) -> float:
        """What the rate counts: bytes, or flops where matrices bound."""
        return self.flops if self.limit.computes else self.bytes

    def on(self, backend: str) -> Run:
        """Return our run with its op on that backend."""

        def run(i: int) -> object:
            with lf.use_backend(backend, op=self.op):
                return self.ours(i)

        return run

    def user(self, function: Callable[..., object]) -> Run:
        """Return a run of a function with the op's signature."""
        return lambda i: function(*self.arguments(i), **self.options)


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


def ours(op: str, arguments: Arguments, **options: Any) -> Run:
    return lambda i: getattr(lf, op)(*arguments(i), **options)


def eager(op: str, arguments: Arguments, **options: Any) -> Run:
    twin = getattr(reference, op)
    return lambda i: twin(*arguments(i), **options)


def compiled(op: str, arguments: Arguments) -> Run:
    """torch.compile of the eager twin. Nothing is compiled before it is called."""
    twin: list[Callable[..., Any]] = []

    def run(i: int) -> Any:
        if not twin:
            torch._dynamo.reset()  # or one case's shapes count against another's limit of variants
            # A cached graph is found again whatever instruction set it was made for: loops in steps
            # of AVX-512's vectors, held to AVX2, leave half of the elements out.
            torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
            twin.append(torch.compile(getattr(reference, op), dynamic=False))
        return twin[0](*arguments(i))

    return run


def relative_error(got: Tensor, exact: Tensor) -> float:
    """max |got - exact| / max |exact|; NaN where got has one."""
    exact = exact.double()
    scale = exact.abs().max().clamp(min=1e-30)
    return ((got.double() - exact).abs().max() / scale).item()


def ends(t: Tensor, rows: int = CHECKED_ROWS) -> Tensor:
    """Return the first and the last rows of the first dimension."""
    if t.shape[0] <= 2 * rows:
        return t
    raw = t.view(torch.uint8) if t.itemsize == 1 else t  # not every version joins FP8 tensors
    return torch.cat((raw[:rows], raw[-rows:])).view(t.dtype)


def checked(result: Any) -> Tensor:
    """Return the checked rows of an op's first output."""
    return ends(result[0] if isinstance(result, tuple) else result)


def cache_bytes(device: torch.device) -> int:
    """What rotating buffers have to add up to. Four times a GPU's last level: it is not LRU."""
    if device.type == "cpu":
        return CACHE_BYTES
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size
