"""Argument checks. Each raises TypeError (wrong type or dtype) or ValueError (wrong shape, stride,
device or range) that names the argument, the value received and the value wanted. torch.compile
traces through them, so none reads a tensor's data."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..rope_scaling import shown as shown

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
INDICES = (torch.int32, torch.int64)
INT32 = (torch.int32,)
FP32 = (torch.float32,)
FP8 = (torch.float8_e4m3fn,)
_LARGEST = torch.finfo(torch.float32).max  # kernels compute with fp32 numbers
LARGEST_INT = 2**31 - 1
Function = TypeVar("Function", bound=Callable[..., Any])


def public(function: Function) -> Function:
    """Decorate a public op: if its checks or PyTorch refuse a call with a sparse, nested or mkldnn
    tensor, say so, since PyTorch's own words for these name no argument. Only calls that fail look
    at layouts: in each call that would take 0.05 us a tensor."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def op(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception:
            for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
                if isinstance(value, Tensor) and (got := _layout(value)):
                    raise TypeError(f"{name}: got a {got} tensor, want a strided one") from None
            raise

    return op  # type: ignore[return-value]


def _layout(t: Tensor) -> str | None:
    """Return what t is instead of an ordinary tensor with strides, or None."""
    if t.is_nested:
        return "nested"
    strided = t.layout is torch.strided
    return None if strided else str(t.layout).removeprefix("torch.").removeprefix("_")


def is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, want a torch.Tensor")


def has_dtype(name: str, t: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor) or t.dtype not in allowed:
        is_tensor(name, t)
        want = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: got dtype {str(t.dtype).removeprefix('torch.')}, want {want}")


def has_shape(name: str, t: Tensor, shape: tuple[int | None, ...], spelled: str) -> None:
    """Check the shape. None matches any size; spelled is the shape's name, such as '[T, H, D]'."""
    got = t.shape
    if got == shape:
        return
    ok = len(got) == len(shape)
    for size, want in zip(got, shape):  # noqa: B905  a keyword costs 0.1 us
        if want is not None and size != want:
            ok = False
    if not ok:
        sizes = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: got shape {list(got)}, want {spelled} = [{sizes}]")


def like(name: str, t: Tensor, other: str, o: Tensor, *, dtype: bool = True) -> None:
    """Check that t is on o's device and, unless dtype is False, has o's dtype. Under autocast any
    activation's dtype will do: the op casts."""
    if not isinstance(t, Tensor) or t.device != o.device:
        is_tensor(name, t)
        raise ValueError(f"{name}: got device {t.device}, want {other}'s, {o.device}")
    if dtype and t.dtype != o.dtype:
        device = t.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if casts and t.dtype in ACTIVATIONS and o.dtype in ACTIVATIONS:
            return
        got, want = (str(d).removeprefix("torch.") for d in (t.dtype, o.dtype))
        raise TypeError(f"{name}: got dtype {got}, want {other}'s, {want}")


def rows_contiguous(name: str, t: Tensor) -> None:
    """Check that the last dimension is dense; the others may have any stride."""
    if not t.is_contiguous() and t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(
            f"{name}: got stride {t.stride(-1)} in the last dimension, want 1 "
            f"(call .contiguous() first)"
        )


def activation(name: str, t: Tensor) -> None:
    """Check for bf16, fp16 or fp32, and a last dimension that is dense and not empty."""
    has_dtype(name, t, ACTIVATIONS)
    if t.dim() == 0 or t.size(-1) == 0:
        raise ValueError(f"{name}: got shape {list(t.shape)}, want [..., n] with n >= 1")
    rows_contiguous(name, t)


def vector(name: str, t: Tensor, n: int, other: str, o: Tensor) -> None:
    """Check for a dense [n] with o's dtype and device: a norm's weight, a bias."""
    like(name, t, other, o)
    has_shape(name, t, (n,), "[n]")
    rows_contiguous(name, t)


def number(name: str, value: Any, low: float, *, inclusive: bool = True) -> None:
    """Check for a real number >= low (> low when not inclusive) that fp32 can hold."""
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat))
    ):
        raise TypeError(f"{name}: got {type(value).__name__}, want a float")
    # Comparisons only: torch.compile traces a SymFloat through them, not through math.isfinite.
    bad = not low <= value <= _LARGEST or (value == low and not inclusive)
    if bad:
        raise ValueError(
            f"{name}: got {shown(value)}, want a number {'>=' if inclusive else '>'} {low} and at "
            f"most float32's largest, {_LARGEST:.3g}"
        )


def integer(name: str, value: Any, low: int, high: int = LARGEST_INT) -> None:
    """Check for an int from low to high."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, want an int")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {shown(value)}, want {low} to {high}")


def bound(name: str, value: Any) -> None:
    """Check for None or a bound on amax, a number above 0 in fp32's range. A bound below fp32's
    smallest normal number times 448, which is the least amax, acts as that."""
    if value is not None:
        number(name, value, 0.0, inclusive=False)


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, want a bool")


def heads(q_heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(
            f"q: got {q_heads} query heads for {kv_heads} key/value heads, want a multiple"
        )


def head_dim(d: int) -> None:
    if d < 8 or d > 256 or d % 4:
        raise ValueError(f"q: got head_dim {d}, want a multiple of 4 from 8 to 256")


def cache_scales(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Check that the caches have q's dtype and no scale, or are e4m3 with scales [1] or [Hkv]."""
    if k_scale is v_scale is None and isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor):
        plain = k_cache.dtype == v_cache.dtype == q.dtype
        if plain and k_cache.device == v_cache.device == q.device:
            return  # what follows would take 1 us to say the same
    fp8 = isinstance(k_cache, Tensor) and k_cache.dtype in FP8
    caches = (("k_cache", k_cache), ("v_cache", v_cache))
    for (name, cache), scale in zip(caches, (k_scale, v_scale), strict=True):
        like(name, cache, "q", q, dtype=not fp8)
        if cache.dtype != k_cache.dtype:  # under autocast too, which casts no cache
            got, want = (str(c.dtype).removeprefix("torch.") for c in (cache, k_cache))
            raise TypeError(f"{name}: got dtype {got}, want k_cache's, {want}")
        if not fp8 and scale is None:
            continue
        scale_name = f"{name[0]}_scale"
        if not fp8:
            got = str(cache.dtype).removeprefix("torch.")
            raise ValueError(
                f"{scale_name}: got a scale for a {got} {name}, want None, or a float8_e4m3fn "
                f"{name}"
            )
        if scale is None:
            raise ValueError(
                f"{scale_name}: got None, want float32 [1] or [Hkv] for a float8_e4m3fn {name}"
            )
        has_dtype(scale_name, scale, FP32)
        like(scale_name, scale, "q", q, dtype=False)
        kv_heads = cache.shape[-2] if cache.dim() >= 4 else 1
        if scale.dim() != 1 or scale.shape[0] not in (1, kv_heads):
            raise ValueError(
                f"{scale_name}: got shape {list(scale.shape)}, want [1] or [Hkv] = [{kv_heads}]"
            )
        rows_contiguous(scale_name, scale)


def softmax_scale(value: float | None, d: int) -> float:
    """Return the value, checked, or 1 / sqrt(head_dim) for None."""
    if value is None:
        return 1.0 / math.sqrt(d)
    number("softmax_scale", value, 0.0, inclusive=False)
    return value
