"""What bench.static compiles: each launcher at Llama shapes, and what its kernels must contain.

Sizes matter only through what a launcher and Triton's specialisation make of them: a kernel for
8B's shapes differs from 70B's where a size is a constant of the kernel, and not where it is an
argument that 16 divides in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_fast.kernels.activation import silu_and_mul
from llama_fast.kernels.attention import attention
from llama_fast.kernels.decode_attention import attention_with_kvcache
from llama_fast.kernels.fp8_gemm import linear
from llama_fast.kernels.quantize import quantize_fp8
from llama_fast.kernels.rms_norm import rms_norm
from llama_fast.kernels.rope import rope

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
    x = empty(rows, hidden, dtype=dtype)
    rms_norm(
        empty(rows, hidden, dtype=E4M3 if fp8 else dtype),
        x,
        empty(hidden, dtype=dtype),
        1e-5,
        *((empty(rows, hidden, dtype=dtype), empty(rows, hidden, dtype=dtype)) if residual else ()),
        **({"scale": empty(rows, 1, dtype=FP32)} if fp8 else {}),
    )


def silu(inner: int, rows: int = 8192, fp8: bool = False, dtype: torch.dtype = BF16) -> None:
    out = empty(rows, inner, dtype=E4M3 if fp8 else dtype)
    gate_up = empty(rows, 2 * inner, dtype=dtype)
    silu_and_mul(out, gate_up, empty(rows, 1, dtype=FP32) if fp8 else None)


def quantize(granularity: str, rows: int, cols: int) -> None:
    blocks = -(-cols // 128)
    scale = {
        "tensor": (1,),
        "row": (rows, 1),
        "block": (rows, blocks),
        "block_2d": (-(-rows // 128), blocks),
    }[granularity]
    quantize_fp8(
        empty(rows, cols, dtype=E4M3),
        empty(*scale, dtype=FP32),
        empty(rows, cols),
        granularity,
        None,
    )


# ---- rotary embedding, attention ----


def qkv(tokens: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Views of the fused projection's output, as in the model."""
    fused = empty(tokens, heads + 2 * kv_heads, d, dtype=dtype)
    return list(fused.split((heads, kv_heads, kv_heads), 1))


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
    q_out = empty(tokens, heads, d, dtype=dtype)
    if not append:
        k_out = empty(tokens, kv_heads, d, dtype=dtype)
        rope(q_out, k_out, q, k, positions, table, interleaved)
        return
    caches = empty(2, 1024, 64, kv_heads, d, dtype=torch.uint8 if fp8 else dtype)
    scales = {"k_scale": empty(1, dtype=FP32), "v_scale": empty(1, dtype=FP32)} if fp8 else {}
    slots = empty(tokens, dtype=I64)
    rope(q_out, None, q, k, positions, table, interleaved, v, *caches, slots, **scales)


def prefill(
    causal: bool = True,
    packed: bool = False,
    heads: int = 32,
    d: int = 128,
    dtype: torch.dtype = BF16,
) -> None:
    tokens, kv_heads = 8192, 8
    q, k, v = qkv(tokens, heads, kv_heads, d, dtype)
    out = empty(tokens, heads, d, dtype=dtype)
    if packed:
        cu = empty(5, dtype=I32)
        attention(out, q, k, v, causal, d**-0.5, cu, cu)
    else:
        attention(out[None], q[None], k[None], v[None], causal, d**-0.5, None, None)


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
    q, out = (empty(batch, queries, heads, d, dtype=dtype) for _ in range(2))
    shape = (batch * keys // block, block) if paged else (batch, keys)
    caches = empty(2, *shape, kv_heads, d, dtype=E4M3 if fp8 else dtype)
    table = empty(batch, keys // block, dtype=I32) if paged else None
    scales = {"k_scale": empty(1, dtype=FP32), "v_scale": empty(1, dtype=FP32)} if fp8 else {}
    lengths = empty(batch, dtype=I32)
    attention_with_kvcache(out, q, *caches, lengths, table, True, d**-0.5, 0, **scales)


# ---- matrix products ----


def product(
    m: int,
    n: int,
    k: int,
    x: torch.dtype = E4M3,
    weight: torch.dtype = E4M3,
    scales: str = "row",
    bias: bool = False,
    out: torch.dtype = BF16,
) -> None:
    blocks = -(-k // 128)
    x_scale = weight_scale = None
    if x == E4M3:
        x_scale = empty(m, blocks if scales == "block" else 1, dtype=FP32)
    if weight == E4M3:
        shape = (-(-n // 128), blocks) if scales == "block" else (n, 1)
        weight_scale = empty(*shape, dtype=FP32)
    linear(
        empty(m, n, dtype=out),
        empty(m, k, dtype=x),
        empty(n, k, dtype=weight),
        empty(n, dtype=out) if bias else None,
        x_scale,
        weight_scale,
    )


# ---- the cases: op, name, call, and what each kernel must contain ----

WIDE = ("16-byte loads", "16-byte stores")
NORM = {"_rms_norm_kernel": WIDE}
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
    Case("rms_norm", "8B", lambda: norm(4096), NORM),
    Case("rms_norm", "8B + residual", lambda: norm(4096, residual=True), NORM),
    Case("rms_norm", "8B FP8", lambda: norm(4096, fp8=True), NORM_FP8),
    Case("rms_norm", "8B + residual FP8", lambda: norm(4096, residual=True, fp8=True), NORM_FP8),
    Case("rms_norm", "70B + residual", lambda: norm(8192, residual=True), NORM),
    Case("rms_norm", "405B + residual FP8", lambda: norm(16384, residual=True, fp8=True), NORM_FP8),
    Case("rms_norm", "8B fp32", lambda: norm(4096, dtype=FP32), NORM),
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
    Case("decode_attention", "paged", decode, DECODE),
    Case("decode_attention", "contiguous", lambda: decode(paged=False), DECODE),
    Case("decode_attention", "FP8", lambda: decode(fp8=True), DECODE_FP8),
    Case("decode_attention", "70B", lambda: decode(heads=64), DECODE),
    Case("decode_attention", "512 queries", lambda: decode(queries=512), CHUNK),
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
]
