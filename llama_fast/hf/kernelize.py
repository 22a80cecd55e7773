"""Layers for Hugging Face's `kernels` package, from this installation instead of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activation import silu_and_mul
from ..ops.rms_norm import rms_norm
from ..ops.rope import apply_rope
from .modules import rotations_table

DEVICES = ("cpu", "cuda")


class RMSNorm(nn.Module):
    """The forward of transformers' layers named "RMSNorm" whose weight multiplies."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class MLP(nn.Module):
    """The forward of layers named "MLP": down_proj(silu(gate_proj(x)) * up_proj(x))."""

    has_backward = True
    can_torch_compile = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(
            silu_and_mul(torch.cat((self.gate_proj(x), self.up_proj(x)), -1))
        )
        return out


class RotaryPosEmb(nn.Module):
    """The forward of the function named "rotary_pos_emb", a layer for `kernels`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rotate q [B, H, S, D] and k [B, Hkv, S, D] by cos and sin [B or 1, S, D]; unsqueeze_dim 2
        means [B, S, H, D]."""
        if unsqueeze_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        batch, seqlen = q.shape[:2]
        table, positions = rotations_table(cos, sin, batch)
        rotated = apply_rope(q.flatten(0, 1), k.flatten(0, 1), positions, table)
        q, k = (t.unflatten(0, (batch, seqlen)) for t in rotated)
        return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


class _Repository:
    """What `kernels` loads a layer from."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer = layer
        self.layer_name = self.func_name = layer.__name__

    def load(self) -> type[nn.Module]:
        return self.layer

    def __str__(self) -> str:
        return f"llama_fast, layer `{self.layer_name}`"


@contextmanager
def kernel_mapping() -> Iterator[None]:
    """Let `kernels.kernelize(model, mode=..., device="cpu" or "cuda")` use our layers within the
    block: RMSNorm, MLP (SwiGLU) and rotary_pos_emb, wherever a model has layers of these names.

    Neither the hub nor the network is used. Raises ImportError without the package `kernels`.
    """
    from importlib import import_module

    # By name: to a type checker in a checkout, `kernels` is the folder of Triton kernels.
    use_kernel_mapping = getattr(import_module("kernels"), "use_kernel_mapping", None)
    if use_kernel_mapping is None:
        raise ImportError("kernel_mapping: needs the package kernels (pip install kernels)")
    layers = {"RMSNorm": RMSNorm, "MLP": MLP, "rotary_pos_emb": RotaryPosEmb}
    mapping: dict[str, Any] = {
        name: dict.fromkeys(DEVICES, _Repository(layer)) for name, layer in layers.items()
    }
    with use_kernel_mapping(mapping, inherit_mapping=False):
        yield
