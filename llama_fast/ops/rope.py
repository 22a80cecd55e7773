"""The ops apply_rope and apply_rope_and_append, and rope_table, which makes the table they read."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _cpu, reference
from ..dispatch import kernels
from . import checks
from .common import check_range, new, register, with_huge_pages

_EXACT = 2**24  # positions below it are exact in fp32
_WIDEST = 2**16  # of head_dim


class Scaling(Protocol):
    """The fields of a RopeScaling that rope_table reads."""

    @property
    def factor(self) -> float: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def original_max_position_embeddings(self) -> int: ...


def inv_freq(theta: float, head_dim: int, scaling: Scaling | None = None) -> Tensor:
    """Return the frequencies in radians a token, fp32 [head_dim / 2].

    Llama 3.1 divides frequencies with wavelengths above context / low_freq_factor by `factor`,
    keeps those below context / high_freq_factor, and interpolates between.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu")
    exponents = steps.float() / head_dim
    freqs = 1.0 / theta**exponents
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    scaled = torch.where(wavelength > context / low, freqs / scaling.factor, freqs)
    is_between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(is_between, between, scaled)


def rope_table(
    config_or_theta: Any,
    max_positions: int,
    *,
    head_dim: int | None = None,
    scaling: Any = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return fp32 [max_positions, head_dim]: cosines, then sines, head_dim / 2 each.

    Takes a LlamaConfig, which has theta, head_dim and scaling, or theta with head_dim and, for
    Llama 3.1, a RopeScaling; for other types, a RopeFunction. Angles are position times frequency
    in fp32, as in Meta's code and transformers: the model was trained with them. Keep the table in
    fp32 for every model dtype: in bf16, positions past 256 would collapse.
    """
    theta = config_or_theta
    if hasattr(config_or_theta, "rope_theta"):
        theta = config_or_theta.rope_theta
        head_dim = config_or_theta.head_dim if head_dim is None else head_dim
        scaling = config_or_theta.rope_scaling if scaling is None else scaling
    elif isinstance(theta, bool) or not isinstance(theta, (int, float)):
        got = type(config_or_theta).__name__
        raise TypeError(f"config_or_theta: got {got}, want a LlamaConfig or a number")
    checks.number("config_or_theta", theta, 1.0, inclusive=False)
    theta = float(theta)
    checks.integer("max_positions", max_positions, 1, _EXACT)
    if head_dim is None:
        raise ValueError("head_dim: got None, want it when theta is given as a number")
    checks.integer("head_dim", head_dim, 2, _WIDEST)
    if head_dim % 2:
        raise ValueError(f"head_dim: got {head_dim}, want an even number")
    factor = 1.0
    if hasattr(scaling, "frequencies"):
        freqs, factor = scaling.frequencies(theta, head_dim, max_positions)
    elif scaling is None or hasattr(scaling, "low_freq_factor"):
        freqs = inv_freq(theta, head_dim, scaling)
    else:
        raise TypeError(f"scaling: got {type(scaling).__name__}, want a RopeScaling")
    ends = torch.stack((freqs.min(), freqs.max(), torch.tensor(factor, device="cpu")))
    if not bool((ends.isfinite() & (ends >= torch.finfo(torch.float32).tiny)).all()):
        raise ValueError(
            f"scaling: got {scaling} for theta {theta}, whose frequencies or factor are zero or "
            "not finite in fp32"
        )
    angles = torch.arange(max_positions, dtype=torch.float32, device="cpu")[:, None] * freqs
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
    try:
        return table.to(torch.get_default_device() if device is None else torch.device(device))
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {checks.shown(device)}, want a device: {error}") from error


@checks.public
def apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions: [T, H, D], [T, Hkv, D], [T] (int32 or int64) -> (q, k).

    table: rope_table(...), fp32 [max_positions, D]. interleaved pairs (2i, 2i + 1), as in Meta's
    checkpoints; the default pairs (i, i + D / 2), as in Hugging Face's. The rotation is in fp32 and
    rounds once. A position outside the table raises ValueError (CPU tensors).
    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    _check(q, k, positions, table, interleaved)
    return _apply_rope_op(q, k, positions, table, interleaved)


@checks.public
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
    """Rotate q and k as apply_rope does and write k and v into a KV cache. Returns the rotated q.

    v [T, Hkv, D]; k_cache, v_cache [blocks, block_size, Hkv, D] of any strides (if contiguous:
    blocks = B, block_size = S), with memory of its own for each element. slots [T] (int32 or
    int64): block * block_size + offset for each token; -1 skips it. Slots must differ from each
    other. An FP8 cache (e4m3) needs k_scale and v_scale, fp32 [1] or [Hkv], and receives
    e4m3(clamp(k / k_scale, -448, 448)), where k is rotated and rounded to its dtype first; caches
    of q's dtype take no scales.

    layer: the caches are pools [layers, blocks, block_size, Hkv, D], and this layer is written.
    Under torch.compile with dynamic shapes, pass pools and layer: pool[layer] raises
    NotImplementedError there, because Inductor of PyTorch 2.13 would write to the pool's start.
    """
    _check(q, k, positions, table, interleaved)
    checks.like("v", v, "q", q)
    checks.has_shape("v", v, tuple(k.shape), "k's shape")
    checks.rows_contiguous("v", v)
    checks.cache_scales(q, k_cache, v_cache, k_scale, v_scale)
    shape: tuple[int | None, ...] = (None, None, k.shape[1], k.shape[2])
    spelled = "[blocks, block_size, Hkv, D]"
    if layer is not None:
        shape, spelled = (None, *shape), f"[layers, {spelled[1:]}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.has_shape(name, cache, shape, spelled)
        checks.rows_contiguous(name, cache)
    if layer is not None:
        checks.integer("layer", layer, 0, k_cache.shape[0] - 1)
    checks.has_shape("v_cache", v_cache, tuple(k_cache.shape), "k_cache's shape")
    checks.has_dtype("slots", slots, checks.INDICES)
    checks.like("slots", slots, "q", q, dtype=False)
    checks.has_shape("slots", slots, (q.shape[0],), "[T]")
    return _apply_rope_and_append_op(
        q, k, v, positions, table, k_cache, v_cache, slots, interleaved, k_scale, v_scale, layer
    )


def _check(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> None:
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


def _apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    positions = positions.contiguous()
    check_range("positions", positions, 0, table.shape[0] - 1)
    on = kernels("apply_rope", q)
    if on is None:
        return reference.apply_rope(q, k, positions, table, interleaved=interleaved)
    q_out, k_out = with_huge_pages(new(q)), with_huge_pages(new(k))
    if positions.numel():
        on.rope(
            q_out, k_out, q, k, positions, table, interleaved, None, None, None, None, None, None
        )
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
    layer: int | None,
) -> Tensor:
    if layer is not None:
        k_cache, v_cache = k_cache[layer], v_cache[layer]
    positions, slots = positions.contiguous(), slots.contiguous()
    check_range("positions", positions, 0, table.shape[0] - 1)
    check_range("slots", slots, -1, k_cache.shape[0] * k_cache.shape[1] - 1)
    if not k_cache.is_meta and (shared := _cpu.shared_memory(k_cache, v_cache)):
        _refuse_shared(shared, k_cache, v_cache)
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
    q_out = with_huge_pages(new(q))
    if positions.numel():
        caches = (v, k_cache, v_cache, slots, k_scale, v_scale)
        on.rope(q_out, None, q, k, positions, table, interleaved, *caches)
        increment_version((k_cache, v_cache))
    return q_out


def _refuse_shared(shared: str, k_cache: Tensor, v_cache: Tensor) -> None:
    if shared == "both":
        raise ValueError("v_cache: got memory that is k_cache's too, want caches of their own")
    strides = list((k_cache if shared == "k_cache" else v_cache).stride())
    raise ValueError(f"{shared}: got strides {strides}, want memory for each of its elements")


def _fake_append(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Refuse caches that a compiled graph takes out of a pool, unless Inductor keeps their offset:
    without a lowering for sym_storage_offset it writes to the pool's start (PyTorch issue 198068).
    A graph's own input has a plain symbol as its offset, which is right."""
    for name, cache in zip(("k_cache", "v_cache"), rest[2:4], strict=True):
        offset = cache.storage_offset()
        if isinstance(offset, torch.SymInt) and not offset.node.expr.is_symbol:
            from torch._inductor.lowering import fallbacks, lowerings

            reads = torch.ops.aten.sym_storage_offset.default
            if reads not in lowerings or reads in fallbacks:
                raise NotImplementedError(
                    f"{name}: got a view at the dynamic offset {offset}, where this PyTorch's "
                    f"Inductor would write elsewhere; pass the whole pool and layer="
                )
    return new(q)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, positions, table, ctx.interleaved = inputs
    ctx.save_for_backward(positions, table)


def _apply_rope_backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
    """Rotate the gradients by the opposite angles, with a table of one row a token."""
    if ctx.needs_input_grad[3]:
        raise NotImplementedError("apply_rope: has no gradient for table; detach it")
    positions, table = ctx.saved_tensors
    cos, sin = table[positions.long()].chunk(2, dim=-1)
    rows = torch.arange(positions.shape[0], device=positions.device)
    opposite = torch.cat((cos, -sin), dim=-1)
    turned = _apply_rope_op(of_q.contiguous(), of_k.contiguous(), rows, opposite, ctx.interleaved)
    return *turned, None, None, None


def _cast(dtype: torch.dtype, q: Tensor, k: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Promote q and k to their common dtype: the rotation is in fp32 anyway."""
    both = torch.promote_types(q.dtype, k.dtype)
    return q.to(both), k.to(both), *rest


def _cast_append(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    *rest: Any,
) -> tuple[Any, ...]:
    """Cast q, k and v to the cache's dtype, or to autocast's for an FP8 cache."""
    to = dtype if k_cache.itemsize == 1 else k_cache.dtype
    return q.to(to), k.to(to), v.to(to), positions, table, k_cache, *rest


_apply_rope_op = register(
    "apply_rope(Tensor q, Tensor k, Tensor positions, Tensor table, bool interleaved)"
    " -> (Tensor, Tensor)",
    _apply_rope,
    lambda q, k, positions, table, interleaved: (new(q), new(k)),
    setup=_setup,
    backward=_apply_rope_backward,
    autocast=_cast,
)
_apply_rope_and_append_op = register(
    "apply_rope_and_append(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor table,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, bool interleaved,"
    " Tensor? k_scale, Tensor? v_scale, SymInt? layer) -> Tensor",
    _apply_rope_and_append,
    _fake_append,
    autocast=_cast_append,
)
