"""What the tests of the loop that runs ahead share: sampling's options, and the plain loop to
compare with. The fixture `ahead` (conftest.py) makes CPU tensors take a GPU's way."""

from __future__ import annotations

from typing import Any

import pytest

from llama_fast import Llama
from llama_fast.generation import generate

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "all": {"temperature": 1.0, "top_p": 1.0, "seed": 3},
    "top-p": {"temperature": 0.8, "top_p": 0.7, "seed": 4},
    "top-k": {"temperature": 1.2, "top_p": 1.0, "top_k": 20, "seed": 5},
    "both": {"temperature": 1.2, "top_p": 0.8, "top_k": 20, "seed": 6},
}


def plainly(model: Llama, *args: Any, **options: Any) -> list[list[int]]:
    """By the loop for CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_runs_ahead", lambda device: False)
        return model.generate(*args, **options)
