"""What takes the place of a valid argument, by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


class Subclass(Tensor):
    """A tensor whose class PyTorch does not know."""


def _tensors(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """Return change for tensors; what it cannot change, and other arguments, become a string."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
                return change(value)
        return "wrong"

    return changed


def _filled(value: float) -> Callable[[Any], Any]:
    """Return a function that puts value, if the dtype has it, in the middle of a copy."""

    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[t.numel() // 2] = value
        return t

    return _tensors(change)


WRONG: dict[str, Callable[[Any], Any]] = {
    **{
        repr(v): lambda _, v=v: v
        for v in (None, True, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, -0.0)
    },
    "10**5000": lambda _: 10**5000,  # whose repr raises ValueError
    **{repr(v): lambda _, v=v: v for v in (math.nan, math.inf, -math.inf, 5e-324, 1e-40, 1e300)},
    **{repr(v): lambda _, v=v: v for v in ("x", b"x", [], [1.0], {}, torch.float32)},
    "complex": lambda _: 1j,
    "numpy int": lambda _: np.int64(1),
    "numpy float": lambda _: np.float32(1.0),
    "numpy double": lambda _: np.float64(1.0),
    "numpy bool": lambda _: np.bool_(True),
    "object": lambda _: object(),
    "lambda": lambda _: len,
    "to list": _tensors(lambda t: t.tolist()),
    "to numpy": _tensors(lambda t: t.float().numpy()),
    "coo": _tensors(lambda t: t.to_sparse()),
    "csr": _tensors(lambda t: t.to_sparse_csr()),
    "csc": _tensors(lambda t: t.to_sparse_csc()),
    "bsr": _tensors(lambda t: t.to_sparse_bsr((1, 1))),
    "mkldnn": _tensors(lambda t: t.to_mkldnn()),
    "nested": _tensors(lambda t: torch.nested.nested_tensor(list(t))),
    "jagged": _tensors(lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged)),
    "meta": _tensors(lambda t: t.to("meta")),
    "quantized": _tensors(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
    "conj": _tensors(lambda t: t.to(torch.complex64).conj()),
    "neg": _tensors(torch._neg_view),
    "zero tensor": _tensors(lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)),
    "subclass": _tensors(lambda t: t.as_subclass(Subclass)),
    "parameter": _tensors(lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point())),
    "scalar": _tensors(lambda t: t.new_ones(())),
    "one more": _tensors(lambda t: torch.cat([t, t[:1]])),
    "one less": _tensors(lambda t: t[1:]),
    "narrow": _tensors(lambda t: t[..., :-1]),
    "dense narrow": _tensors(lambda t: t[..., :-1].contiguous()),
    "empty": _tensors(lambda t: t[..., :0]),
    "unsqueezed": _tensors(lambda t: t[None]),
    "squeezed": _tensors(lambda t: t[0]),
    "flat": _tensors(lambda t: t.reshape(-1)),
    "transposed": _tensors(lambda t: t.transpose(0, -1)),
    "k_cache": lambda _: None,  # the case's own, see Arguments
    "columns apart": _tensors(lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    "expanded": _tensors(lambda t: t[:1].expand(t.shape)),
    "one for all": _tensors(lambda t: t.as_strided(t.shape, [0] * t.dim())),
    "huge": _tensors(lambda t: t[:1].expand(2**40, *t.shape[1:])),
    **{
        str(d): _tensors(lambda t, d=d: t.to(d))
        for d in (BF16, F16, F32, torch.float64, FP8, torch.float8_e5m2, torch.int8, torch.uint8)
    },
    **{str(d): _tensors(lambda t, d=d: t.to(d)) for d in (torch.int32, torch.int64, torch.bool)},
    **{f"has {v}": _filled(v) for v in (-1, -2, 0, 41, 2**31 - 1, -(2**31), 2**62, math.nan)},
}
