"""Show, on a CPU, a mistake that only a GPU would show: a test's tensors that are not on its
device.

Within OtherDevice a tensor is on the device if it was made there (device=...), moved there (.to),
or computed from one that is; .cpu() takes it back. An op over both kinds raises, as torch does, and
so does an op of ours over a tensor that is not on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Ops that torch runs on tensors of either device, or that move tensors between them.
_MIXES = {"__getitem__", "__setitem__", "copy_", "to", "type_as", "cpu", "as_tensor", "__get__"}
_HOME = {"cpu", "tolist", "numpy", "item"}


def _is_on(t: Tensor) -> bool:
    return getattr(t, "_on_device", False)


class OtherDevice(TorchFunctionMode):
    """Keep, on every tensor that passes, an attribute that says whether it is on the device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on = [_is_on(t) for t in inputs]
        off = [list(t.shape) for t in inputs if t.dim() and not _is_on(t)]
        if off and (str(func).startswith("llama_fast.") or (any(on) and name not in _MIXES)):
            raise RuntimeError(f"{func}: got tensors of shapes {off} that are not on the device")
        result = func(*args, **kwargs)
        named = kwargs.get("device", next((a for a in args if isinstance(a, torch.device)), None))
        if name in _HOME:
            placed = False
        elif named is not None:
            placed = named != "cpu"
        else:
            placed = on[0] if name in ("copy_", "__getitem__", "__setitem__") and on else any(on)
        if (
            isinstance(result, Tensor)
            and _is_on(result) != placed
            and any(result is t for t in inputs)
        ):
            result = result.detach()
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                t._on_device = placed  # type: ignore[attr-defined]
        return result
