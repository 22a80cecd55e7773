"""Check prompts, token ids and counts before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from ..config import LlamaConfig
from ..rope_scaling import shown


def check_prompt(
    index: int, prompt: Any, config: LlamaConfig, max_new_tokens: int = 0
) -> list[int]:
    """Return a prompt's ids. Raises TypeError or ValueError if they don't fit the model."""
    ids, vocab = token_ids(f"prompt {index}", prompt), config.vocab_size
    if not ids:
        raise ValueError(f"prompt {index}: is empty; want at least one token id, such as BOS")
    for token in ids:
        if not 0 <= token < vocab:
            raise ValueError(f"prompt {index}: got id {shown(token)}, want 0 to {vocab - 1}")
    limit = config.max_position_embeddings
    if len(ids) + max_new_tokens > limit:
        new = f" and max_new_tokens={shown(max_new_tokens)}" if max_new_tokens > 0 else ""
        raise ValueError(
            f"prompt {index}: {len(ids)} tokens{new} exceed the model's {limit} positions"
        )
    return ids


def token_ids(name: str, ids: Any) -> list[int]:
    """Return ids, a sequence, tensor or array of integers, as a list of Python's."""
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"{name}: got {type(ids).__name__}, want a list of token ids")
    for token in ids:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise TypeError(f"{name}: got {shown(token)}, want a list of token ids")
    return [int(token) for token in ids]


def check_count(name: str, value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}: got {shown(value)}, want an integer of at least 0")
    return int(value)
