"""Read memory on a GPU: the limit of kernels that stream weights or a cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, STEPS = 4096, 16  # 16 KiB a step: 8 warps x 4 loads of 16 bytes a thread


@triton.jit
def _read(x, out, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the xor of this program's STEPS blocks of x [n] int32, so that no word is skipped."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        at = (program.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        total ^= tl.load(x + at, mask=at < n, other=0)
    tl.store(out + program, tl.xor_sum(total, 0))


def checksums(words: Tensor) -> Tensor:
    """Read words [n] int32 once; return the xor of each BLOCK * STEPS of them."""
    programs = triton.cdiv(words.numel(), BLOCK * STEPS)
    out = torch.empty(programs, dtype=torch.int32, device=words.device)
    _read[(programs,)](words, out, words.numel(), BLOCK=BLOCK, STEPS=STEPS, num_warps=8)
    return out
