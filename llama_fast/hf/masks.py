"""The masks of attn_implementation="llama_fast", registered with AttentionMaskInterface.

transformers makes a mask once for a forward pass and hands it to every layer. Ours is one of

    None                 the queries are the last of the keys, and the model's causality holds
    int32 [B, 1, 1, 1]   total: the queries are the last of `total` keys, as in a static cache
    int32 [B, 1, 1, 3]   first, stop, total: as above, and keys outside [first, stop) are padding
    bool [B, 1, Sq, Sk]  anything else; packed_seqlens() returns its packed sequences, if any

The integer forms are causal too. They have four dimensions because generate() prepares the masks of
static caches before the model's forward, which uses a mask of four dimensions as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

_SEQLENS = "_llama_fast_cu_seqlens"  # an attribute of a boolean mask


def make_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    cache_position: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """Return a mask of the module's forms. The arguments are AttentionMaskInterface's: those of
    transformers 5, and cache_position of 4.57 in place of q_length and q_offset."""
    options |= {"mask_function": mask_function, "attention_mask": attention_mask}
    options |= {"local_size": local_size, "allow_is_causal_skip": allow_is_causal_skip}
    options |= {"batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset}
    if cache_position is not None:
        options |= {"cache_position": cache_position}
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    else:
        options |= {"q_length": q_length, "q_offset": q_offset, "device": device}
        options |= {"use_vmap": use_vmap}
    assert q_length is not None
    tracing = torch.compiler.is_compiling()
    causal = mask_function is masking_utils.causal_mask_function or (
        # A sliding window or chunk that no sequence exceeds. Functions combined with it forbid the
        # skip, as do static caches at one query; those take the general path.
        local_size is not None and kv_length < local_size and allow_is_causal_skip
    )
    if causal and not use_vmap and kv_offset == 0:
        if tracing and attention_mask is None:
            if isinstance(q_offset, int) and kv_length == q_offset + q_length:
                return None
            stop = torch.as_tensor(q_offset + q_length, dtype=torch.int32, device=device)
            return stop.reshape(1, 1, 1, 1).expand(batch_size, 1, 1, 1)
        if not tracing:
            total = int(q_offset) + q_length
            static = kv_length > total
            if allow_is_causal_skip or (static and q_length == 1):
                rows = _unpadded(attention_mask, total)
                if rows == []:
                    rows = [[total]] * batch_size if static else None
                    return None if rows is None else _ranges(rows, device)
                if rows is not None:
                    return _ranges([[*row, total] for row in rows], device)
    mask = masking_utils.sdpa_mask(**options)
    if mask is None or tracing:
        return mask
    return _simplified(mask, q_length, kv_length)


def _unpadded(attention_mask: Tensor | None, total: int) -> list[list[int]] | None:
    """Return each row's range of tokens that are no padding, [first, stop); [] if there is no
    padding; None if a row has several ranges. attention_mask: bool [B, >= total]."""
    if attention_mask is None:
        return []
    if attention_mask.shape[-1] < total:
        return None
    valid = attention_mask[:, :total].bool()
    if valid.all():
        return []
    first = valid.int().argmax(-1)
    stop = first + valid.sum(-1)
    at = torch.arange(total, device=valid.device)
    if not (valid == ((at >= first[:, None]) & (at < stop[:, None]))).all():
        return None
    rows: list[list[int]] = torch.stack((first, stop), -1).tolist()
    return rows


def _ranges(rows: list[list[int]], device: torch.device | str) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)[:, None, None]


def _simplified(mask: Tensor, q_length: int, kv_length: int) -> Tensor | None:
    """Return a smaller form of a boolean mask [B, 1, Sq, Sk] where a kernel has one."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        return mask
    rows = mask[:, 0]
    if q_length == 1:
        unpadded = _unpadded(rows[:, 0], kv_length)
        if not unpadded:
            return mask if unpadded is None else None
        return _ranges([[*row, kv_length] for row in unpadded], mask.device)
    if q_length != kv_length:
        return mask
    # Packed sequences: query i sees the keys from its sequence's start to itself, and so does the
    # start, unlike that of a sliding window.
    at = torch.arange(q_length, device=mask.device)
    starts_of = rows.int().argmax(-1)  # [B, Sq]
    contiguous = rows == ((at >= starts_of[..., None]) & (at <= at[:, None]))
    if not contiguous.all() or not torch.equal(starts_of.gather(-1, starts_of), starts_of):
        return mask
    begins = (starts_of == at).flatten().nonzero().flatten().to(torch.int32)
    setattr(mask, _SEQLENS, torch.nn.functional.pad(begins, (0, 1), value=starts_of.numel()))
    return mask


def is_ranges(mask: Tensor) -> bool:
    """Return whether a layer's mask is of the integer forms."""
    return mask.dtype == torch.int32


def packed_seqlens(mask: Tensor) -> Tensor | None:
    """Return cu_seqlens, int32, of the packed sequences that a boolean mask separates, or None."""
    return getattr(mask, _SEQLENS, None)


def as_boolean(ranges: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """Return the integer forms as bool [B, 1, Sq, Sk]."""
    total = ranges[..., -1:]  # [B, 1, 1, 1]
    at = torch.arange(seqlen_k, device=ranges.device)
    queries = torch.arange(seqlen_q, device=ranges.device)[:, None]
    mask = at <= total - seqlen_q + queries
    if ranges.shape[-1] == 1:
        return mask
    return mask & (at >= ranges[..., :1]) & (at < ranges[..., 1:2])
