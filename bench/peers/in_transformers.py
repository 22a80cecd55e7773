"""A transformers model with a peer's parts in it, as a ModelPeer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .peer import CHUNK, Run


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

    def extend(self, context: Tensor, tokens: Tensor) -> Run:
        return self._after(context, lambda step: step(tokens))

    def decode(self, context: Tensor, steps: int) -> Run:
        token = context[:, -1:]
        return self._after(context, lambda step: [step(token) for _ in range(steps)][-1])

    def _after(self, context: Tensor, work: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Run:
        """A run of work, which is handed what processes more tokens and gives their last logits."""
        past = DynamicCache(config=self._model.config)

        def step(tokens: Tensor) -> Tensor:
            return self._run(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)[:, -1]

        def run(_: int) -> Tensor:
            beyond = past.get_seq_length() - context.shape[1]
            if beyond > 0:
                past.crop(-beyond)  # a negative count means the same in every version
            return work(step)

        for part in context.split(CHUNK, dim=1) if context.shape[1] else ():
            step(part)
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
