"""Apply a CUDA graph's rules to CPU tensors, for tests of code that is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Ops that make the host wait. A capture refuses them.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


class RecordedGraph:
    """Replace graphs.CudaGraph. capture() records every op with its tensors and leaves no trace in
    memory. replay() runs those ops on the same tensors without the captured function's Python. A
    function that makes a new tensor instead of using a fixed one, or that lets the host decide,
    gives stale results here, as on a GPU."""

    made: list[RecordedGraph] = []  # tests read and clear it

    def __init__(self, shared: Any) -> None:
        assert shared == "shared"
        self.ops: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = self.warm_ups = 0
        self.made.append(self)

    @staticmethod
    def new_shared(device: torch.device) -> str:
        return "shared"

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        self.warm_ups += 1
        return function()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        assert self.warm_ups == 1 and not self.ops
        # Otherwise torch's state of random numbers would be an inference tensor, for all graphs.
        assert not torch.is_inference_mode_enabled()
        with _Recorder(self.ops) as recorder:
            result = function()
        with torch.inference_mode():
            for changed, before in recorder.before.values():
                changed.copy_(before)
            # A capture computes nothing.
            result.fill_(torch.nan if result.is_floating_point() else -(2**40))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        assert self.ops
        self.replays += 1
        for op, args, kwargs, outputs in self.ops:
            again = [t for t in tree_flatten(op(*args, **kwargs))[0] if isinstance(t, Tensor)]
            for output, value in zip(outputs, again, strict=True):
                if output.data_ptr() != value.data_ptr():
                    output.copy_(value)


class _Recorder(TorchDispatchMode):
    def __init__(self, ops: list[tuple[Any, Any, Any, list[Tensor]]]) -> None:
        super().__init__()
        self.ops = ops
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # earlier contents, by storage
        self._made: set[int] = set()  # storages that the capture itself allocated

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(op.name().split("::")[1].startswith(name) for name in _WAITS):
            raise RuntimeError(f"{op.name()} during a capture: the host would wait")
        for argument, value in zip(op._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        result = op(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        self._made |= {_storage(t) for t in outputs} - {_storage(t) for t in inputs}
        self.ops.append((op, args, kwargs, outputs))
        return result

    def _keep(self, t: Tensor) -> None:
        storage = _storage(t)
        if storage not in self.before and storage not in self._made:
            whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
            self.before[storage] = whole, whole.clone()


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
