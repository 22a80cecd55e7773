"""Adapt Triton's interpreter to these tests: products whose bits repeat, at 40% of its time.

The interpreter passes a product to numpy's matmul and so to a BLAS, whose kernels for Haswell and
Zen give a row other bits at another place of its tile. A GPU does not, and tests require that it
does not. Here a product is summed in the order of k at any place.

The rest changes no result. Tiles are small in tests, and the time goes to the Python around numpy:

- For each launch the interpreter replaces the functions of triton.language by its own and restores
  them afterwards. To find them it inspects every name there, 4 ms a launch. It repeats this before
  each call of a helper inside a kernel, although everything is in place.
- It computes each sum, difference, and product of integers again in int64, to find an overflow for
  an assertion that it then leaves out.
- It creates a new type for each value and computes the value's shape from it three times. It
  compares two operands of the same shape size by size.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
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


def _patch_lang_once() -> None:
    original = interpreter._patch_lang

    @functools.cache
    def modules(fn: Any) -> list[ModuleType]:
        return [m for m in fn.__globals__.values() if m is tl or m is tl.core]

    def patch_lang(fn: Any) -> Any:
        """Do nothing if all that fn sees of triton.language is already replaced."""
        seen = modules(fn)
        if seen and not any(tl.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return original(fn)

    interpreter._patch_lang = patch_lang
    interpreter._patch_builtin = _patch_builtin


def _skip_sanitizer() -> None:
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # else device_assert looks at what the sanitizer finds
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _kept_in_type(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep function(type) as an attribute of the type, which is slow to hash or cannot be."""
    name = f"_kept_{function.__name__}"

    def kept(type_: Any) -> Any:
        attributes = vars(type_)
        if name not in attributes:
            attributes[name] = function(type_)
        return attributes[name]

    return kept


def _same_or(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other or equal(self, other)


def _reuse_types() -> None:
    """Make one block type for an element type and a shape, and read a tensor's shape from it."""
    block_type, tensor = tl.core.block_type, tl.core.tensor
    shapes: dict[tuple[int, ...], Any] = {}
    to_ir, init_block, init_tensor = block_type.to_ir, block_type.__init__, tensor.__init__

    def new(cls: type, element_ty: Any, shape: Any) -> Any:
        known = vars(element_ty).setdefault("_kept_blocks", {})
        sizes = getattr(shape, "values", shape)  # of a tl.tuple
        key = tuple([s.value if isinstance(s, tl.constexpr) else s for s in sizes])
        if key not in known:
            known[key] = block = object.__new__(cls)
            init_block(block, element_ty, shape)
            block.shape = shapes.setdefault(key, block.shape)
        return known[key]

    def block_to_ir(self: Any, builder: Any) -> Any:
        return self if builder is interpreter.interpreter_builder else to_ir(self, builder)

    @_kept_in_type
    def attributes(type_: Any) -> dict[str, Any]:
        sample = tensor.__new__(tensor)
        init_tensor(sample, None, type_)
        return vars(sample)

    def init(self: Any, handle: Any, type: Any) -> None:
        vars(self).update(attributes(type))
        self.handle = handle

    block_type.__new__ = new
    block_type.__init__ = lambda self, element_ty, shape: None
    block_type.to_ir = block_to_ir
    tensor.__init__ = init
    for owner in (tl.core.dtype, tl.core.pointer_type, block_type):
        owner.__eq__ = _same_or(owner.__eq__)
    interpreter._get_np_dtype = _kept_in_type(interpreter._get_np_dtype)


def _pass_equal_shapes() -> None:
    """Return two operands at once that need no broadcast."""
    semantic = type(interpreter.interpreter_semantic)
    original = semantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if getattr(lhs.type, "shape", None) is getattr(rhs.type, "shape", None):
            return lhs, rhs
        return original(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value


def install() -> None:
    """Change the interpreter for the rest of the process."""
    interpreter.np = SimpleNamespace(**{**vars(np), "matmul": _matmul})
    _patch_lang_once()
    _skip_sanitizer()
    _reuse_types()
    _pass_equal_shapes()
