"""csrc/cuda in the emulator, called past the public ops: a test chooses out, strides, threads."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest

from llama_fast.native import Native

SEEDS = (0, 1, 2)


def emulated() -> Any:
    """The ops; set_seed(n) for another order of threads. Skips where the module was not built."""
    if importlib.util.find_spec("llama_fast._cuda_emulated") is None:
        pytest.skip("needs llama_fast._cuda_emulated: configure with -DLLAMA_FAST_EMULATE=ON")
    module = importlib.import_module("llama_fast._cuda_emulated")
    module.set_seed(0)
    native: Any = Native(module, lambda _: (0, 0))
    native.set_seed = module.set_seed
    native.module = module
    return native
