"""What a case of the GPU report is made of, and at which sizes.

Each case makes its own tensors when its turn comes, so that a broken kernel or an empty budget
costs that case alone. Inputs are random, never zeros: those run cooler, and so faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .baselines import Compiler
from .case import cache_bytes
from .timing import Run

BF16 = torch.bfloat16
CHECKED_ROWS = 64  # from each end of the output: the truth is computed in fp64, which is slow


@dataclass(frozen=True)
class Sizes:
    """Llama 3.1's shapes: 8B's layer, and the hidden sizes of all three."""

    tokens: int = 32768
    step_tokens: int = 1  # a decode step's, for the ops between the products
    hidden: tuple[int, ...] = (4096, 8192, 16384)
    inner: int = 14336
    inner_tokens: tuple[int, ...] = (8192, 32768)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    prefill: tuple[int, ...] = (16384, 2048, 4096, 8192, 32768)  # the first: the target's
    eager_prefill: int = 4096  # its scores are 2 GB in fp32 there
    decode: tuple[tuple[int, int], ...] = ((32, 4096), (1, 131072), (8, 32768))
    chunk: tuple[int, int] = (512, 8192)  # queries, keys
    square: int = 8192
    block: tuple[int, int, int] = (4096, 7168, 16384)
    few: tuple[int, ...] = (1, 16, 64)
    many: tuple[int, ...] = (512, 2048, 8192, 16384)

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """8B's four linears, [N, K]."""
        h, width = self.hidden[0], self.heads * self.head_dim
        return {
            "gate_up": (2 * self.inner, h),
            "down": (h, self.inner),
            "qkv": (width + 2 * self.kv_heads * self.head_dim, h),
            "output": (h, width),
        }


FULL = Sizes()
# Every line of the report's code in seconds on a CPU: what is found there costs no GPU time.
TINY = Sizes(
    tokens=16,
    step_tokens=2,
    hidden=(128, 256),
    inner=256,
    inner_tokens=(8, 16),
    heads=4,
    kv_heads=2,
    head_dim=32,
    prefill=(48, 16),
    eager_prefill=16,
    decode=((2, 160), (1, 300)),
    chunk=(4, 150),
    square=256,
    block=(16, 256, 256),
    few=(1, 16),
    many=(32,),
)


@dataclass(frozen=True)
class GpuCase:
    op: str
    shape: str
    bytes: float  # that have to move: each input read and each output written once
    flops: float
    limit: str  # "copy", "read", "bf16" or "fp8": a name of limits.py
    runs: dict[str, Run]  # "ours" first
    error: Callable[[], tuple[float, float]]  # ours and eager's, max |x - exact| / max |exact|
    skipped: dict[str, str] = field(default_factory=dict)  # baselines that are not to be had: why
    uncapturable: tuple[str, ...] = ()
    copies: int = 1
    predict: dict[str, Any] = field(default_factory=dict)  # cost_model.predict's keywords
    arguments: tuple[Any, ...] = ()  # what dispatch.shape_class decides by

    @property
    def unit(self) -> str:
        return "GB/s" if self.limit in ("copy", "read") else "TFLOP/s"

    @property
    def work(self) -> float:
        return self.bytes if self.unit == "GB/s" else self.flops


@dataclass(frozen=True)
class Spec:
    """A case before its tensors exist. tag: which of targets.py's rows it is, if any."""

    name: str
    build: Callable[[], GpuCase]
    tag: str = ""


@dataclass(frozen=True)
class Place:
    """Where a report's cases are made, and at which sizes."""

    device: torch.device
    sizes: Sizes
    compiler: Compiler
    rivals: tuple[str, ...] = ()  # backends that every case is measured on, the serving one too

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=BF16)

    def copies(self, bytes_each: float) -> int:
        """How many buffers to rotate through; two at least on a CPU, so that rotating is tried."""
        if self.device.type == "cpu":
            return 2
        return max(1, min(32, math.ceil(cache_bytes(self.device) / bytes_each)))


def ends(t: Tensor) -> Tensor:
    """The first and the last rows of the first dimension."""
    if t.shape[0] <= 2 * CHECKED_ROWS:
        return t
    raw = t.view(torch.uint8) if t.itemsize == 1 else t  # not every version joins FP8 tensors
    return torch.cat((raw[:CHECKED_ROWS], raw[-CHECKED_ROWS:])).view(t.dtype)


class Unsupported(Exception):
    """A case that this version or machine does not offer: left out, with its reason."""
