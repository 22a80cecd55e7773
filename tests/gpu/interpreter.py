"""Adapt Triton's interpreter to these tests: products whose bits repeat, and half of its overhead.

The interpreter passes a product to numpy's matmul and so to a BLAS, whose kernels for Haswell and
Zen give a row other bits at another place of its tile. A GPU does not, and tests require that it
does not. Here a product is summed in the order of k at any place.

For each launch the interpreter replaces the functions of triton.language by its own and restores
them afterwards. To find them it inspects every name there, 4 ms a launch. It repeats this before
each call of a helper inside a kernel, although everything is in place.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a @ b, summed in fp64 and rounded once: einsum adds in the order of k as long as both
    operands lie row by row. A chain of fp32 sums would be less exact than a GPU's fma."""
    a, b = (np.ascontiguousarray(t, np.float64) for t in (a, b))
    return np.einsum("...mk,...kn->...mn", a, b).astype(dtype)


@functools.cache
def _builtins(owner: ModuleType | type) -> list[tuple[str, Any]]:
    """List owner's functions that the interpreter replaces. Call this before it replaces any."""
    members = inspect.getmembers(owner)
    return [(name, member) for name, member in members if tl.core.is_builtin(member)]


def _patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(owner):
        interpreter._patch_attr(owner, name, member, builder, scope)


def install() -> None:
    """Change the interpreter for the rest of the process."""
    original = interpreter._patch_lang

    def patch_lang(fn: Any) -> Any:
        """Do nothing if all that fn sees of triton.language is already replaced."""
        seen = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
        if seen and not any(tl.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return original(fn)

    interpreter.np = SimpleNamespace(**{**vars(np), "matmul": _matmul})
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = patch_lang
