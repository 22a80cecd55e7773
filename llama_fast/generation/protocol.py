"""The interface of a model for generation. model.Llama implements it and imports from here."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checkpoint.weights import Weights
from ..config import LlamaConfig
from ..parallel import Group
from .cache import Append, KVCache


@runtime_checkable
class Model(Protocol):
    config: LlamaConfig
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    decoders: list[Any]  # decode.Decoder, idle, for the next call
    tp: Group

    def __call__(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor: ...
    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        last: bool = False,
    ) -> Tensor: ...
    def embed(self, tokens: Tensor) -> Tensor: ...
    def lookup(self, tokens: Tensor) -> Tensor: ...
    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: KVCache | None = None,
        append: Append | None = None,
        last: bool = False,
    ) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
