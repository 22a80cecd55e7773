"""torch.library registration of every op: schema, implementation, fake (shape-only) version.

An implementation allocates, chooses the backend and launches; checks of shapes and dtypes are in
ops.py. What needs a tensor's data (positions, slots, lengths) is checked here, on CPU tensors only:
on a GPU it would cost a synchronisation, and the kernel stays in bounds by itself.

Library.define/impl rather than torch.library.custom_op: about 2 us a call against 5 to 15.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _cpu, reference
from .backends import kernels
from .reference import FP8_BLOCK, FP8_DTYPE, PACK_ROWS

_lib = torch.library.Library("llama_fast", "DEF")


def _register(schema: str, impl: Any, fake: Any) -> None:
    _lib.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    name = schema.split("(", 1)[0]
    _lib.impl(name, impl, "CPU")
    _lib.impl(name, impl, "CUDA")
    torch.library.register_fake(f"llama_fast::{name}", fake, lib=_lib)


def _rows(t: Tensor) -> Tensor:
    """[..., n] -> [rows, n]: a view where strides allow, else a copy."""
    return t.reshape(-1, t.shape[-1])


def _new(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device)


# From here on the C library maps every allocation anew (glibc's M_MMAP_THRESHOLD at its highest).
_MAPPED = 32 << 20  # bytes


def _out(out: Tensor) -> Tensor:
    """out, just allocated and not written yet. The system hands out a large one page by page as it
    is written, at a fault each, which takes longer than the op: on a CPU huge pages are asked for.
    """
    if out.is_cpu and out.nbytes >= _MAPPED:
        _cpu.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def _new_scale(t: Tensor) -> Tensor:
    return t.new_empty((t.numel() // t.shape[-1], 1), dtype=torch.float32)


def _in_range(name: str, t: Tensor, low: int, high: int) -> None:
    if t.device.type != "cpu":
        return
    bad = _cpu.first_outside(t.data_ptr(), t.numel(), t.dtype == torch.int64, low, high)
    if bad >= 0:
        raise ValueError(
            f"{name}: got {t.reshape(-1)[bad].item()} at index {bad}, want {low} to {high}"
        )


# ---- norms and activations ----


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    on = kernels("rms_norm", x)
    if on is None:
        return reference.rms_norm(x, weight, eps)
    out = _out(_new(x))
    if x.numel():
        on.rms_norm(_rows(out), _rows(x), weight, eps)
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    on = kernels("add_rms_norm", x)
    if on is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    out, residual_out = _out(_new(x)), _out(_new(x))
    if x.numel():
        on.rms_norm(_rows(out), _rows(x), weight, eps, _rows(residual), _rows(residual_out))
    return out, residual_out


def _rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, scale_ub: float | None
) -> tuple[Tensor, Tensor]:
    on = kernels("rms_norm_fp8", x)
    if on is None:
        q, scale = reference.rms_norm_fp8(x, weight, eps, scale_ub=scale_ub)
        return q, scale
    q, scale = _out(_new(x, FP8_DTYPE)), _new_scale(x)
    if x.numel():
        on.rms_norm(_rows(q), _rows(x), weight, eps, scale=scale, scale_ub=scale_ub)
    return q, scale


def _add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale_ub: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    on = kernels("rms_norm_fp8", x)
    if on is None:
        q, scale, total = reference.rms_norm_fp8(
            x, weight, eps, residual=residual, scale_ub=scale_ub
        )
        return q, scale, total
    q, scale, total = _out(_new(x, FP8_DTYPE)), _new_scale(x), _out(_new(x))
    if x.numel():
        on.rms_norm(_rows(q), _rows(x), weight, eps, _rows(residual), _rows(total), scale, scale_ub)
    return q, scale, total


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    on = kernels("silu_and_mul", gate_up)
    if on is None:
        return reference.silu_and_mul(gate_up)
    out = _out(_fake_silu_and_mul(gate_up))
    if out.numel():
        on.silu_and_mul(_rows(out), _rows(gate_up))
    return out


def _fake_silu_and_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _silu_and_mul_fp8(gate_up: Tensor, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    on = kernels("silu_and_mul_fp8", gate_up)
    if on is None:
        return reference.silu_and_mul_fp8(gate_up, scale_ub=scale_ub)
    q, scale = _fake_silu_and_mul_fp8(gate_up, scale_ub)
    if q.numel():
        on.silu_and_mul(_rows(q), _rows(gate_up), scale, scale_ub)
    return q, scale


def _fake_silu_and_mul_fp8(gate_up: Tensor, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    out = _fake_silu_and_mul(gate_up)
    return _new(out, FP8_DTYPE), _new_scale(out)


_register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    lambda x, weight, eps: _new(x),
)
_register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    lambda x, residual, weight, eps: (_new(x), _new(x)),
)
_register(
    "rms_norm_fp8(Tensor x, Tensor weight, float eps, float? scale_ub) -> (Tensor, Tensor)",
    _rms_norm_fp8,
    lambda x, weight, eps, scale_ub: (_new(x, FP8_DTYPE), _new_scale(x)),
)
_register(
    "add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, float eps, float? scale_ub)"
    " -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_fp8,
    lambda x, residual, weight, eps, scale_ub: (_new(x, FP8_DTYPE), _new_scale(x), _new(x)),
)
_register("silu_and_mul(Tensor gate_up) -> Tensor", _silu_and_mul, _fake_silu_and_mul)
_register(
    "silu_and_mul_fp8(Tensor gate_up, float? scale_ub) -> (Tensor, Tensor)",
    _silu_and_mul_fp8,
    _fake_silu_and_mul_fp8,
)

# ---- rotary embedding ----


def _apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    positions = positions.contiguous()
    _in_range("positions", positions, 0, table.shape[0] - 1)
    on = kernels("apply_rope", q)
    if on is None:
        return reference.apply_rope(q, k, positions, table, interleaved=interleaved)
    q_out, k_out = _out(_new(q)), _out(_new(k))
    if positions.numel():
        on.rope(q_out, k_out, q, k, positions, table, interleaved)
    return q_out, k_out


def _apply_rope_and_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    positions, slots = positions.contiguous(), slots.contiguous()
    _in_range("positions", positions, 0, table.shape[0] - 1)
    _in_range("slots", slots, -1, k_cache.shape[0] * k_cache.shape[1] - 1)
    on = kernels("apply_rope_and_append", q)
    if on is None:
        return reference.apply_rope_and_append(
            q,
            k,
            v,
            positions,
            table,
            k_cache,
            v_cache,
            slots,
            interleaved=interleaved,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    q_out = _out(_new(q))
    if positions.numel():
        on.rope(
            q_out,
            None,
            q,
            k,
            positions,
            table,
            interleaved,
            v,
            k_cache,
            v_cache,
            slots,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    return q_out


_register(
    "apply_rope(Tensor q, Tensor k, Tensor positions, Tensor table, bool interleaved)"
    " -> (Tensor, Tensor)",
    _apply_rope,
    lambda q, k, positions, table, interleaved: (_new(q), _new(k)),
)
_register(
    "apply_rope_and_append(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor table,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, bool interleaved,"
    " Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _apply_rope_and_append,
    lambda q, *_: _new(q),
)

# ---- attention ----


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> None:
    if cu_seqlens.device.type != "cpu":
        return
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
        raise ValueError(
            f"{name}: got {starts if len(starts) < 9 else [*starts[:4], '...', *starts[-4:]]}, "
            f"want non-decreasing offsets from 0 to the {total} packed tokens"
        )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    on = kernels("attention", q)
    if on is None:
        return reference.attention(
            q,
            k,
            v,
            causal=causal,
            softmax_scale=softmax_scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    out = _out(_new(q))
    if out.numel():
        on.attention(out, q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k)
    return out


def _check_cache(cache_seqlens: Tensor, block_table: Tensor | None, k_cache: Tensor) -> None:
    """Every length fits the cache and every block id that a length reaches exists."""
    blocks, block_size = k_cache.shape[:2]
    if cache_seqlens.device.type != "cpu":
        return
    if block_table is None:
        _in_range("cache_seqlens", cache_seqlens, 0, block_size)
        return
    _in_range("cache_seqlens", cache_seqlens, 0, block_table.shape[1] * block_size)
    bad = _cpu.first_bad_block(
        block_table.data_ptr(),
        block_table.stride(0),
        cache_seqlens.data_ptr(),
        cache_seqlens.numel(),
        block_size,
        blocks,
    )
    if bad is not None:
        row, column, block = bad
        raise ValueError(
            f"block_table: got block {block} at [{row}, {column}], want 0 to {blocks - 1}"
        )


def _attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    causal: bool,
    softmax_scale: float,
    num_splits: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    cache_seqlens = cache_seqlens.contiguous()
    if block_table is not None and block_table.shape[1] > 1 and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    _check_cache(cache_seqlens, block_table, k_cache)
    on = kernels("attention_with_kvcache", q, k_cache)
    if on is None:
        return reference.attention_with_kvcache(
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            block_table=block_table,
            causal=causal,
            softmax_scale=softmax_scale,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    out = _out(_new(q))
    if out.numel():
        on.attention_with_kvcache(
            out,
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            block_table,
            causal,
            softmax_scale,
            num_splits,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    return out


_register(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float softmax_scale,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> Tensor",
    _attention,
    lambda q, *_: _new(q),
)
_register(
    "attention_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,"
    " Tensor? block_table, bool causal, float softmax_scale, int num_splits,"
    " Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _attention_with_kvcache,
    lambda q, *_: _new(q),
)

# ---- FP8 and linear ----


def _quantize_fp8(x: Tensor, granularity: str, scale_ub: float | None) -> tuple[Tensor, Tensor]:
    on = kernels("quantize_fp8", x)
    if on is None:
        return reference.quantize_fp8(x, granularity, scale_ub=scale_ub)
    q, scale = _fake_quantize_fp8(x, granularity, scale_ub)
    if x.numel() or granularity == "tensor":
        on.quantize_fp8(_rows(q), scale, _rows(x), granularity, scale_ub)
    return q, scale


def _fake_quantize_fp8(
    x: Tensor, granularity: str, scale_ub: float | None
) -> tuple[Tensor, Tensor]:
    cols = x.shape[-1]
    rows = x.numel() // cols
    blocks = (cols + FP8_BLOCK - 1) // FP8_BLOCK
    shapes: dict[str, tuple[int, ...]] = {
        "tensor": (1,),
        "row": (rows, 1),
        "block": (rows, blocks),
        "block_2d": ((rows + FP8_BLOCK - 1) // FP8_BLOCK, blocks),
    }
    return _new(x, FP8_DTYPE), x.new_empty(shapes[granularity], dtype=torch.float32)


def _fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    on = kernels("fp8_gemm", a, scale_b, out_dtype)
    if on is None:
        return reference.fp8_gemm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
    out = _out(_fake_fp8_gemm(a, b, scale_a, scale_b, bias, out_dtype))
    if out.numel():
        on.linear(out, a, b, bias, scale_a.contiguous(), scale_b.contiguous())
    return out


def _fake_fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def out_features(weight: Tensor) -> int:
    return weight.shape[0] * (PACK_ROWS if weight.dim() == 4 else 1)


def prefers_fp8_activations(weight: Tensor) -> bool:
    """What quantize_activation=None means for fp8_linear on weight's device."""
    on = kernels("fp8_linear", weight, weight, None)  # a chip's, whatever the shape
    return on is not None and on.prefers_fp8_activations(weight)


def _fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    quantize_activation: bool | None,
    scale_ub: float | None,
) -> Tensor:
    on = kernels("fp8_linear", x, weight_scale, quantize_activation)
    if on is None:
        return reference.fp8_linear(
            x,
            weight,
            weight_scale,
            bias,
            quantize_activation=quantize_activation,
            scale_ub=scale_ub,
        )
    if weight.dim() == 4 and not hasattr(on, "pack_weight"):
        raise ValueError(
            f"weight: got a packed weight {list(weight.shape)}, a layout for CPUs; want [N, K]"
        )
    out = _out(x.new_empty((*x.shape[:-1], out_features(weight))))
    if not out.numel():
        return out
    rows, x_scale = _rows(x), None
    if quantize_activation is None:
        quantize_activation = on.prefers_fp8_activations(x)
    if quantize_activation:
        blockwise = weight_scale.dim() == 2 and weight_scale.shape[1] > 1
        granularity = "block" if blockwise else "row"
        rows, x_scale = _quantize_fp8(rows, granularity, scale_ub)
    on.linear(_rows(out), rows, weight, bias, x_scale, weight_scale.contiguous())
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    on = kernels("linear", x)
    if on is None:
        return reference.linear(x, weight, bias)
    out = _out(x.new_empty((*x.shape[:-1], out_features(weight))))
    if out.numel():
        on.linear(_rows(out), _rows(x), weight, bias)
    return out


def _pack_weight(weight: Tensor) -> Tensor:
    on = kernels("pack_weight", weight)
    if on is None:
        return reference.pack_weight(weight)
    packed = _fake_pack_weight(weight)
    if packed.numel():
        on.pack_weight(packed, weight)
    return packed


def _fake_pack_weight(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return weight.new_empty((n // PACK_ROWS, k // 2, PACK_ROWS, 2))


_register(
    "quantize_fp8(Tensor x, str granularity, float? scale_ub) -> (Tensor, Tensor)",
    _quantize_fp8,
    _fake_quantize_fp8,
)
_register(
    "fp8_gemm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    _fp8_gemm,
    _fake_fp8_gemm,
)
_register(
    "fp8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " bool? quantize_activation, float? scale_ub) -> Tensor",
    _fp8_linear,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], out_features(weight))),
)
_register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], out_features(weight))),
)
_register("pack_weight(Tensor weight) -> Tensor", _pack_weight, _fake_pack_weight)
