"""Config, prompts and sampling options for tests of generation. The fixture `ahead` (conftest.py)
sends CPU tensors along the path of a GPU; plainly() is the loop to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llama_fast import Llama, LlamaConfig
from llama_fast.generation import generate, sampling

CONFIG = LlamaConfig(320, 128, 192, 2, 8, 2, 16, max_position_embeddings=4096, eos_token_id=(2,))

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "all": {"temperature": 1.0, "top_p": 1.0, "seed": 3},
    "top-p": {"temperature": 0.8, "top_p": 0.7, "seed": 4},
    "top-k": {"temperature": 1.2, "top_p": 1.0, "top_k": 20, "seed": 5},
    "both": {"temperature": 1.2, "top_p": 0.8, "top_k": 20, "seed": 6},
    "min-p": {"temperature": 1.0, "top_p": 1.0, "min_p": 0.1, "seed": 7},
    "top-p and min-p": {"temperature": 1.1, "top_p": 0.9, "min_p": 0.05, "seed": 8},
    "penalty": {"temperature": 0, "repetition_penalty": 1.3},
    "all penalized": {"temperature": 1.0, "repetition_penalty": 1.3, "min_p": 0.05, "seed": 9},
}


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(3, 320, (n,)).tolist() for n in lengths]


def plainly(model: Llama, *args: Any, **options: Any) -> list[list[int]]:
    """Call model.generate() with the loop for CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_runs_ahead", lambda device: False)
        return model.generate(*args, **options)


def draw_these(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Make sampling draw these tokens, after the model has computed as usual; then Ctrl-C."""
    tokens = iter(ids)

    def draw(*_: Any) -> int:
        try:
            return next(tokens)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(sampling, "sample", draw)
