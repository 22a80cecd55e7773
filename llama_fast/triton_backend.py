"""The triton backend: the kernels of kernels/, and the configurations stored for them."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from torch import Tensor

from . import _cpu
from .kernels import common

for _family in _cpu.families:
    globals()[_family] = getattr(import_module(f".kernels.{_family}", __package__), _family)


def prefers_fp8_activations(x: Tensor) -> bool:
    """Return whether fp8_linear quantizes x by default: on chips that multiply e4m3, for every
    number of rows, so that a row does not depend on the batch."""
    return common.chip_of(x).has_e4m3


def tuned_folder() -> Path:
    """Return the folder of the user's configurations: LLAMA_FAST_TUNED, or in the cache."""
    named = os.environ.get("LLAMA_FAST_TUNED")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "llama_fast" / "tuned"


# The package's configurations first, then the user's, which replace them.
common.load_choices(Path(__file__).parent / "tuned", tuned_folder())
