"""Find what the emulator's tests need: a C++ compiler and the CUDA toolkit's headers."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest


def cxx() -> list[str]:
    named = os.environ.get("CXX")
    return shlex.split(named) if named else [shutil.which("g++") or "c++"]


def cuda_include() -> Path:
    """Return the folder of cuda_bf16.h, or skip the test and say why."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    candidates += [Path(nvcc).resolve().parent.parent] if nvcc else []
    candidates += [Path("/usr/local/cuda")]
    for root in candidates:
        if (root / "include" / "cuda_bf16.h").exists():
            return root / "include"
    pytest.skip("needs the CUDA toolkit's headers (cuda_bf16.h): set CUDA_HOME")
