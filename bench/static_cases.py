"""What bench.static compiles: each op at Llama shapes, and what its kernels must contain.

The public ops are called, so that nothing is compiled but what users launch. Sizes matter only
through what a launcher and Triton's specialisation make of them: a kernel for 8B's shapes differs
from 70B's where a size is a constant of the kernel, and not where it is an argument that 16 divides
in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import llama_fast as lf

from .static_rules import MAY_SERIALISE, Case

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
I32, I64 = torch.int32, torch.int64


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ---- norms, activations, quantisers ----


def norm(
    hidden: int,
    rows: int = 8192,
    residual: bool = False,
    fp8: bool = False,
    dtype: torch.dtype = BF16,
) -> None:
    x, other = (empty(rows, hidden, dtype=dtype) for _ in range(2))
    weight = empty(hidden, dtype=dtype)
    if fp8:
        lf.rms_norm_fp8(x, weight, residual=other if residual else None)
    elif residual:
        lf.add_rms_norm(x, other, weight)
    else:
        lf.rms_norm(x, weight)


def silu(inner: int, rows: int = 8192, fp8: bool = False, dtype: torch.dtype = BF16) -> None:
    gate_up = empty(rows, 2 * inner, dtype=dtype)
    lf.silu_and_mul_fp8(gate_up) if fp8 else lf.silu_and_mul(gate_up)


def quantize(granularity: str, rows: int, cols: int) -> None:
    lf.quantize_fp8(empty(rows, cols), granularity)


# ---- rotary embedding, attention ----


def qkv(tokens: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Views of the fused projection's output, as in the model."""
    fused = empty(tokens, heads + 2 * kv_heads, d, dtype=dtype)
    return list(fused.split((heads, kv_heads, kv_heads), 1))


def cache(*shape: int, fp8: bool, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """k_cache and v_cache, and the scales of an FP8 one."""
    k, v = (empty(*shape, dtype=E4M3 if fp8 else dtype) for _ in range(2))
    scales = (empty(1, dtype=FP32) if fp8 else None for _ in range(2))
    return (k, v), dict(zip(("k_scale", "v_scale"), scales, strict=True))


def rotate(
    append: bool = False,
    interleaved: bool = False,
    fp8: bool = False,
    heads: int = 32,
    d: int = 128,
    dtype: torch.dtype = BF16,
) -> None:
    tokens, kv_heads = 8192, 8
    q, k, v = qkv(tokens, heads, kv_heads, d, dtype)
    table, positions = empty(131072, d, dtype=FP32), empty(tokens, dtype=I64)
    if append:
        caches, scales = cache(1024, 64, kv_heads, d, fp8=fp8, dtype=dtype)
        slots = empty(tokens, dtype=I64)
        lf.apply_rope_and_append(
            q, k, v, positions, table, *caches, slots, interleaved=interleaved, **scales
        )
    else:
        lf.apply_rope(q, k, positions, table, interleaved=interleaved)


def prefill(
    causal: bool = True,
    packed: bool = False,
    heads: int = 32,
    d: int = 128,
    dtype: torch.dtype = BF16,
) -> None:
    q, k, v = qkv(8192, heads, 8, d, dtype)
    if packed:
        cu = empty(5, dtype=I32)
        lf.attention(q, k, v, causal=causal, cu_seqlens_q=cu, cu_seqlens_k=cu)
    else:
        lf.attention(q[None], k[None], v[None], causal=causal)


def decode(
    queries: int = 1,
    paged: bool = True,
    fp8: bool = False,
    batch: int = 32,
    heads: int = 32,
    d: int = 128,
    dtype: torch.dtype = BF16,
) -> None:
    kv_heads, keys, block = 8, 8192, 64
    shape = (batch * keys // block, block) if paged else (batch, keys)
    caches, scales = cache(*shape, kv_heads, d, fp8=fp8, dtype=dtype)
    q, lengths = empty(batch, queries, heads, d, dtype=dtype), empty(batch, dtype=I32)
    table = empty(batch, keys // block, dtype=I32) if paged else None
    lf.attention_with_kvcache(q, *caches, lengths, block_table=table, **scales)


# ---- matrix products ----


def product(
    m: int,
    n: int,
    k: int,
    x: torch.dtype = E4M3,
    scales: str = "row",
    out: torch.dtype = BF16,
) -> None:
    blocks = -(-k // 128)
    rows, weight = empty(m, k, dtype=x), empty(n, k, dtype=E4M3)
    shape = (-(-n // 128), blocks) if scales == "block" else (n, 1)
    weight_scale = empty(*shape, dtype=FP32)
    if x == E4M3:
        x_scale = empty(m, blocks if scales == "block" else 1, dtype=FP32)
        lf.fp8_gemm(rows, weight, x_scale, weight_scale, out_dtype=out)
    else:
        lf.fp8_linear(rows, weight, weight_scale, quantize_activation=False)


# ---- the cases: op, name, call, and what each kernel must contain ----

WIDE = ("16-byte loads", "16-byte stores")
NORM = {"_rms_norm_kernel": WIDE}
SUMS = {"reductions": "the same rows"}  # fusing changes no bit
FP32_SUMS = {"reductions": "the same rows in fp32"}
NORM_FP8 = {"_rms_norm_kernel": ("16-byte loads", "hardware e4m3")}
SILU_FP8 = {
    "_row_fp8_kernel": ("16-byte loads", "hardware e4m3", "ex2"),
    "_wide_fp8_kernel": ("16-byte loads", "hardware e4m3", "ex2"),
}
QUANTIZE = {
    "_group_kernel": ("16-byte loads", "hardware e4m3"),
    "_wide_row_kernel": ("16-byte loads", "hardware e4m3"),
    "_square_kernel": ("16-byte loads", "hardware e4m3"),
    "_amax_kernel": ("16-byte loads",),
    "_tensor_kernel": ("16-byte loads", "hardware e4m3"),
}
ROPE = {"_rope_kernel": WIDE}
ROPE_FP8 = {"_rope_kernel": ("16-byte loads", "hardware e4m3")}
ATTENTION = {"_attention": ("matrix", "async copy", "ex2", "16-byte loads")}
ATTENTION_FP32 = {"_attention": ("ex2", "16-byte loads")}
DECODE = {
    "_attend": ("small matrix", "async copy", "ex2", "16-byte loads"),
    "_combine": ("16-byte loads", "ex2"),
}
DECODE_FP8 = {"_attend": (*DECODE["_attend"], "hardware e4m3")}
CHUNK = {"_attend": ("matrix", "async copy", "ex2", "16-byte loads")}
# The layout of a cache changes no bit.
LAYOUTS = {"reductions": "1 query", "arithmetic": "1 query"}
CHUNK_LAYOUTS = {"reductions": "chunk", "arithmetic": "chunk"}
# On sm_80 and AMD, which cannot multiply e4m3, _stream serves every case, and decodes.
GEMM = {
    "_gemm": ("e4m3 matrix", "async copy", "16-byte stores"),
    "_stream": ("16-bit matrix", "16-byte loads"),
}
STREAM = {
    "_stream": ("small e4m3 matrix", "async copy", "16-byte loads"),
    "_add_splits": ("16-byte loads",),
}
# A weight decoded to 16 bits reaches wgmma through registers, and each product waits for its own
# decoding. On the chips that have wgmma, activations are quantised unless the caller says no.
DECODED = {"_stream": ("small matrix", "async copy", "16-byte loads", MAY_SERIALISE)}
CASES: list[Case] = [
    Case("rms_norm", "8B", lambda: norm(4096), NORM, alike=SUMS),
    Case("rms_norm", "8B + residual", lambda: norm(4096, residual=True), NORM, alike=SUMS),
    Case("rms_norm", "8B FP8", lambda: norm(4096, fp8=True), NORM_FP8, alike=SUMS),
    Case(
        "rms_norm",
        "8B + residual FP8",
        lambda: norm(4096, residual=True, fp8=True),
        NORM_FP8,
        alike=SUMS,
    ),
    Case("rms_norm", "70B + residual", lambda: norm(8192, residual=True), NORM),
    Case("rms_norm", "405B + residual FP8", lambda: norm(16384, residual=True, fp8=True), NORM_FP8),
    Case("rms_norm", "8B fp32", lambda: norm(4096, dtype=FP32), NORM, alike=FP32_SUMS),
    Case(
        "rms_norm",
        "8B fp32 + residual FP8",
        lambda: norm(4096, residual=True, fp8=True, dtype=FP32),
        NORM_FP8,
        alike=FP32_SUMS,
    ),
    Case("activation", "8B", lambda: silu(14336), {"_tile_kernel": (*WIDE, "ex2")}),
    Case("activation", "8B FP8", lambda: silu(14336, fp8=True), SILU_FP8),
    Case("activation", "70B FP8", lambda: silu(28672, fp8=True), SILU_FP8),
    Case("activation", "405B FP8", lambda: silu(53248, fp8=True), SILU_FP8),
    Case("quantize", "tensor", lambda: quantize("tensor", 8192, 4096), QUANTIZE),
    Case("quantize", "row 8B", lambda: quantize("row", 8192, 4096), QUANTIZE),
    Case("quantize", "row 405B", lambda: quantize("row", 8192, 53248), QUANTIZE),
    Case("quantize", "block", lambda: quantize("block", 8192, 4096), QUANTIZE),
    Case("quantize", "block_2d", lambda: quantize("block_2d", 4096, 14336), QUANTIZE),
    Case("rope", "q and k", rotate, ROPE),
    Case("rope", "interleaved", lambda: rotate(interleaved=True), ROPE),
    Case("rope", "append", lambda: rotate(append=True), ROPE),
    Case("rope", "append FP8", lambda: rotate(append=True, fp8=True), ROPE_FP8),
    Case("attention", "causal", prefill, ATTENTION),
    Case("attention", "full", lambda: prefill(causal=False), ATTENTION),
    Case("attention", "packed", lambda: prefill(packed=True), ATTENTION),
    Case("attention", "d64", lambda: prefill(d=64), ATTENTION),
    Case("attention", "fp32", lambda: prefill(dtype=FP32), ATTENTION_FP32),
    Case("decode_attention", "paged", decode, DECODE, alike=LAYOUTS),
    Case("decode_attention", "contiguous", lambda: decode(paged=False), DECODE, alike=LAYOUTS),
    Case("decode_attention", "FP8", lambda: decode(fp8=True), DECODE_FP8),
    Case("decode_attention", "70B", lambda: decode(heads=64), DECODE),
    Case("decode_attention", "512 queries", lambda: decode(512), CHUNK, alike=CHUNK_LAYOUTS),
    Case(
        "decode_attention",
        "512 queries, contiguous",
        lambda: decode(512, paged=False),
        CHUNK,
        alike=CHUNK_LAYOUTS,
    ),
    Case("fp8_gemm", "8192^3", lambda: product(8192, 8192, 8192), GEMM),
    Case("fp8_gemm", "blocks", lambda: product(4096, 7168, 16384, scales="block"), GEMM),
    Case("fp8_gemm", "512 rows, QKV", lambda: product(512, 6144, 4096), GEMM),
    Case("fp8_gemm", "fp32 out", lambda: product(8192, 8192, 8192, out=FP32), GEMM),
    Case("fp8_gemm", "FP8, 1 row", lambda: product(1, 28672, 4096), STREAM),
    Case("fp8_gemm", "FP8, 16 rows", lambda: product(16, 28672, 4096), STREAM),
    Case("fp8_gemm", "FP8, 64 rows", lambda: product(64, 28672, 4096), STREAM),
    Case("fp8_gemm", "FP8, 1 row, few features", lambda: product(1, 4096, 14336), STREAM),
    Case("fp8_gemm", "blocks, 16 rows", lambda: product(16, 28672, 4096, scales="block"), STREAM),
    Case("fp8_gemm", "16-bit x, 16 rows", lambda: product(16, 28672, 4096, x=BF16), DECODED),
    Case("fp8_gemm", "16-bit x, 8192 rows", lambda: product(8192, 28672, 4096, x=BF16), DECODED),
    Case("fp8_gemm", "fp32 x, 16 rows", lambda: product(16, 28672, 4096, x=FP32)),
    Case("fp8_gemm", "fp32 x, 512 rows", lambda: product(512, 28672, 4096, x=FP32)),
]
