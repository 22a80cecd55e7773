"""Run every op over inputs that end where mapped memory ends: `python -m tests.support.guarded`.

It runs in a process of its own, because a kernel that reads past an input kills the process. It
prints each call before it runs it, so the last line names the failing one. Sizes are odd, so that
every kernel runs its tails."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu

from .op_examples import OPS, example

FP8 = torch.float8_e4m3fn
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[Any] = []


def guarded(t: Tensor) -> Tensor:
    """Return a dense copy whose last byte is the last one before a protected page."""
    pages = -(-t.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = address + pages * mmap.PAGESIZE
    if _libc.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0):  # PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")
    _kept.append(memory)
    offset = pages * mmap.PAGESIZE - t.nbytes
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=t.nbytes, offset=offset)
    copy = copy.view(t.dtype).view(t.shape)
    copy.view(torch.uint8).copy_(t.contiguous().view(torch.uint8))
    return copy


def calls(dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor], dict[str, Any]]]:
    def x(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    for width in (1, 7, 93, 769):
        yield "rms_norm", [x(3, width), x(width)], {}
        yield "rms_norm_fp8", [x(3, width), x(width)], {"residual": guarded(x(3, width))}
        yield "silu_and_mul", [x(3, 2 * width)], {}
        yield "silu_and_mul_fp8", [x(3, 2 * width)], {}
        for granularity in ("tensor", "row", "block", "block_2d"):
            yield "quantize_fp8", [x(3, width)], {"granularity": granularity}
    positions, cache = torch.arange(3), x(1, 3, 1, 14)
    scales = {f"{name}_scale": guarded(torch.ones(1)) for name in "kv"}
    for interleaved in (False, True):
        table = lf.rope_table(1e4, 3, head_dim=14)
        arguments = [x(3, 2, 14), x(3, 1, 14), x(3, 1, 14), positions, table]
        yield "apply_rope", [*arguments[:2], *arguments[3:]], {"interleaved": interleaved}
        arguments += [cache, cache, positions]
        yield "apply_rope_and_append", arguments, {"interleaved": interleaved}
        arguments[5:7] = [cache.to(FP8), cache.to(FP8)]
        yield "apply_rope_and_append", arguments, {"interleaved": interleaved, **scales}
    for sq, d in itertools.product((1, 2, 50), (12, 24, 76)):
        yield "attention", [x(1, sq, 3, d), x(1, 77, 1, d), x(1, 77, 1, d)], {}
        lengths = torch.tensor([77], dtype=torch.int32)
        for to, given in ((dtype, {}), (FP8, scales)):
            caches = [x(1, 77, 1, d).to(to), x(1, 77, 1, d).to(to)]
            yield "attention_with_kvcache", [x(1, sq, 3, d), *caches, lengths], given
            table = torch.arange(11, dtype=torch.int32)[None]
            paged = [c.view(11, 7, 1, d) for c in caches]
            options = {"block_table": guarded(table), **given}
            yield "attention_with_kvcache", [x(1, sq, 3, d), *paged, lengths], options
    for m, (n, k) in itertools.product((1, 2, 7, 20), ((1, 1), (70, 129), (65, 2), (67, 770))):
        yield "linear", [x(m, k), x(n, k), x(n)], {}
        for scale in (torch.ones(1), torch.ones(n, 1), torch.ones(n, -(-k // 128))):
            yield "fp8_linear", [x(m, k), x(n, k).to(FP8), scale, x(n)], {}
            a, b = x(m, k).to(FP8), x(n, k).to(FP8)
            options = {"bias": guarded(x(n)), "out_dtype": dtype}
            yield "fp8_gemm", [a, b, torch.ones(m, 1), scale], options
    for k in (2, 62, 130):
        weight = x(64, k)
        yield "pack_weight", [weight], {}
        for m in (1, 2, 7, 20):
            yield "linear", [x(m, k), lf.pack_weight(weight)], {}
            packed = lf.pack_weight(weight.to(FP8))
            yield "fp8_linear", [x(m, k), packed, torch.ones(64, 1)], {}
    for op in OPS:
        given = example(op)
        if dtype == torch.float32:
            yield op, [], {n: guarded(v) if isinstance(v, Tensor) else v for n, v in given.items()}


def main() -> None:
    torch.set_num_threads(1)
    for isa in _cpu.isas():
        _cpu.set_isa(isa)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for op, tensors, options in calls(dtype):
                shapes = [list(t.shape) for t in tensors]
                print(f"{isa} {op} {dtype} {shapes} {list(options)}", flush=True)
                getattr(lf, op)(*map(guarded, tensors), **options)
                if op == "quantize_fp8":
                    _kept.clear()


if __name__ == "__main__":
    main()
