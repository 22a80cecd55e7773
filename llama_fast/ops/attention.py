"""The op attention: prefill, batched or packed, without a cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch import kernels
from . import checks
from .common import new, register, with_huge_pages


@checks.public
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
    """Return softmax(q k^T * softmax_scale) v for grouped-query heads, in linear memory.

    q [B, Sq, H, D], k and v [B, Sk, Hkv, D] -> [B, Sq, H, D]; or packed: q [total_q, H, D],
    k and v [total_k, Hkv, D] with cu_seqlens_q and cu_seqlens_k [B + 1] int32. H is a multiple of
    Hkv, D a multiple of 4 from 8 to 256. causal is bottom-right aligned: query i sees the keys
    j <= i + Sk - Sq; a query that sees none gives zeros. softmax_scale: None means 1 / sqrt(D).
    The softmax is computed in fp32. Source: Dao, FlashAttention-2, arXiv:2307.08691.
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
    scale = checks.softmax_scale(softmax_scale, q.shape[-1])
    return _attention_op(q, k, v, causal, scale, cu_seqlens_q, cu_seqlens_k)


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> None:
    if not cu_seqlens.is_cpu:
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
    out = with_huge_pages(new(q))
    if out.numel():
        on.attention(out, q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k)
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.causal, ctx.softmax_scale, cu_seqlens_q, cu_seqlens_k = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *cu_seqlens = ctx.saved_tensors
    gradients = _gradients_op(grad, q, k, v, ctx.causal, ctx.softmax_scale, *cu_seqlens)
    return *gradients, None, None, None, None


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. Runs PyTorch's attention forward again and backward, in
    linear memory except for a mask [Sq, Sk] where Sq < Sk. It is an op because torch.compile cannot
    trace the loop over sequences."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _sdpa_gradients(grad, q, k, v, causal, softmax_scale)
    out = new(q), new(k), new(v)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        parts = _sdpa_gradients(
            grad[None, rows], q[None, rows], k[None, keys], v[None, keys], causal, softmax_scale
        )
        for whole, at, part in zip(out, (rows, keys, keys), parts, strict=True):
            whole[at] = part[0]
    return out


def _sdpa_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q [B, Sq, H, D], k and v [B, Sk, Hkv, D]."""
    of_q, of_k, of_v = (new(t).zero_() for t in (q, k, v))
    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if causal:  # the first queries may see no key
        seeing = min(seqlen_q, seqlen_k)
        grad, q = grad[:, seqlen_q - seeing :], q[:, seqlen_q - seeing :]
    if not q.numel() or not k.numel():
        return of_q, of_k, of_v
    mask = None
    if causal and seqlen_q < seqlen_k:
        mask = q.new_ones((seqlen_q, seqlen_k), dtype=torch.bool).tril(seqlen_k - seqlen_q)
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        result = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2).repeat_interleave(group, dim=1),
            v.transpose(1, 2).repeat_interleave(group, dim=1),
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=softmax_scale,
        )
    of_seeing, of_k, of_v = torch.autograd.grad(result, (q, k, v), grad.transpose(1, 2))
    of_q[:, seqlen_q - q.shape[1] :] = of_seeing
    return of_q, of_k.contiguous(), of_v.contiguous()


def _cast(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Any, ...]:
    return q.to(dtype), k.to(dtype), v.to(dtype), *rest


_gradients_op = register(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, bool causal,"
    " float softmax_scale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> (Tensor, Tensor, Tensor)",
    _gradients,
    lambda grad, q, k, v, *_: (new(q), new(k), new(v)),
)
_attention_op = register(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float softmax_scale,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> Tensor",
    _attention,
    lambda q, *_: new(q),
    setup=_setup,
    backward=_attention_backward,
    autocast=_cast,
)
