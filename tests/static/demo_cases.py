"""Kernels with one fault each, and one without: what the static gate must and must not report."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.bench.static.triton import Case
from llama_fast.kernels import common

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@triton.jit
def matmul(  # noqa: D103
    a, b, c, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    rows, cols, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows[:, None] * k + (start + inner)[None, :])
        right = tl.load(b + cols[None, :] * k + (start + inner)[:, None])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + rows[:, None] * n + cols[None, :], total.to(c.dtype.element_ty))


@triton.jit
def copy(x, out, step, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at * step))


TUNER = common.Tuner(
    "demo", lambda chip, *key: [common.Config.of(M=m, N=128, K=64, num_warps=4) for m in (128, 64)]
)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_matmul(
    config: common.Config | None = None,
    dtype: torch.dtype = BF16,
    precision: str = "ieee",
) -> None:
    a, b, c = (empty(4096, 4096, dtype=dtype) for _ in range(3))
    config = config or TUNER.choose(a, (str(dtype),))
    common.launch(matmul, (32,), a, b, c, 4096, 4096, PRECISION=precision, config=config)


def launch_copy(step: int, dtype: torch.dtype = BF16) -> None:
    x = empty(4096, dtype=dtype)
    common.launch(copy, (1,), x, x, step, N=4096, config=common.Config.of())


def refuse() -> None:
    raise ValueError("x: got something else")


of = common.Config.of
CASES = [
    Case("good", "bf16", launch_matmul, {"matmul": ("matrix", "async copy")}),
    Case(
        "good",
        "fp8",
        lambda: launch_matmul(dtype=E4M3),
        {"matmul": ("e4m3 matrix",)},
        chips=("sm_89", "sm_90", "sm_100"),
    ),
    Case("good", "copy", lambda: launch_copy(1), {"copy": ("16-byte loads", "16-byte stores")}),
    Case(
        "spills",
        "256 x 256",
        lambda: launch_matmul(of(M=256, N=256, K=32)),
        chips=("sm_90", "gfx942"),
    ),
    Case(
        "exceeds",
        "many stages",
        lambda: launch_matmul(of(M=128, N=256, K=64, num_warps=8, num_stages=8)),
    ),
    Case(
        "loses_wgmma",
        "32 rows",
        lambda: launch_matmul(of(M=32, N=128, K=64)),
        {"matmul": ("matrix",)},
        chips=("sm_90",),
    ),
    Case(
        "tf32",
        "default precision",
        lambda: launch_matmul(of(M=64, N=64, K=32), torch.float32, "tf32"),
    ),
    Case("narrow", "strided", lambda: launch_copy(3), {"copy": ("16-byte loads",)}),
    Case(
        "occupancy",
        "two blocks planned",
        lambda: launch_matmul(of(M=128, N=256, K=64, num_warps=8)),
        blocks={"matmul": 2},
        chips=("sm_90",),
    ),
    Case("refuses", "raises", refuse, chips=("sm_90",)),
]
