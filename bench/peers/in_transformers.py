"""A transformers model with a peer's parts in it, as a ModelPeer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .peer import Run


class InTransformers:
    """A copy of hf_model, changed in place by `change`. `around` holds while it computes, for what
    a peer can only change for every model at once."""

    def __init__(
        self,
        label: str,
        hf_model: Any,
        change: Callable[[Any], None],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.label = label
        self._around = around
        self._model = copy.deepcopy(hf_model)
        change(self._model)

    def logits(self, tokens: Tensor) -> Tensor:
        return self._run(tokens, use_cache=False).float().cpu()

    def prefill(self, tokens: Tensor) -> Run:
        return lambda _: self._run(tokens, use_cache=True, logits_to_keep=1)[:, -1]

    def decode(self, context: Tensor, steps: int) -> Run:
        with torch.inference_mode(), self._around():
            past = self._model(context, use_cache=True, logits_to_keep=1).past_key_values
        token = context[:, -1:]

        def run(_: int) -> Tensor:
            for _ in range(steps):
                logits = self._run(token, past_key_values=past, use_cache=True)
            past.crop(-steps)
            return logits[:, -1]

        return run

    def weight_bytes(self) -> int:
        """A quantised weight is a tensor of its own kind, whose parts are counted."""
        linears = [m for m in self._model.modules() if isinstance(m, nn.Linear)]
        return sum(_bytes(m.weight) for m in linears)

    def close(self) -> None:
        self._model = None

    def _run(self, tokens: Tensor, **options: Any) -> Tensor:
        with torch.inference_mode(), self._around():
            return self._model(tokens, **options).logits


def _bytes(weight: Tensor) -> int:
    flatten = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        return weight.nbytes
    return sum(_bytes(getattr(weight, name)) for name in flatten()[0])
