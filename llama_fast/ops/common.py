"""Shared by all families: registration with torch.library, output allocation, a check of values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _cpu

_lib = torch.library.Library("llama_fast", "DEF")
_AUTOCAST = {
    "CPU": torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU),
    "CUDA": torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA),
}


def register(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: Callable[..., Sequence[Any]] = lambda dtype, *arguments: arguments,
) -> Callable[..., Any]:
    """Register an op and return the function that calls it.

    impl serves CPU and CUDA tensors; fake returns empty outputs. setup(ctx, inputs, output) and
    backward(ctx, *gradients) are the gradient's formula, as in torch.library.register_autograd;
    without them the backward pass raises NotImplementedError. autocast(dtype, *arguments) returns
    the arguments cast for torch.autocast; the op itself then runs outside autocast.

    A call through Library.define and impl costs about 2 us; torch.library.custom_op costs 5 to 15.
    An autograd formula costs 4.5 us more in each call outside inference_mode. So the op has two
    overloads: `default` with the formula, and `no_grad`, for calls that autograd would not record.
    """
    name, arguments = schema.split("(", 1)
    names = (name, f"{name}.no_grad")
    for overload in names:
        _lib.define(f"{overload}({arguments}", tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"llama_fast::{overload}", fake, lib=_lib)
    packet = getattr(torch.ops.llama_fast, name)
    default, no_grad = packet.default, packet.no_grad
    for overload, call in zip(names, (default, no_grad), strict=True):
        for lazy in ("ZeroTensor", "Negative"):
            _lib.impl(overload, _with_memory(call), lazy)
        for device, keys in _AUTOCAST.items():
            _lib.impl(overload, impl, device)
            _lib.impl(overload, _casting(call, autocast, device, keys), f"Autocast{device}")
    if backward is not None:
        torch.library.register_autograd(
            f"llama_fast::{name}", backward, setup_context=setup, lib=_lib
        )
    else:
        _lib.impl(name, _without_backward(name, no_grad), "Autograd")

    def op(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return default(*args)
        return no_grad(*args)

    return op


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raise in forward-mode differentiation, where PyTorch would return no tangent, or 0."""
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(f"{name}: has no forward-mode derivative")


def _casting(
    op: Callable[..., Any], rule: Callable[..., Sequence[Any]], device: str, keys: Any
) -> Callable[..., Any]:
    """Return the kernel that casts under autocast. torch.library.register_autocast would cast every
    floating-point argument: FP8 weights and fp32 scales too."""

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*rule(torch.get_autocast_dtype(device.lower()), *args))

    return kernel


def _with_memory(op: Any) -> Callable[..., Any]:
    """Return the kernel for tensors whose memory does not hold their values: autograd's zeros, and
    views that are negated when read. PyTorch's own fallbacks expand a scalar to the zeros' shape,
    past whose end kernels would read, and fail after an op has written its other arguments."""

    def kernel(*args: Any) -> Any:
        given = []
        for value, argument in zip(args, op._schema.arguments, strict=True):
            if isinstance(value, Tensor) and (value._is_zerotensor() or value.is_neg()):
                if argument.alias_info is not None:
                    kind = "zero" if value._is_zerotensor() else "lazily negated"
                    raise TypeError(f"{argument.name}: got a {kind} tensor, want one to write into")
                value = with_values(value)
            given.append(value)
        return op(*given)

    return kernel


def with_values(t: Tensor) -> Tensor:
    """Return a tensor whose memory holds the values of such a tensor."""
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    if t.dtype == torch.float8_e4m3fn:  # for which PyTorch has no negation
        return torch._neg_view(t).view(torch.uint8).bitwise_xor(0x80).view(t.dtype)
    return t.resolve_neg()


def _without_backward(name: str, no_grad: Any) -> Callable[..., Any]:
    """Return the autograd kernel of an op whose gradient is not defined: it computes, and backward
    raises. Without it, PyTorch would only warn and leave gradients out."""
    written = [i for i, a in enumerate(no_grad._schema.arguments) if a.alias_info is not None]

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return no_grad(*args)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError(
                f"{name}: has no gradient; call it under torch.no_grad(), or detach its inputs"
            )

    def kernel(*args: Any) -> Any:
        for i in written:
            if torch.is_grad_enabled() and args[i].requires_grad:
                argument = no_grad._schema.arguments[i].name
                raise ValueError(f"{argument}: requires grad, but {name} writes into it")
        return NoBackward.apply(*args)

    return kernel


def as_rows(t: Tensor) -> Tensor:
    """Return t [..., n] as [rows, n]: a view where strides allow, else a copy."""
    return t if t.dim() == 2 else torch.atleast_2d(t).flatten(0, -2)  # -1 fails for n = 0


def new(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty contiguous tensor of t's shape, of t's dtype unless another is given."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def new_scale(t: Tensor) -> Tensor:
    """Return an empty fp32 [rows, 1]."""
    return t.new_empty((t.numel() // t.shape[-1], 1), dtype=torch.float32)


def wide(t: Tensor) -> Tensor:
    """Return t in fp32, or in fp64 if it is fp64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


_MAPPED = 32 << 20  # bytes: above this glibc maps every allocation (M_MMAP_THRESHOLD's maximum)


def with_huge_pages(out: Tensor) -> Tensor:
    """Request huge pages for out, newly allocated, if it is large and on a CPU, and return it.

    The first write to each page is a page fault; for a large output these take longer than the op.
    """
    if out.nbytes >= _MAPPED and out.is_cpu:
        _cpu.advise_huge_pages(out)
    return out


def check_range(name: str, t: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless every integer in t, contiguous, is in [low, high]. CPU only: on a GPU
    this would synchronize."""
    if not t.is_cpu:
        return
    bad = _cpu.first_outside(t, low, high)
    if bad >= 0:
        raise ValueError(
            f"{name}: got {t.reshape(-1)[bad].item()} at index {bad}, want {low} to {high}"
        )
