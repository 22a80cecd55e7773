"""CUDA graphs of functions of fixed tensors: the first call warms up, the second one captures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import asked_for, choose

MOST_GRAPHS = 64  # of a decoder: new settings in each call would add graphs without end


class CudaGraph:
    """The kernels of a function of fixed tensors, replayed as one launch."""

    def __init__(self, shared: Any) -> None:
        self._stream, self._pool = shared
        self._graph = torch.cuda.CUDAGraph()

    @staticmethod
    def new_shared(device: torch.device) -> Any:
        """Return what graphs that run one at a time share: the capture's stream, with the workspace
        that cuBLAS keeps for it, and the memory pool."""
        return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Call function on the capture's stream. This compiles kernels and allocates the workspaces
        of libraries, neither of which may happen during a capture."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Record a call without computing it. replay() computes it into the returned tensor."""
        with torch.cuda.graph(
            self._graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # other threads may allocate meanwhile
        ):
            return function()

    def replay(self) -> None:
        self._graph.replay()


def cannot_capture(device: torch.device) -> str | None:
    """Return why a step cannot be captured now, or None."""
    if device.type != "cuda":
        return f"the model is on {device}, and CUDA graphs need a CUDA device"
    for op in ("attention_with_kvcache", "apply_rope_and_append"):
        if choose(op, device) == "reference":
            return f"{op} runs in eager PyTorch here, which waits for the device"
    return None


class Graphs:
    """The graphs captured over one decoder's tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warm: dict[Any, CudaGraph] = {}
        self._captured: dict[Any, tuple[CudaGraph, Tensor]] = {}
        self._shared: Any = None

    def __len__(self) -> int:
        return len(self._captured)

    def limit(self) -> None:
        """Drop all graphs if there are too many."""
        if len(self._captured) > MOST_GRAPHS:
            self._captured.clear()

    def run(self, what: Any, step: Callable[[], Tensor], kind: type[CudaGraph] | None) -> Tensor:
        """Run step(): the first call warms up, the second captures and replays a graph, and later
        ones replay it. what: all that its kernels depend on, besides the backends."""
        if kind is None:
            return step()
        key = what, asked_for()
        if key not in self._captured:
            if key not in self._warm:
                self._shared = self._shared or kind.new_shared(self._device)
                graph = kind(self._shared)
                result = graph.warm_up(step)
                self._warm[key] = graph  # only now: a call that fails is not a warm-up
                return result
            graph = self._warm.pop(key)
            # A capture creates tensors for torch's random numbers, which others change: they must
            # not be inference tensors.
            with torch.inference_mode(False):
                self._captured[key] = graph, graph.capture(torch.inference_mode()(step))
        graph, result = self._captured[key]
        graph.replay()
        return result
