"""The rotary embedding's table of cosines and sines, with Llama 3.1's frequency scaling."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """What rope_table reads of a RopeScaling."""

    @property
    def factor(self) -> float: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def original_max_position_embeddings(self) -> int: ...


def inv_freq(theta: float, head_dim: int, scaling: Scaling | None = None) -> Tensor:
    """Frequencies in radians a token, fp32 [head_dim / 2].

    Llama 3.1 divides the frequencies whose wavelength exceeds the original context by `factor`,
    keeps the short ones, and interpolates between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freqs = 1.0 / theta**exponents
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    scaled = torch.where(wavelength > context / low, freqs / scaling.factor, freqs)
    is_between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(is_between, between, scaled)


def rope_table(
    config_or_theta: Any,
    max_positions: int,
    *,
    head_dim: int | None = None,
    scaling: Scaling | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """fp32 [max_positions, head_dim]: cosines, then sines, head_dim / 2 each.

    From a LlamaConfig (theta, head_dim and scaling are read off it), or from theta with head_dim
    and, for Llama 3.1, a RopeScaling. Angles are formed in fp32, position times frequency, as
    Meta's code and transformers do: the model was trained with them. Keep the table in fp32
    whatever the model's dtype; in bf16 positions past 256 would collapse.
    """
    if hasattr(config_or_theta, "rope_theta"):
        theta = float(config_or_theta.rope_theta)
        head_dim = config_or_theta.head_dim if head_dim is None else head_dim
        scaling = config_or_theta.rope_scaling if scaling is None else scaling
    elif isinstance(config_or_theta, (int, float)) and not isinstance(config_or_theta, bool):
        theta = float(config_or_theta)
    else:
        got = type(config_or_theta).__name__
        raise TypeError(f"config_or_theta: got {got}, want a LlamaConfig or a number")
    if not math.isfinite(theta) or theta <= 1.0:
        raise ValueError(f"config_or_theta: got theta {theta}, want a finite number > 1")
    if isinstance(max_positions, bool) or not isinstance(max_positions, int):
        raise TypeError(f"max_positions: got {type(max_positions).__name__}, want an int")
    if max_positions < 1:
        raise ValueError(f"max_positions: got {max_positions}, want at least 1")
    if head_dim is None:
        raise ValueError("head_dim: got None, want it when theta is given as a number")
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: got {head_dim!r}, want an even number")
    if scaling is not None and not all(
        hasattr(scaling, f) for f in ("factor", "low_freq_factor", "high_freq_factor")
    ):
        raise TypeError(f"scaling: got {type(scaling).__name__}, want a RopeScaling")
    freqs = inv_freq(theta, head_dim, scaling)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * freqs
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
