"""The public ops. Each checks its arguments once, for every backend, and calls the registered op
(library/), which allocates, chooses a backend and launches.

T tokens, H query heads, Hkv key/value heads, D head_dim. Activations are bf16, fp16 or fp32; all
tensors of a call share one device; rows may have any stride, the last dimension is contiguous.
Wrong types and dtypes raise TypeError, wrong shapes, strides, devices and ranges ValueError. Zero
tokens give empty outputs. Inference only: no op has a backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, library
from .reference import FP8_BLOCK, PACK_ROWS
from .rope import rope_table

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "apply_rope_and_append",
    "attention",
    "attention_with_kvcache",
    "fp8_gemm",
    "fp8_linear",
    "linear",
    "pack_weight",
    "quantize_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "rope_table",
    "silu_and_mul",
    "silu_and_mul_fp8",
]

_ops: Any = torch.ops.llama_fast


def _check_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    checks.activation("x", x)
    checks.vector("weight", weight, x.shape[-1], "x", x)
    checks.number("eps", eps, 0.0)
    if residual is not None:
        checks.like("residual", residual, "x", x)
        checks.has_shape("residual", residual, tuple(x.shape), "x's shape")
        checks.rows_contiguous("residual", residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight.

    x [..., hidden], weight [hidden] of x's dtype -> [..., hidden]. Normalised in fp32, rounded to
    x's dtype, then multiplied by the weight in x's dtype, as transformers' LlamaRMSNorm does.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    _check_norm(x, weight, eps, None)
    return _ops.rms_norm.default(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to x's dtype.

    x and residual [..., hidden], weight [hidden] -> two tensors like x.
    """
    checks.is_tensor("residual", residual)
    _check_norm(x, weight, eps, residual)
    return _ops.add_rms_norm.default(x, residual, weight, eps)


def rms_norm_fp8(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    scale_ub: float | None = None,
) -> tuple[Tensor, ...]:
    """rms_norm (add_rms_norm with a residual), then quantize_fp8 by row, in one pass.

    x [..., hidden] -> q e4m3 like x, scale fp32 [rows, 1] and, with residual, x + residual.
    scale_ub bounds a row's amax.
    """
    _check_norm(x, weight, eps, residual)
    checks.bound("scale_ub", scale_ub)
    if residual is None:
        return _ops.rms_norm_fp8.default(x, weight, eps, scale_ub)
    return _ops.add_rms_norm_fp8.default(x, residual, weight, eps, scale_ub)


def _check_gate_up(gate_up: Tensor) -> None:
    checks.activation("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got shape {list(gate_up.shape)}, want [..., 2 * I], gate first")


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the middle of SwiGLU. gate_up [..., 2 * I], gate first -> [..., I].

    silu(gate) is rounded to the dtype before the product, as in eager PyTorch.
    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    _check_gate_up(gate_up)
    return _ops.silu_and_mul.default(gate_up)


def silu_and_mul_fp8(gate_up: Tensor, *, scale_ub: float | None = None) -> tuple[Tensor, Tensor]:
    """silu_and_mul, then quantize_fp8 by row. [..., 2 * I] -> q e4m3 [..., I], scale [rows, 1]."""
    _check_gate_up(gate_up)
    checks.bound("scale_ub", scale_ub)
    return _ops.silu_and_mul_fp8.default(gate_up, scale_ub)


def _check_rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> None:
    checks.activation("q", q)
    checks.has_shape("q", q, (None, None, None), "[T, H, D]")
    tokens, _, d = q.shape
    if d % 2:
        raise ValueError(f"q: got head_dim {d}, want an even number")
    checks.like("k", k, "q", q)
    checks.has_shape("k", k, (tokens, None, d), "[T, Hkv, D]")
    checks.rows_contiguous("k", k)
    checks.has_dtype("positions", positions, checks.INDICES)
    checks.like("positions", positions, "q", q, dtype=False)
    checks.has_shape("positions", positions, (tokens,), "[T]")
    checks.has_dtype("table", table, checks.FP32)
    checks.like("table", table, "q", q, dtype=False)
    checks.has_shape("table", table, (None, d), "[max_positions, D]")
    checks.rows_contiguous("table", table)
    checks.flag("interleaved", interleaved)


def apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates q and k by their positions: [T, H, D], [T, Hkv, D], [T] (int32 or int64) -> (q, k).

    table: rope_table(...), fp32 [max_positions, D]. interleaved pairs (2i, 2i + 1) as Meta's
    checkpoints do; the default pairs (i, i + D / 2) as Hugging Face's do. Rotates in fp32 and
    rounds once. A position outside the table raises ValueError (CPU tensors).
    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    _check_rope(q, k, positions, table, interleaved)
    return _ops.apply_rope.default(q, k, positions, table, interleaved)


def _check_cache_scales(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """The caches have q's dtype and no scales, or are e4m3, each with its scale [1] or [Hkv]."""
    fp8 = isinstance(k_cache, Tensor) and k_cache.dtype in checks.FP8
    caches = (("k_cache", k_cache), ("v_cache", v_cache))
    for (name, cache), scale in zip(caches, (k_scale, v_scale), strict=True):
        if fp8 and name == "v_cache":
            checks.like(name, cache, "k_cache", k_cache)
        checks.like(name, cache, "q", q, dtype=not fp8)
        scale_name = f"{name[0]}_scale"
        if not fp8:
            if scale is not None:
                got = str(cache.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{scale_name}: got a scale for a {got} {name}, want None, or a float8_e4m3fn "
                    f"{name}"
                )
            continue
        if scale is None:
            raise ValueError(
                f"{scale_name}: got None, want float32 [1] or [Hkv] for a float8_e4m3fn {name}"
            )
        checks.has_dtype(scale_name, scale, checks.FP32)
        checks.like(scale_name, scale, "q", q, dtype=False)
        kv_heads = cache.shape[2] if cache.dim() == 4 else 1
        if scale.dim() != 1 or scale.shape[0] not in (1, kv_heads):
            raise ValueError(
                f"{scale_name}: got shape {list(scale.shape)}, want [1] or [Hkv] = [{kv_heads}]"
            )


def apply_rope_and_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """apply_rope, with the rotated k and v [T, Hkv, D] written into a KV cache. Returns q rotated.

    k_cache, v_cache [blocks, block_size, Hkv, D] of any strides (contiguous caches: blocks = B,
    block_size = S). slots [T] (int32 or int64): block * block_size + offset for each token; -1
    skips it. Slots must differ from each other. An FP8 cache (e4m3) needs k_scale and v_scale, fp32
    [1] or [Hkv], and receives e4m3(clamp(k / k_scale, -448, 448)), k rotated and rounded to its
    dtype first; caches of q's dtype take none.
    """
    _check_rope(q, k, positions, table, interleaved)
    checks.like("v", v, "q", q)
    checks.has_shape("v", v, tuple(k.shape), "k's shape")
    checks.rows_contiguous("v", v)
    _check_cache_scales(q, k_cache, v_cache, k_scale, v_scale)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.has_shape(
            name, cache, (None, None, k.shape[1], k.shape[2]), "[blocks, block_size, Hkv, D]"
        )
        checks.rows_contiguous(name, cache)
    checks.has_shape("v_cache", v_cache, tuple(k_cache.shape), "k_cache's shape")
    checks.has_dtype("slots", slots, checks.INDICES)
    checks.like("slots", slots, "q", q, dtype=False)
    checks.has_shape("slots", slots, (q.shape[0],), "[T]")
    return _ops.apply_rope_and_append.default(
        q, k, v, positions, table, k_cache, v_cache, slots, interleaved, k_scale, v_scale
    )


def _softmax_scale(softmax_scale: float | None, d: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(d)
    checks.number("softmax_scale", softmax_scale, 0.0, inclusive=False)
    return softmax_scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * softmax_scale) v with grouped-query heads, in memory linear in the length.

    q [B, Sq, H, D], k and v [B, Sk, Hkv, D] -> [B, Sq, H, D]; or packed: q [total_q, H, D],
    k and v [total_k, Hkv, D] with cu_seqlens_q and cu_seqlens_k [B + 1] int32. H is a multiple of
    Hkv, D a multiple of 8 up to 256. causal is bottom-right aligned: query i sees the keys
    j <= i + Sk - Sq; a query that sees none gives zeros. softmax_scale: None means 1 / sqrt(D).
    Softmax in fp32. Source: Dao, FlashAttention-2, arXiv:2307.08691.
    """
    checks.activation("q", q)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    batch, spelled = ((), "[total, Hkv, D]") if packed else ((q.shape[0],), "[B, Sk, Hkv, D]")
    wanted = "[total, H, D]" if packed else "[B, Sq, H, D]"
    checks.has_shape("q", q, (*batch, None, None, None), wanted)
    checks.head_dim(q.shape[-1])
    for name, t in (("k", k), ("v", v)):
        checks.like(name, t, "q", q)
        checks.has_shape(name, t, (*batch, None, None, q.shape[-1]), spelled)
        checks.rows_contiguous(name, t)
    checks.has_shape("v", v, tuple(k.shape), "k's shape")
    checks.heads(q.shape[-2], k.shape[-2])
    checks.flag("causal", causal)
    if packed:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            raise ValueError(f"{missing}: got None, want both cu_seqlens_q and cu_seqlens_k")
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            checks.has_dtype(name, cu, checks.INT32)
            checks.like(name, cu, "q", q, dtype=False)
            if cu.dim() != 1 or cu.shape[0] < 1:
                raise ValueError(f"{name}: got shape {list(cu.shape)}, want [B + 1]")
        checks.has_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "[B + 1]")
    scale = _softmax_scale(softmax_scale, q.shape[-1])
    return _ops.attention.default(q, k, v, causal, scale, cu_seqlens_q, cu_seqlens_k)


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of q over a KV cache: decode (Sq = 1), speculative decode, chunked prefill.

    q [B, Sq, H, D]; caches [B, S, Hkv, D] of any strides, or paged [blocks, block_size, Hkv, D]
    with block_table [B, n] int32. cache_seqlens [B] int32: valid tokens per sequence, those of this
    call's queries included; what lies beyond is never used. causal is bottom-right aligned against
    cache_seqlens. num_splits: how many ways the keys are split over threads or SMs; 0: automatic,
    and then a sequence's result does not depend on the rest of the batch. k_scale and v_scale, fp32
    [1] or [Hkv]: what the entries of FP8 caches (e4m3) are multiplied by, required with them and
    refused with caches of q's dtype. -> [B, Sq, H, D].
    """
    checks.activation("q", q)
    checks.has_shape("q", q, (None, None, None, None), "[B, Sq, H, D]")
    batch, _, heads, d = q.shape
    checks.head_dim(d)
    blocks = batch if block_table is None else None
    spelled = "[B, S, Hkv, D]" if block_table is None else "[blocks, block_size, Hkv, D]"
    _check_cache_scales(q, k_cache, v_cache, k_scale, v_scale)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.has_shape(name, cache, (blocks, None, None, d), spelled)
        checks.rows_contiguous(name, cache)
    checks.has_shape("v_cache", v_cache, tuple(k_cache.shape), "k_cache's shape")
    checks.heads(heads, k_cache.shape[2])
    checks.has_dtype("cache_seqlens", cache_seqlens, checks.INT32)
    checks.like("cache_seqlens", cache_seqlens, "q", q, dtype=False)
    checks.has_shape("cache_seqlens", cache_seqlens, (batch,), "[B]")
    if block_table is not None:
        checks.has_dtype("block_table", block_table, checks.INT32)
        checks.like("block_table", block_table, "q", q, dtype=False)
        checks.has_shape("block_table", block_table, (batch, None), "[B, n]")
    checks.flag("causal", causal)
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"num_splits: got {type(num_splits).__name__}, want an int")
    if num_splits < 0:
        raise ValueError(f"num_splits: got {num_splits}, want 0 (automatic) or more")
    scale = _softmax_scale(softmax_scale, d)
    return _ops.attention_with_kvcache.default(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        causal,
        scale,
        num_splits,
        k_scale,
        v_scale,
    )


_GRANULARITIES = ("tensor", "row", "block", "block_2d")


def quantize_fp8(
    x: Tensor, granularity: str = "row", *, scale_ub: float | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., cols] -> q e4m3 like x and fp32 scales, so that x is about q * scale.

    scale = max(min(amax|x|, scale_ub), tiny) / 448; q = e4m3(clamp(x / scale, -448, 448)), with
    amax over the whole tensor ("tensor", scale [1]), a row ("row", [rows, 1]), 128 columns of a row
    ("block", [rows, ceil(cols / 128)], for activations) or a 128 x 128 block ("block_2d",
    [ceil(rows / 128), ceil(cols / 128)], for weights). A zero row gives zeros and a finite scale; a
    NaN makes its whole group NaN. Source: Micikevicius et al., FP8 Formats, arXiv:2209.05433.
    """
    checks.activation("x", x)
    if granularity not in _GRANULARITIES:
        raise ValueError(f"granularity: got {granularity!r}, want one of {_GRANULARITIES}")
    checks.bound("scale_ub", scale_ub)
    return _ops.quantize_fp8.default(x, granularity, scale_ub)


def _check_scale(name: str, scale: Tensor, rows: int, cols: int, other: str, o: Tensor) -> None:
    """A scale of any granularity for an FP8 operand [rows, cols]."""
    checks.has_dtype(name, scale, checks.FP32)
    checks.like(name, scale, other, o, dtype=False)
    blocks = -(-cols // FP8_BLOCK)
    shapes = ((1,), (1, 1), (rows, 1), (rows, blocks), (-(-rows // FP8_BLOCK), blocks))
    if tuple(scale.shape) not in shapes:
        raise ValueError(
            f"{name}: got shape {list(scale.shape)}, want [1], [{rows}, 1], [{rows}, {blocks}] "
            f"or [{-(-rows // FP8_BLOCK)}, {blocks}]"
        )


def _check_weight(name: str, weight: Tensor, k: int) -> int:
    """[N, K], or packed [N / 64, K / 2, 64, 2]. Returns N."""
    if weight.dim() == 4:
        checks.has_shape(
            name, weight, (None, k // 2, PACK_ROWS, 2), "packed [N / 64, K / 2, 64, 2]"
        )
        if k % 2 or not weight.is_contiguous():
            raise ValueError(f"{name}: got a packed weight that is not pack_weight's own output")
    else:
        checks.has_shape(name, weight, (None, k), "[N, K]")
        checks.rows_contiguous(name, weight)
    return library.out_features(weight)


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(a * scale_a) @ (b * scale_b)^T + bias, summed in fp32, rounded once.

    On sm_89 and sm_90 every 128 of K are summed in the tensor cores, with about 14 bits, and these
    sums in fp32.

    a [M, K] and b [N, K] e4m3 -> [M, N] of out_dtype (bf16, fp16 or fp32). Scales fp32, as
    quantize_fp8 makes them: [1], [rows, 1], 1x128 blocks, and for b 128x128 blocks. bias [N] of
    out_dtype.
    """
    checks.has_dtype("a", a, checks.FP8)
    checks.has_shape("a", a, (None, None), "[M, K]")
    m, k = a.shape
    if k == 0:
        raise ValueError("a: got K = 0, want at least 1")
    checks.rows_contiguous("a", a)
    checks.like("b", b, "a", a)
    checks.has_shape("b", b, (None, k), "[N, K]")
    checks.rows_contiguous("b", b)
    _check_scale("scale_a", scale_a, m, k, "a", a)
    if scale_a.dim() == 2 and scale_a.shape[0] != m and scale_a.numel() != 1:
        raise ValueError(f"scale_a: got shape {list(scale_a.shape)}, want a row for each of {m}")
    _check_scale("scale_b", scale_b, b.shape[0], k, "a", a)
    if out_dtype not in checks.ACTIVATIONS:
        raise TypeError(f"out_dtype: got {out_dtype}, want bfloat16, float16 or float32")
    if bias is not None:
        checks.has_dtype("bias", bias, (out_dtype,))
        checks.like("bias", bias, "a", a, dtype=False)
        checks.has_shape("bias", bias, (b.shape[0],), "[N]")
        checks.rows_contiguous("bias", bias)
    return _ops.fp8_gemm.default(a, b, scale_a, scale_b, bias, out_dtype)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    quantize_activation: bool | None = None,
    scale_ub: float | None = None,
) -> Tensor:
    """x @ (weight * weight_scale)^T + bias with weights that stay FP8 in memory.

    x [..., K], weight e4m3 [N, K] or pack_weight's, weight_scale fp32 [1], [N, 1] or in blocks,
    bias [N] of x's dtype -> [..., N]. quantize_activation: whether x is quantised as well (by row,
    or 1x128 blocks when the weight is in blocks; scale_ub bounds its amax); None leaves the choice
    to the backend: on a CPU no, since only the weight's bytes cost there; on a GPU that multiplies
    e4m3 (sm_89 and later) yes, at any number of rows, so that a row does not depend on the batch;
    on other GPUs no. On a GPU a row's last bits may differ between calls of up to 64 rows and of
    more, and nowhere else; on a CPU with AMX, with bf16 x, as linear says.
    """
    checks.activation("x", x)
    checks.has_dtype("weight", weight, checks.FP8)
    checks.like("weight", weight, "x", x, dtype=False)
    n = _check_weight("weight", weight, x.shape[-1])
    _check_scale("weight_scale", weight_scale, n, x.shape[-1], "x", x)
    if bias is not None:
        checks.vector("bias", bias, n, "x", x)
    if quantize_activation is not None:
        checks.flag("quantize_activation", quantize_activation)
    checks.bound("scale_ub", scale_ub)
    return _ops.fp8_linear.default(x, weight, weight_scale, bias, quantize_activation, scale_ub)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, summed in fp32 in an order that does not depend on the batch.

    x [..., K], weight of x's dtype [N, K] or pack_weight's, bias [N] -> [..., N]. On a CPU with
    AMX, bf16 x of at least 32 rows may go to oneDNN (backends() says from how many on), and a row's
    last bits depend on that. LLAMA_FAST_CPU_AMX=off or torch.use_deterministic_algorithms keeps one
    path.
    """
    checks.activation("x", x)
    checks.like("weight", weight, "x", x)
    n = _check_weight("weight", weight, x.shape[-1])
    if bias is not None:
        checks.vector("bias", bias, n, "x", x)
    return _ops.linear.default(x, weight, bias)


def pack_weight(weight: Tensor) -> Tensor:
    """[N, K] -> [N / 64, K / 2, 64, 2], the order that linear and fp8_linear read fastest on a CPU.

    weight: e4m3, bf16, fp16 or fp32; N a multiple of 64, K even. Same values, same results, bit
    for bit; packed[n // 64, k // 2, n % 64, k % 2] = weight[n, k].
    """
    checks.has_dtype("weight", weight, (*checks.FP8, *checks.ACTIVATIONS))
    checks.has_shape("weight", weight, (None, None), "[N, K]")
    if weight.shape[0] % PACK_ROWS or weight.shape[1] % 2 or weight.shape[1] == 0:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, want N a multiple of {PACK_ROWS} and K even"
        )
    checks.rows_contiguous("weight", weight)
    return _ops.pack_weight.default(weight)
