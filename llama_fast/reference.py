"""The eager PyTorch twin of every op, with the same name and signature. The kernels are tested and
measured against it, so it is written as transformers computes Llama, not for speed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
# The smallest amax. A zero row's scale is then a normal number, which flush-to-zero leaves.
FP8_TINY = FP8_MAX * torch.finfo(torch.float32).tiny
FP8_BLOCK = 128


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32, or unchanged if it is fp64, in which gradients are checked."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize in fp32, round to x's dtype, multiply by weight in x's dtype."""
    h = _wide(x)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


def rms_norm_fp8(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    scale_ub: float | None = None,
) -> tuple[Tensor, ...]:
    if residual is None:
        return quantize_fp8(rms_norm(x, weight, eps), scale_ub=scale_ub)
    normed, residual = add_rms_norm(x, residual, weight, eps)
    return (*quantize_fp8(normed, scale_ub=scale_ub), residual)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_and_mul_fp8(gate_up: Tensor, *, scale_ub: float | None = None) -> tuple[Tensor, Tensor]:
    return quantize_fp8(silu_and_mul(gate_up), scale_ub=scale_ub)


def apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate in fp32 and round once."""
    cos, sin = table[positions.long()].unsqueeze(-2).chunk(2, dim=-1)  # [T, 1, D / 2] each
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    h = _wide(x)
    if interleaved:
        a, b = h[..., 0::2], h[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = h.chunk(2, dim=-1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return out.to(x.dtype)


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
    layer: int | None = None,
) -> Tensor:
    if layer is not None:
        k_cache, v_cache = k_cache[layer], v_cache[layer]
    q, k = apply_rope(q, k, positions, table, interleaved=interleaved)
    kept = slots >= 0
    block, offset = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x[kept]
        if scale is not None:  # per key/value head, or [1]
            x = (x.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
        _raw(cache)[block, offset] = _raw(x)
    return q


def _raw(t: Tensor) -> Tensor:
    """Return an FP8 tensor's bytes, which every device can index; other tensors unchanged."""
    return t.view(torch.uint8) if t.itemsize == 1 else t


def _as(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo _raw. view(dtype) cuts gradients, even if the dtype is the same."""
    return raw if raw.dtype == dtype else raw.view(dtype)


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
    """Softmax in fp32; products and probabilities rounded to q's dtype, as in transformers."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _attend(q, k, v, causal, softmax_scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        out[rows] = _attend(q[None, rows], k[None, keys], v[None, keys], causal, softmax_scale)[0]
    return out


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
    """Dequantize an FP8 cache to q's dtype, then attend. num_splits affects kernels only."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for i, seqlen in enumerate(cache_seqlens.tolist()):
        if block_table is None:
            k, v = k_cache[i, :seqlen], v_cache[i, :seqlen]
        else:
            blocks = block_table[i, : -(-seqlen // k_cache.shape[1])].long()
            k, v = (
                _as(_raw(c)[blocks], c.dtype).flatten(0, 1)[:seqlen] for c in (k_cache, v_cache)
            )
        if k_scale is not None and v_scale is not None:  # per key/value head, or [1]
            wide = torch.promote_types(q.dtype, torch.float32)
            k, v = (
                (t.to(wide) * scale[:, None]).to(q.dtype)
                for t, scale in ((k, k_scale), (v, v_scale))
            )
        out[i] = _attend(q[i : i + 1], k[None], v[None], causal, softmax_scale)[0]
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None) -> Tensor:
    """Attend: q [B, Sq, H, D], k and v [B, Sk, Hkv, D]. A query that sees no key gives zeros."""
    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // max(k.shape[2], 1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    k, v = (t.transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    scores = _wide(q.transpose(1, 2) @ k.transpose(2, 3)) * scale  # [B, H, Sq, Sk]
    if causal:
        mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~mask.tril(seqlen_k - seqlen_q), float("-inf"))
    blind = max(seqlen_q - seqlen_k, 0) if causal else 0
    p = torch.softmax(scores[:, :, blind:], dim=-1).to(q.dtype)
    return F.pad(p @ v, (0, 0, blind, 0)).transpose(1, 2).contiguous()


def quantize_fp8(
    x: Tensor, granularity: str = "row", *, scale_ub: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return q = e4m3(clamp(x / scale, -448, 448)), scale = max(min(amax, scale_ub), tiny) / 448.

    granularity: "tensor" -> scale [1]; "row" -> [rows, 1]; "block" -> 1x128 blocks,
    [rows, ceil(cols / 128)]; "block_2d" -> 128x128 blocks, for weights.
    """
    rows = x.float().reshape(-1, x.shape[-1])
    n, cols = rows.shape
    if granularity in ("block", "block_2d"):
        height = FP8_BLOCK if granularity == "block_2d" else 1
        grid = -(-n // height), -(-cols // FP8_BLOCK)
        padded = F.pad(rows, (0, grid[1] * FP8_BLOCK - cols, 0, grid[0] * height - n))
        blocks = padded.view(grid[0], height, grid[1], FP8_BLOCK)
        scale = _fp8_scale(blocks.abs().amax(dim=(1, 3)) if n else rows.new_empty(grid), scale_ub)
        spread = scale.repeat_interleave(height, 0)[:n].repeat_interleave(FP8_BLOCK, 1)[:, :cols]
    elif granularity == "row":
        scale = _fp8_scale(rows.abs().amax(-1, keepdim=True), scale_ub)
        spread = scale
    else:
        amax = rows.abs().amax() if rows.numel() else rows.new_zeros(())
        scale = _fp8_scale(amax.reshape(1), scale_ub)
        spread = scale
    q = (rows / spread).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    return q.view(x.shape), scale


def _fp8_scale(amax: Tensor, scale_ub: float | None) -> Tensor:
    if scale_ub is not None:
        amax = amax.clamp(max=scale_ub)
    amax = amax.clamp(min=FP8_TINY)
    # Divide by a tensor: on a GPU PyTorch turns a division by a number into a product with its
    # reciprocal, which is an ulp off for half of the rows.
    return amax / torch.full_like(amax, FP8_MAX)


def dequantize_fp8(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return q * scale for q [rows, cols]. The shapes determine the granularity."""
    return (q.float() * spread_scale(scale, *q.shape)).to(dtype)


def spread_scale(scale: Tensor, rows: int, cols: int) -> Tensor:
    """Return scales of any granularity, repeated to broadcast over [rows, cols]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape[0] != rows:
        scale = scale.repeat_interleave(FP8_BLOCK, 0)[:rows]
    if scale.shape[1] != 1:
        scale = scale.repeat_interleave(FP8_BLOCK, 1)[:, :cols]
    return scale


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return (a * scale_a) @ (b * scale_b)^T + bias, summed in fp32 and rounded once."""
    out = dequantize_fp8(a, scale_a) @ dequantize_fp8(b, scale_b).t()
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, unpack_weight(weight), bias)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    quantize_activation: bool | None = None,
    scale_ub: float | None = None,
) -> Tensor:
    """Return x @ (weight * weight_scale)^T + bias. quantize_activation=None means False here."""
    weight = unpack_weight(weight)
    rows = x.reshape(-1, x.shape[-1])
    if quantize_activation:
        blockwise = weight_scale.dim() == 2 and weight_scale.shape[1] > 1
        q, scale = quantize_fp8(rows, "block" if blockwise else "row", scale_ub=scale_ub)
        out = fp8_gemm(q, weight, scale, weight_scale, bias=bias, out_dtype=x.dtype)
    else:
        out = rows.float() @ dequantize_fp8(weight, weight_scale).t()
        if bias is not None:
            out = out + bias.float()
        out = out.to(x.dtype)
    return out.view(*x.shape[:-1], out.shape[-1])


PACK_ROWS = 64  # output features per panel of a packed weight


def pack_weight(weight: Tensor) -> Tensor:
    """Reorder [N, K] to [N / 64, K / 2, 64, 2], which linear() and fp8_linear() read sequentially:
    packed[n // 64, k // 2, n % 64, k % 2] = weight[n, k].
    """
    n, k = weight.shape
    panels = _raw(weight).reshape(n // PACK_ROWS, PACK_ROWS, k // 2, 2).transpose(1, 2)
    return _as(panels.contiguous(), weight.dtype)


def unpack_weight(weight: Tensor) -> Tensor:
    """Undo pack_weight; return a plain [N, K] weight unchanged."""
    if weight.dim() == 2:
        return weight
    rows = _raw(weight).transpose(1, 2).reshape(weight.shape[0] * PACK_ROWS, weight.shape[1] * 2)
    return _as(rows, weight.dtype)
