"""The cpu backend: tensors -> addresses, sizes and strides -> the compiled kernels of csrc/cpu.

Arguments are checked and outputs allocated by then (ops.py, library.py). Every function fills its
outputs in place. Threads follow torch.get_num_threads(); the GIL is released while a kernel runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _cpu

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
_TENSOR, _ROW, _BLOCK = 0, 1, 2
_GRANULARITY = {"tensor": _TENSOR, "row": _ROW, "block": _BLOCK, "block_2d": _BLOCK}


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _no_fp8_cache(op: str, k_cache: Tensor) -> None:
    if k_cache.dtype == torch.float8_e4m3fn:
        raise NotImplementedError(
            f"{op}: the cpu backend has no FP8 KV cache, got a float8_e4m3fn k_cache; eager "
            f'PyTorch has one: use_backend("reference", op="{op}")'
        )


def rms_norm(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    scale: Tensor | None = None,
    scale_ub: float | None = None,
) -> None:
    rows, hidden = x.shape
    _cpu.rms_norm(
        x.data_ptr(),
        _address(residual),
        weight.data_ptr(),
        out.data_ptr(),
        _address(residual_out),
        _address(scale),
        rows,
        hidden,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        math.inf if scale_ub is None else scale_ub,
        _DTYPE[x.dtype],
        torch.get_num_threads(),
    )


def silu_and_mul(
    out: Tensor, gate_up: Tensor, scale: Tensor | None = None, scale_ub: float | None = None
) -> None:
    _cpu.silu_and_mul(
        gate_up.data_ptr(),
        out.data_ptr(),
        _address(scale),
        gate_up.shape[0],
        gate_up.shape[1] // 2,
        gate_up.stride(0),
        math.inf if scale_ub is None else scale_ub,
        _DTYPE[gate_up.dtype],
        torch.get_num_threads(),
    )


def quantize_fp8(
    q: Tensor, scale: Tensor, x: Tensor, granularity: str, scale_ub: float | None
) -> None:
    _cpu.quantize_fp8(
        x.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        128 if granularity == "block_2d" else 1,
        math.inf if scale_ub is None else scale_ub,
        _GRANULARITY[granularity],
        _DTYPE[x.dtype],
        torch.get_num_threads(),
    )


def rope(
    q_out: Tensor,
    k_out: Tensor | None,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    table: Tensor,
    interleaved: bool,
    v: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """apply_rope with k_out; apply_rope_and_append with v, both caches and slots."""
    v_strides: tuple[int, ...] = (0, 0)
    cache_strides: tuple[int, ...] = (0,) * 6
    num_slots = block_size = 0
    if v is not None and k_cache is not None and v_cache is not None:
        _no_fp8_cache("apply_rope_and_append", k_cache)
        v_strides = v.stride()[:2]
        cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
        block_size = k_cache.shape[1]
        num_slots = k_cache.shape[0] * block_size
    _cpu.rope(
        q.data_ptr(),
        k.data_ptr(),
        _address(v),
        q_out.data_ptr(),
        _address(k_out),
        _address(k_cache),
        _address(v_cache),
        positions.data_ptr(),
        _address(slots),
        table.data_ptr(),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        table.shape[0],
        num_slots,
        block_size,
        (*q.stride()[:2], *k.stride()[:2], *v_strides),
        cache_strides,
        table.stride(0),
        positions.dtype == torch.int64,
        slots is not None and slots.dtype == torch.int64,
        interleaved,
        _DTYPE[q.dtype],
        torch.get_num_threads(),
    )


def attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    if cu_seqlens_q is not None:
        batch, seqlen_q, seqlen_k = cu_seqlens_q.shape[0] - 1, 0, 0
        strides = [s for t in (q, k, v, out) for s in (0, *t.stride()[:2])]
    else:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    _cpu.attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        _address(cu_seqlens_q),
        _address(cu_seqlens_k),
        batch,
        seqlen_q,
        seqlen_k,
        q.shape[-2],
        k.shape[-2],
        q.shape[-1],
        strides,
        softmax_scale,
        causal,
        _DTYPE[q.dtype],
        torch.get_num_threads(),
    )


def attention_with_kvcache(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    causal: bool,
    softmax_scale: float,
    num_splits: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    _no_fp8_cache("attention_with_kvcache", k_cache)
    strides = [s for t in (q, out, k_cache, v_cache) for s in t.stride()[:3]]
    _cpu.kvcache_attention(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        cache_seqlens.data_ptr(),
        _address(block_table),
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k_cache.shape[2],
        q.shape[3],
        k_cache.shape[0],
        k_cache.shape[1],
        0 if block_table is None else block_table.stride(0),
        strides,
        num_splits,
        softmax_scale,
        causal,
        _DTYPE[q.dtype],
        torch.get_num_threads(),
    )


def prefers_fp8_activations(x: Tensor) -> bool:
    """No: the weights' bandwidth is the cost here, which quantised activations do not lower."""
    return False


def linear(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> None:
    """fp8_gemm (both scales), fp8_linear (weight_scale) and linear (neither)."""
    n, block_rows = out.shape[1], 1
    x_granularity = weight_granularity = _TENSOR
    if x_scale is not None and x_scale.numel() > 1:
        x_granularity = _BLOCK if x_scale.shape[1] > 1 else _ROW
    if weight_scale is not None and weight_scale.numel() > 1:
        weight_granularity = _ROW if weight_scale.shape == (n, 1) else _BLOCK
        block_rows = 1 if weight_scale.shape[0] == n else 128
    _cpu.linear(
        x.data_ptr(),
        weight.data_ptr(),
        _address(x_scale),
        _address(weight_scale),
        _address(bias),
        out.data_ptr(),
        x.shape[0],
        n,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        _DTYPE[x.dtype],
        _DTYPE[weight.dtype],
        _DTYPE[out.dtype],
        x_granularity,
        weight_granularity,
        block_rows,
        weight.dim() == 4,
        torch.get_num_threads(),
    )


def pack_weight(packed: Tensor, weight: Tensor) -> None:
    n, k = weight.shape
    _cpu.pack_weight(
        weight.data_ptr(),
        packed.data_ptr(),
        n,
        k,
        weight.stride(0),
        weight.itemsize,
        torch.get_num_threads(),
    )
