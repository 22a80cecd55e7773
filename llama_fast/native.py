"""Tensors -> addresses, sizes and strides -> a compiled extension: the CPU's, or CUDA's.

Arguments are checked and outputs allocated by then (ops.py, library/). Every function fills its
outputs in place; the GIL is released while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
_TENSOR, _ROW, _BLOCK = 0, 1, 2
_GRANULARITY = {"tensor": _TENSOR, "row": _ROW, "block": _BLOCK, "block_2d": _BLOCK}


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class Native:
    """The ops of an extension module. where(out) says what a call runs on: a number of threads, or
    a device and a stream."""

    def __init__(self, module: Any, where: Callable[[Tensor], Any]) -> None:
        self._module, self._where = module, where
        # CUDA's kernels leave partial results in memory, which only PyTorch can allocate.
        self._splits = getattr(module, "kvcache_attention_splits", None)

    def _check_cache(self, op: str, k_cache: Tensor) -> None:
        if self._splits is None and k_cache.dtype == torch.float8_e4m3fn:
            raise NotImplementedError(
                f"{op}: the cpu backend has no FP8 KV cache, got a float8_e4m3fn k_cache; eager "
                f'PyTorch has one: use_backend("reference", op="{op}")'
            )

    def rms_norm(
        self,
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
        self._module.rms_norm(
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
            DTYPE[x.dtype],
            self._where(out),
        )

    def silu_and_mul(
        self,
        out: Tensor,
        gate_up: Tensor,
        scale: Tensor | None = None,
        scale_ub: float | None = None,
    ) -> None:
        self._module.silu_and_mul(
            gate_up.data_ptr(),
            out.data_ptr(),
            _address(scale),
            gate_up.shape[0],
            gate_up.shape[1] // 2,
            gate_up.stride(0),
            math.inf if scale_ub is None else scale_ub,
            DTYPE[gate_up.dtype],
            self._where(out),
        )

    def quantize_fp8(
        self, q: Tensor, scale: Tensor, x: Tensor, granularity: str, scale_ub: float | None
    ) -> None:
        self._module.quantize_fp8(
            x.data_ptr(),
            q.data_ptr(),
            scale.data_ptr(),
            x.shape[0],
            x.shape[1],
            x.stride(0),
            128 if granularity == "block_2d" else 1,
            math.inf if scale_ub is None else scale_ub,
            _GRANULARITY[granularity],
            DTYPE[x.dtype],
            self._where(q),
        )

    def rope(
        self,
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
            self._check_cache("apply_rope_and_append", k_cache)
            v_strides = v.stride()[:2]
            cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
            block_size = k_cache.shape[1]
            num_slots = k_cache.shape[0] * block_size
        self._module.rope(
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
            _address(k_scale),
            _address(v_scale),
            k_scale is not None and k_scale.numel() > 1,
            v_scale is not None and v_scale.numel() > 1,
            positions.dtype == torch.int64,
            slots is not None and slots.dtype == torch.int64,
            interleaved,
            DTYPE[q.dtype],
            self._where(q_out),
        )

    def attention(
        self,
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
            batch, seqlen_q, seqlen_k = cu_seqlens_q.shape[0] - 1, q.shape[0], k.shape[0]
            strides = [s for t in (q, k, v, out) for s in (0, *t.stride()[:2])]
        else:
            batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
            strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
        self._module.attention(
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
            DTYPE[q.dtype],
            self._where(out),
        )

    def attention_with_kvcache(
        self,
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
        self._check_cache("attention_with_kvcache", k_cache)
        strides = [s for t in (q, out, k_cache, v_cache) for s in t.stride()[:3]]
        table_blocks = 0 if block_table is None else block_table.shape[1]
        workspace, splits = None, 1
        if self._splits is not None:
            capacity = k_cache.shape[1] * (1 if block_table is None else table_blocks)
            splits = self._splits(
                q.shape[1],
                q.shape[2],
                k_cache.shape[2],
                q.shape[3],
                capacity,
                num_splits,
                DTYPE[q.dtype],
                DTYPE[k_cache.dtype],
                self._where(out),
            )
            if splits > 1:
                room = q.shape[0] * q.shape[1] * q.shape[2] * splits * (q.shape[3] + 2)
                workspace = torch.empty(room, dtype=torch.float32, device=q.device)
        self._module.kvcache_attention(
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
            table_blocks,
            strides,
            num_splits,
            _address(k_scale),
            _address(v_scale),
            k_scale is not None and k_scale.numel() > 1,
            v_scale is not None and v_scale.numel() > 1,
            _address(workspace),
            splits,
            softmax_scale,
            causal,
            DTYPE[q.dtype],
            DTYPE[k_cache.dtype],
            self._where(out),
        )

    def linear(
        self,
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
        self._module.linear(
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
            DTYPE[x.dtype],
            DTYPE[weight.dtype],
            DTYPE[out.dtype],
            x_granularity,
            weight_granularity,
            block_rows,
            weight.dim() == 4,
            self._where(out),
        )
