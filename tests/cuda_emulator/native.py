"""Call csrc/cuda in the emulator below the public ops: a test chooses out, strides and threads."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace

import pytest

from llama_fast import _cpu, cuda

SEEDS = (0, 1, 2)


def emulated() -> SimpleNamespace:
    """Return a function for each family, set_seed(n) for another order of threads, and `module`,
    the extension. Skip the test if it is not built or the cuda backend is not the emulated one."""
    if importlib.util.find_spec("llama_fast._cuda_emulated") is None:
        pytest.skip("needs llama_fast._cuda_emulated: configure with -DLLAMA_FAST_EMULATE=ON")
    if not cuda.EMULATED:
        pytest.skip("needs LLAMA_FAST_CUDA_EMULATOR=1")
    module = importlib.import_module("llama_fast._cuda_emulated")
    module.set_seed(0)
    families = {family: getattr(cuda, family) for family in _cpu.families}
    return SimpleNamespace(**families, set_seed=module.set_seed, module=module)
