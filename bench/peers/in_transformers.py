"""Run transformers as a ModelPeer, as it is or with a peer's kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..timing import Run
from . import CHUNK, ModelPeer


class Transformers(ModelPeer):
    """A transformers model. around: a context for each computation, for changes that would
    otherwise affect all models."""

    def __init__(
        self,
        label: str,
        model: Any,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.label, self._model, self._around = label, model, around
        self._contexts: dict[Any, Any] = {}

    def logits(self, tokens: Tensor) -> Tensor:
        return self._run(tokens, use_cache=False).float().cpu()

    def after(self, context: Tensor, tokens: Tensor, times: int) -> Run:
        past = self._past(context)

        def run(_: int) -> Tensor:
            _rewind(past, context.shape[1])
            for _ in range(times):
                logits = self._step(tokens, past)
            return logits

        return run

    def _past(self, context: Tensor) -> Any:
        """Return a cache that holds the context; each round first rewinds it to that."""
        from transformers import DynamicCache

        key = (tuple(context.shape), *context.flatten().tolist())
        if key not in self._contexts:
            past = self._contexts[key] = DynamicCache(config=self._model.config)
            for part in context.split(CHUNK, dim=1) if context.shape[1] else ():
                self._step(part, past)
        return self._contexts[key]

    def _step(self, tokens: Tensor, past: Any) -> Tensor:
        return self._run(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)[:, -1]

    def weight_bytes(self) -> int:
        """Return the bytes of the linear layers' weights, counting the parts of quantized ones."""
        linears = [m for m in self._model.modules() if isinstance(m, nn.Linear)]
        return sum(_bytes(m.weight) for m in linears)

    def close(self) -> None:
        self._contexts.clear()
        self._model = None

    def _run(self, tokens: Tensor, **options: Any) -> Tensor:
        with torch.inference_mode(), self._around():
            return self._model(tokens, **options).logits


def exchanged(
    label: str,
    hf_model: Any,
    change: Callable[[Any], None],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Transformers:
    """Return a copy of hf_model that `change` has changed."""
    model = copy.deepcopy(hf_model)
    change(model)
    return Transformers(label, model, around)


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """Use transformers' "sdpa" or "eager" attention within the block."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _rewind(past: Any, tokens: int) -> None:
    """Keep the first tokens of a transformers cache. Only negative counts mean the same in every
    version of crop."""
    beyond = past.get_seq_length() - tokens
    if beyond > 0:
        past.crop(-beyond)


def _bytes(weight: Tensor) -> int:
    flatten = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        return weight.nbytes
    return sum(_bytes(getattr(weight, name)) for name in flatten()[0])
