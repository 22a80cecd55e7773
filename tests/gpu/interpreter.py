"""Triton's interpreter, without half of its work.

For a launch it puts its own functions in place of triton.language's, and takes them out again
afterwards. Which they are it finds by looking at every name there, 4 ms a launch; and before each
call of a helper inside a kernel it does the same again, to no effect: everything is in place.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtins(owner: ModuleType | type) -> list[tuple[str, Any]]:
    """owner's functions that the interpreter replaces; asked for while none of them is."""
    members = inspect.getmembers(owner)
    return [(name, member) for name, member in members if tl.core.is_builtin(member)]


def _patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(owner):
        interpreter._patch_attr(owner, name, member, builder, scope)


def speed_up() -> None:
    """For the rest of the process."""
    original = interpreter._patch_lang

    def patch_lang(fn: Any) -> Any:
        """Nothing where all that fn sees of triton.language is in place already."""
        seen = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
        if seen and not any(tl.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return original(fn)

    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = patch_lang
