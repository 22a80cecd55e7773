"""The modules of an accelerated model: transformers' own, each with a class that derives from its
original one. Names of classes, submodules, parameters and state dict entries stay the same.

A call of an unusual form, or one whose weights are being trained, goes through the original
forward.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import activation, rms_norm, rope
from ..ops.checks import ACTIVATIONS
from .attention import NAME, attend
from .linears import Fused, hooked, trained

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


def swap(module: nn.Module, mixin: type) -> None:
    """Give a module of transformers' a class derived from mixin and its own."""
    base: Any = type(module)
    module.__class__ = _derived(mixin, base)


def original(module: nn.Module) -> type | None:
    """Return the class that a module had before `swap`, or None."""
    return getattr(type(module), "_llama_fast_original", None)


@functools.cache
def _derived(mixin: type, base: type) -> Any:
    # accelerate and FSDP find layers by the names of their classes.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), {**names, "_llama_fast_original": base})


def _rebuild(mixin: type, base: type) -> nn.Module:
    cls = _derived(mixin, base)
    module: nn.Module = cls.__new__(cls)
    return module


class Swapped(_Base):
    """Lets modules of a derived class be copied and pickled, which otherwise needs its name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, base = type(self).__bases__
        state = {k: v for k, v in self.__dict__.items() if k != "_fused"}
        return _rebuild, (mixin, base), state


class Fusing(Swapped):
    """A module whose linears `together` share one input."""

    together: tuple[str, ...] = ()
    _fused: Fused | None

    def fuse(self) -> str | None:
        """Fuse the linears, or return why not."""
        parts = {name: self._modules[name] for name in self.together}
        why = Fused.why_not(parts)
        self._fused = Fused(parts) if why is None else None
        return why

    def fused(self, x: Tensor) -> Fused | None:
        """Return the fused linears if they can replace the separate calls on x now, or None."""
        fused = self.__dict__.get("_fused")
        if fused is None or fused.ready(self, x):
            return fused
        if not torch.compiler.is_compiling() and trained(fused._parts[0][1].weight):
            fused.unpack()
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._fused = None  # before the weights move, or there would be two copies
        super()._apply(fn, recurse)
        self.fuse()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.fuse()


class RMSNorm(Swapped):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _fits(hidden_states, self.weight):
            out: Tensor = super().forward(hidden_states)
            return out
        return rms_norm.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class MLP(Fusing):
    together = ("gate_proj", "up_proj")
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.fused(x)
        if gate_up is None:
            out: Tensor = super().forward(x)
            return out
        return self.down_proj(activation.silu_and_mul(gate_up(x)))


class Rotations(tuple[Tensor, Tensor]):
    """(cos, sin) as transformers' layers take them, and rope_table's form of them. What rebuilds a
    tuple of its elements, as FSDP does, drops the latter."""

    table: Tensor  # fp32 [B or 1 * S, D]
    positions: Tensor  # [B * S], of the tokens in table


class RotaryEmbedding(Swapped):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
            cos, sin = super().forward(x, position_ids)
            return cos, sin
        # The parent rounds to the dtype of its argument.
        cos, sin = super().forward(x.new_empty((0,), dtype=torch.float32), position_ids)
        out = Rotations((cos.to(x.dtype), sin.to(x.dtype)))
        out.table, out.positions = rotations_table(cos, sin, x.shape[0])
        return out


def rotations_table(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return rope_table's form of cos and sin [B or 1, S, D], and B * S positions in it."""
    half = cos.shape[-1] // 2
    table = torch.cat((cos[..., :half], sin[..., :half]), dim=-1).float().flatten(0, 1)
    positions = torch.arange(table.shape[0], device=table.device)
    if cos.shape[0] == batch:
        return table, positions
    return table, positions.expand(batch, -1).flatten()


class Attention(Fusing):
    together = ("q_proj", "k_proj", "v_proj")
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float
    config: Any
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        qkv = self.fused(hidden_states)
        if (
            qkv is None
            or args
            or "past_key_value" in kwargs  # the name before 4.57
            or self.config._attn_implementation != NAME
        ):
            return super().forward(hidden_states, *args, **kwargs)
        rotations = kwargs.pop("position_embeddings")
        mask = kwargs.pop("attention_mask", None)
        cache = kwargs.pop("past_key_values", None)
        named_cache = "cache" in kwargs  # since 5.24
        if named_cache:
            cache = kwargs.pop("cache")
        shape = hidden_states.shape[:2]
        heads = qkv(hidden_states).view(shape.numel(), -1, self.head_dim)
        q, k, v = heads.split([n // self.head_dim for n in qkv.out_features], dim=1)
        if "q_norm" in self._modules:
            q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(rotations, Rotations) and hasattr(rotations, "table"):
            table, positions = rotations.table, rotations.positions
        else:
            cos, sin = rotations
            table, positions = rotations_table(cos, sin, shape[0])
        q, k = rope.apply_rope(q, k, positions, table)
        # The cache and the attention functions take [B, heads, S, D].
        q, k, v = (t.view(*shape, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            if "cache_position" in kwargs:
                at = {"cache_position": kwargs["cache_position"]}
                k, v = cache.update(k, v, self.layer_idx, at)
            elif named_cache:
                k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
            else:
                k, v = cache.update(k, v, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*shape, -1)), weights


class DecoderLayer(Swapped):
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: RMSNorm
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            return super().forward(hidden_states, *args, **kwargs)
        norm = self.post_attention_layernorm
        x, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if hooked(norm) or x.dtype != hidden_states.dtype or not _fits(x, norm.weight):
            residual = hidden_states + x
            x = norm(residual)
        else:
            eps = norm.variance_epsilon
            x, residual = rms_norm.add_rms_norm(x, hidden_states, norm.weight, eps)
        return residual + self.mlp(x)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype in ACTIVATIONS
