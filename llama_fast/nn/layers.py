"""The layers of a Llama, with the names that Hugging Face's state dicts have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activation import silu_and_mul
from ..ops.attention import attention
from ..ops.decode_attention import attention_with_kvcache
from ..ops.rms_norm import add_rms_norm, rms_norm
from ..ops.rope import Scaling, apply_rope, apply_rope_and_append, rope_table
from .linear import moving


class RMSNorm(nn.Module):
    """rms_norm with its weight. State dict: weight [hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return rms_norm(x), or with residual (rms_norm(x + residual), x + residual).

        x and residual [..., hidden_size], of the weight's dtype: bf16, fp16 or fp32.
        """
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RotaryEmbedding(nn.Module):
    """apply_rope with its table, fp32 in a module of any dtype. The state dict is empty.

    Arguments as for rope_table: a LlamaConfig, or theta with head_dim and, for Llama 3.1, scaling.
    """

    table: Tensor  # fp32 [max_positions, D]

    def __init__(
        self,
        config_or_theta: Any,
        max_positions: int,
        *,
        head_dim: int | None = None,
        scaling: Scaling | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.interleaved = interleaved
        self._arguments = (config_or_theta, max_positions, head_dim, scaling)
        self.register_buffer("table", self._computed(device), persistent=False)

    def _computed(self, device: torch.device | str | None) -> Tensor:
        source, positions, head_dim, scaling = self._arguments
        return rope_table(source, positions, head_dim=head_dim, scaling=scaling, device=device)

    def reset_parameters(self) -> None:
        """Compute the table again, after to_empty(): no checkpoint holds it."""
        self.table = self._computed(self.table.device)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [..., H, D] and k [..., Hkv, D] by positions, [...] or its last dimensions."""
        flat = positions.expand(q.shape[:-2]).reshape(-1)
        rows_q, rows_k = (t.reshape(-1, *t.shape[-2:]) for t in (q, k))
        rotated_q, rotated_k = apply_rope(
            rows_q, rows_k, flat, self.table, interleaved=self.interleaved
        )
        return rotated_q.view(q.shape), rotated_k.view(k.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(moving(fn, self.table), recurse)
        return self

    def extra_repr(self) -> str:
        positions, head_dim = self.table.shape
        return f"head_dim={head_dim}, max_positions={positions}, interleaved={self.interleaved}"


class SwiGLU(nn.Module):
    """Llama's feed-forward layer, down_proj(silu(gate_proj(x)) * up_proj(x)).

    State dict: gate_proj, up_proj [intermediate_size, hidden_size] and down_proj [hidden_size,
    intermediate_size], each with weight (and bias). linear makes the three: nn.Linear, or FP8Linear
    for FP8 checkpoints.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        linear: Callable[..., nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = linear(hidden_size, intermediate_size, **options)
        self.up_proj = linear(hidden_size, intermediate_size, **options)
        self.down_proj = linear(intermediate_size, hidden_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: [..., hidden_size] -> the same, in bf16, fp16 or fp32."""
        gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)
        return self.down_proj(silu_and_mul(gate_up))


class Attention(nn.Module):
    """Llama's attention layer: projections, rotation, grouped-query attention, projection.

    State dict: q_proj, k_proj, v_proj, o_proj, each with weight (and bias). rotary may be shared by
    all layers. head_dim: hidden_size / num_heads unless given. linear: as for SwiGLU.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        rotary: RotaryEmbedding,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        linear: Callable[..., nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        rows, kv_rows = num_heads * self.head_dim, num_kv_heads * self.head_dim
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = linear(hidden_size, rows, **options)
        self.k_proj = linear(hidden_size, kv_rows, **options)
        self.v_proj = linear(hidden_size, kv_rows, **options)
        self.o_proj = linear(rows, hidden_size, **options)
        self.rotary = rotary

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        causal: bool = True,
        cache: tuple[Tensor, Tensor] | None = None,
        cache_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return attention's output [B, S, hidden_size] for x [B, S, hidden_size].

        positions: [B, S] or [S]; None: after the cache's tokens, or from 0. cache: keys and values,
        two tensors [B, capacity, Hkv, D] of x's dtype. cache_seqlens, int32 [B]: the number of
        tokens in each sequence's cache; new ones are written after them and attended to with them.
        A sequence that outgrows the cache raises ValueError (CPU tensors).
        """
        shape = x.shape[:2]
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        steps = torch.arange(shape[1], device=x.device)
        if cache is None:
            q, k = self.rotary(q, k, steps if positions is None else positions)
            return self.o_proj(attention(q, k, v, causal=causal).flatten(2))
        if cache_seqlens is None:
            raise ValueError("cache_seqlens: got None, want int32 [B] with cache")
        capacity = cache[0].shape[1]
        at = cache_seqlens[:, None] + steps
        rows = torch.arange(shape[0], device=x.device)[:, None]
        slots = torch.where(at < capacity, rows * capacity + at, -1)  # never the next sequence's
        positions = at if positions is None else positions.expand(shape)
        q = apply_rope_and_append(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            positions.flatten(),
            self.rotary.table,
            *cache,
            slots.flatten(),
            interleaved=self.rotary.interleaved,
        )
        out = attention_with_kvcache(
            q.unflatten(0, shape), *cache, cache_seqlens + shape[1], causal=causal
        )
        return self.o_proj(out.flatten(2))
