"""The calls that bench.static.triton compiles: each op at Llama shapes, and its kernels' needs.

They call the public ops, so that only what users launch is compiled. A size matters only if a
launcher or Triton's specialization uses it: the kernels for 8B's and 70B's shapes differ where a
size is a constant of the kernel, not where it is an argument that 16 divides in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import tune
from llama_fast.dispatch import OPS

from . import LINEAR
from .triton import ANY, MAY_SERIALIZE, Case

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
I32, I64 = torch.int32, torch.int64
TOKENS, KV_HEADS = 8192, 8


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(hidden: int, residual: bool, fp8: bool, dtype: torch.dtype = BF16) -> None:
    x, other = (empty(TOKENS, hidden, dtype=dtype) for _ in range(2))
    weight = empty(hidden, dtype=dtype)
    if fp8:
        lf.rms_norm_fp8(x, weight, residual=other if residual else None)
    elif residual:
        lf.add_rms_norm(x, other, weight)
    else:
        lf.rms_norm(x, weight)


def silu(inner: int, fp8: bool) -> None:
    gate_up = empty(TOKENS, 2 * inner)
    lf.silu_and_mul_fp8(gate_up) if fp8 else lf.silu_and_mul(gate_up)


def quantize(granularity: str, rows: int, cols: int) -> None:
    lf.quantize_fp8(empty(rows, cols), granularity)


def qkv(heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Return views of the fused projection's output, as in the model."""
    fused = empty(TOKENS, heads + 2 * KV_HEADS, d, dtype=dtype)
    return list(fused.split((heads, KV_HEADS, KV_HEADS), 1))


def cache(*shape: int, fp8: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return k_cache, v_cache and an FP8 cache's scales."""
    k, v = (empty(*shape, KV_HEADS, 128, dtype=E4M3 if fp8 else BF16) for _ in range(2))
    return k, v, {f"{n}_scale": empty(1, dtype=FP32) if fp8 else None for n in "kv"}


def rotate(append: bool = False, interleaved: bool = False, fp8: bool = False) -> None:
    q, k, v = qkv(32, 128, BF16)
    table, positions = empty(131072, 128, dtype=FP32), empty(TOKENS, dtype=I64)
    if append:
        keys, values, scales = cache(1024, 64, fp8=fp8)
        slots = empty(TOKENS, dtype=I64)
        lf.apply_rope_and_append(
            q, k, v, positions, table, keys, values, slots, interleaved=interleaved, **scales
        )
    else:
        lf.apply_rope(q, k, positions, table, interleaved=interleaved)


def prefill(
    causal: bool = True, packed: bool = False, d: int = 128, dtype: torch.dtype = BF16
) -> None:
    q, k, v = qkv(32, d, dtype)
    if packed:
        cu = empty(5, dtype=I32)
        lf.attention(q, k, v, causal=causal, cu_seqlens_q=cu, cu_seqlens_k=cu)
    else:
        lf.attention(q[None], k[None], v[None], causal=causal)


def decode(queries: int = 1, paged: bool = True, fp8: bool = False, heads: int = 32) -> None:
    batch, keys, block = 32, 8192, 64
    shape = (batch * keys // block, block) if paged else (batch, keys)
    k, v, scales = cache(*shape, fp8=fp8)
    q, lengths = empty(batch, queries, heads, 128), empty(batch, dtype=I32)
    table = empty(batch, keys // block, dtype=I32) if paged else None
    lf.attention_with_kvcache(q, k, v, lengths, block_table=table, **scales)


def product(
    m: int, n: int, k: int, x: torch.dtype = E4M3, blocks: bool = False, out: torch.dtype = BF16
) -> None:
    rows, weight = empty(m, k, dtype=x), empty(n, k, dtype=E4M3)
    shape = (-(-n // 128), -(-k // 128)) if blocks else (n, 1)
    weight_scale = empty(*shape, dtype=FP32)
    if x == E4M3:
        x_scale = empty(m, shape[1], dtype=FP32)
        lf.fp8_gemm(rows, weight, x_scale, weight_scale, out_dtype=out)
    else:
        lf.fp8_linear(rows, weight, weight_scale, quantize_activation=False)


# ---- the cases: op, name, call, needs, alike ----

LOADS, STORES = "16-byte loads", "16-byte stores"
NORM = {"_rms_norm_kernel": (LOADS, STORES)}
NORM_FP8 = {"_rms_norm_kernel": (LOADS, "hardware e4m3")}
SUM_FP8 = {"_rms_norm_kernel": (LOADS, STORES, "hardware e4m3")}  # it stores the new residual
SUMS = {"reductions": "the same rows"}  # fusing changes no bit
FP32_SUMS = {"reductions": "the same rows in fp32"}
SILU_FP8 = dict.fromkeys(("_row_fp8_kernel", "_wide_fp8_kernel"), (LOADS, "hardware e4m3", "ex2"))
QUANTIZE = {
    "_amax_kernel": (LOADS,),
    **dict.fromkeys(
        ("_group_kernel", "_wide_row_kernel", "_square_kernel", "_tensor_kernel"),
        (LOADS, "hardware e4m3"),
    ),
}
ROPE = {"_rope_kernel": (LOADS, STORES)}
ATTENTION = {"_attention": ("matrix", "async copy", "ex2", LOADS)}
DECODE = {
    "_attend": ("small matrix", "async copy", "ex2", LOADS),
    "_combine": (LOADS, "ex2"),
}
DECODE_FP8 = {"_attend": (*DECODE["_attend"], "hardware e4m3")}
CHUNK = {"_attend": ("matrix", "async copy", "ex2", LOADS)}
# The layout of a cache changes no bit.
LAYOUTS = {"reductions": "1 query", "arithmetic": "1 query"}
CHUNK_LAYOUTS = {"reductions": "chunk", "arithmetic": "chunk"}
# On sm_80 and AMD, which cannot multiply e4m3, _stream serves every case and decodes.
GEMM = {"_gemm": ("e4m3 matrix", "async copy", STORES), "_stream": ("16-bit matrix", LOADS)}
STREAM = {"_stream": ("small e4m3 matrix", "async copy", LOADS), "_add_splits": (LOADS,)}
# wgmma takes a weight decoded to 16 bits from registers, so each product waits for its decoding. On
# chips with wgmma, activations are quantized unless the caller forbids it.
DECODED = {"_stream": ("small matrix", "async copy", LOADS, MAY_SERIALIZE)}
GATE_UP = (28672, 4096)

# fmt: off
CASES: list[Case] = [
    Case("rms_norm", "8B", partial(norm, 4096, False, False), NORM, SUMS, False),
    Case("rms_norm", "8B + residual", partial(norm, 4096, True, False), NORM, SUMS, False),
    Case("rms_norm", "8B FP8", partial(norm, 4096, False, True), NORM_FP8, SUMS, False),
    Case("rms_norm", "8B + residual FP8", partial(norm, 4096, True, True), SUM_FP8, SUMS),
    Case("rms_norm", "70B + residual", partial(norm, 8192, True, False), NORM),
    Case("rms_norm", "405B + residual FP8", partial(norm, 16384, True, True), SUM_FP8),
    Case("rms_norm", "8B fp32", partial(norm, 4096, False, False, FP32), NORM, FP32_SUMS, False),
    Case("rms_norm", "8B fp32 + residual FP8", partial(norm, 4096, True, True, FP32), SUM_FP8,
         FP32_SUMS),
    Case("activation", "8B", partial(silu, 14336, False), {"_tile_kernel": (LOADS, STORES, "ex2")}),
    Case("activation", "8B FP8", partial(silu, 14336, True), SILU_FP8),
    Case("activation", "70B FP8", partial(silu, 28672, True), SILU_FP8, largest=False),
    Case("activation", "405B FP8", partial(silu, 53248, True), SILU_FP8),
    Case("quantize", "tensor", partial(quantize, "tensor", 8192, 4096), QUANTIZE),
    Case("quantize", "row 8B", partial(quantize, "row", 8192, 4096), QUANTIZE),
    Case("quantize", "row 405B", partial(quantize, "row", 8192, 53248), QUANTIZE),
    Case("quantize", "block", partial(quantize, "block", 8192, 4096), QUANTIZE),
    Case("quantize", "block_2d", partial(quantize, "block_2d", 4096, 14336), QUANTIZE),
    Case("rope", "q and k", rotate, ROPE, largest=False),
    Case("rope", "interleaved", partial(rotate, interleaved=True), ROPE),
    Case("rope", "append", partial(rotate, append=True), ROPE, largest=False),
    Case("rope", "append FP8", partial(rotate, append=True, fp8=True),
         {"_rope_kernel": (LOADS, "hardware e4m3")}),
    Case("attention", "causal", prefill, ATTENTION),
    Case("attention", "full", partial(prefill, causal=False), ATTENTION, largest=False),
    Case("attention", "packed", partial(prefill, packed=True), ATTENTION),
    Case("attention", "d64", partial(prefill, d=64), ATTENTION),
    Case("attention", "fp32", partial(prefill, dtype=FP32), {"_attention": ("ex2", LOADS)}),
    Case("decode_attention", "paged", decode, DECODE, LAYOUTS),
    Case("decode_attention", "contiguous", partial(decode, paged=False), DECODE, LAYOUTS, False),
    Case("decode_attention", "FP8", partial(decode, fp8=True), DECODE_FP8),
    Case("decode_attention", "70B", partial(decode, heads=64), DECODE, largest=False),
    Case("decode_attention", "512 queries", partial(decode, 512), CHUNK, CHUNK_LAYOUTS),
    Case("decode_attention", "512 queries, contiguous", partial(decode, 512, paged=False), CHUNK,
         CHUNK_LAYOUTS, False),
    Case(LINEAR, "8192^3", partial(product, 8192, 8192, 8192), GEMM),
    Case(LINEAR, "blocks", partial(product, 4096, 7168, 16384, blocks=True), GEMM),
    Case(LINEAR, "512 rows, QKV", partial(product, 512, 6144, 4096), GEMM),
    Case(LINEAR, "fp32 out", partial(product, 8192, 8192, 8192, out=FP32), GEMM),
    Case(LINEAR, "FP8, 1 row", partial(product, 1, *GATE_UP), STREAM, largest=False),
    Case(LINEAR, "FP8, 16 rows", partial(product, 16, *GATE_UP), STREAM, largest=False),
    Case(LINEAR, "FP8, 64 rows", partial(product, 64, *GATE_UP), STREAM),
    Case(LINEAR, "FP8, 1 row, few features", partial(product, 1, 4096, 14336), STREAM),
    Case(LINEAR, "blocks, 16 rows", partial(product, 16, *GATE_UP, blocks=True), STREAM),
    Case(LINEAR, "16-bit x, 16 rows", partial(product, 16, *GATE_UP, BF16), DECODED),
    Case(LINEAR, "16-bit x, 8192 rows", partial(product, 8192, *GATE_UP, BF16), DECODED),
    Case(LINEAR, "fp32 x, 16 rows", partial(product, 16, *GATE_UP, FP32), largest=False),
    Case(LINEAR, "fp32 x, 512 rows", partial(product, 512, *GATE_UP, FP32)),
]
# fmt: on


def of_tune() -> Iterator[Case]:
    """Yield the calls of tune.py as cases of the families that have none above."""
    unlisted = {*OPS.values()} - {case.op for case in CASES}
    config, device = lf.LlamaConfig.llama_3_1_8b(), torch.device("meta")
    for name, call in tune.calls(config, device, (TOKENS,)) if unlisted else ():
        if (family := OPS[call.func.__name__]) in unlisted:
            yield Case(family, name, call, {ANY: (LOADS,)})


CASES += of_tune()
