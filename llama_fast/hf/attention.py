"""Attention for attn_implementation="llama_fast", registered with AttentionInterface.

Decode reads the cache's tensors in place through attention_with_kvcache; longer queries go through
attention. What neither kernel computes runs in scaled_dot_product_attention, as it would with
"sdpa", and a warning says so once.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..ops import attention, decode_attention
from ..ops.checks import ACTIVATIONS
from .masks import as_boolean, is_ranges, packed_seqlens

NAME = "llama_fast"
# Above this many queries, splitting the keys over threads no longer pays.
_FEW = 16
_NOT_OURS = ("softcap", "s_aux", "position_bias", "head_mask")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return attention's output [B, Sq, H, D], and its weights if output_attentions is true.

    query [B, H, Sq, D]; key and value [B, Hkv, Sk, D], the cache's tensors for example.
    attention_mask: what masks.make_mask returns, or the caller's boolean or additive mask [B, 1 or
    H, Sq, Sk].
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if options.get("output_attentions"):
        return _with_weights(module, query, key, value, attention_mask, scaling, dropout, causal)
    why = _why_not(query, key, value, dropout, options)
    if why is None:
        out = _by_kernel(query, key, value, attention_mask, scaling, causal)
        if out is not None:
            return out, None
        why = "a mask that is neither causal nor padding nor packed sequences"
    if why:
        _say_once(why)
    if attention_mask is not None and is_ranges(attention_mask):
        attention_mask = as_boolean(attention_mask, query.shape[2], key.shape[2])
    elif attention_mask is None and causal and 1 < query.shape[2] < key.shape[2]:
        stop = torch.full((1, 1, 1, 1), key.shape[2], dtype=torch.int32, device=query.device)
        attention_mask = as_boolean(stop, query.shape[2], key.shape[2])
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **options,
    )


def _why_not(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, options: dict[str, Any]
) -> str | None:
    """Return why the kernels cannot take a call ("" if that needs no warning), or None."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return ""  # training: scaled_dot_product_attention has a fused backward pass
    if dropout:
        return "dropout"
    for name in _NOT_OURS:
        if options.get(name) is not None:
            return name
    if q.dtype not in ACTIVATIONS or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"tensors of {q.dtype}, {k.dtype} and {v.dtype}"
    d, step = q.shape[-1], 4 if q.is_cpu else 8  # of the kernels
    if d % step or not 8 <= d <= 256 or v.shape != k.shape or q.shape[1] % k.shape[1]:
        return f"shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return "head dimensions that are not contiguous"
    return None


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> Tensor | None:
    """Return the output, or None if no kernel takes the mask."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if mask is None:
        return _attend(q, k, v, seqlen_k, scale, causal)
    if is_ranges(mask):
        if torch.compiler.is_compiling():
            if mask.shape[-1] > 1:  # rows may start anywhere
                return None
            seqlens = mask.reshape(batch)
            return decode_attention.attention_with_kvcache(q, k, v, seqlens, softmax_scale=scale)
        return _by_ranges(q, k, v, mask.flatten(1).tolist(), scale)
    cu_seqlens = packed_seqlens(mask)
    if cu_seqlens is None or seqlen_q != seqlen_k:
        return None
    packed = (t.flatten(0, 1) for t in (q, k, v))
    out = attention.attention(
        *packed, softmax_scale=scale, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens
    )
    return out.unflatten(0, (batch, seqlen_q))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seqlen: int, scale: float | None, causal: bool
) -> Tensor:
    """Attend to the first seqlen keys, of which the queries are the last."""
    if q.shape[1] == 1 or (q.shape[1] < seqlen and causal and q.shape[1] <= _FEW):
        seqlens = torch.full((q.shape[0],), seqlen, dtype=torch.int32, device=q.device)
        return decode_attention.attention_with_kvcache(q, k, v, seqlens, softmax_scale=scale)
    if seqlen < k.shape[1]:
        k, v = k[:, :seqlen], v[:, :seqlen]
    return attention.attention(q, k, v, causal=causal, softmax_scale=scale)


def _by_ranges(
    q: Tensor, k: Tensor, v: Tensor, ranges: list[list[int]], scale: float | None
) -> Tensor:
    """Attend once for each run of rows with equal ranges: [total] or [first, stop, total]."""
    if len(ranges[0]) == 1:
        return _attend(q, k, v, ranges[0][0], scale, True)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # left padding keeps 0
    at, seqlen_q = 0, q.shape[1]
    for (first, stop, total), same in itertools.groupby(ranges):
        rows = slice(at, at := at + len(list(same)))
        past = total - seqlen_q
        keys, values = k[rows, first:stop], v[rows, first:stop]
        begin = max(first - past, 0)
        end = max(stop - past, begin)  # later queries are padding on the right
        for queries, causal in ((slice(begin, end), True), (slice(end, seqlen_q), False)):
            if queries.start < queries.stop and first < stop:
                out[rows, queries] = _attend(
                    q[rows, queries], keys, values, stop - first, scale, causal
                )
    return out


def _with_weights(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attend as "eager" does, which has the weights."""
    if mask is None and causal:
        mask = torch.full((1, 1, 1, 1), k.shape[2], dtype=torch.int32, device=q.device)
    if mask is not None and is_ranges(mask):
        mask = as_boolean(mask, q.shape[2], k.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(q.dtype).min
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, lowest)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    out: tuple[Tensor, Tensor] = eager_attention_forward(
        module, q, k, v, mask, scaling=scaling, dropout=dropout
    )
    return out


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(
        f"llama_fast: attention runs in scaled_dot_product_attention for {why}", stacklevel=5
    )


def _say_once(why: str) -> None:
    if not torch.compiler.is_compiling():
        _warn(why)
