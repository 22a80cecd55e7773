"""Llama 3.1's forward pass: embed -> blocks -> norm -> head.

Source: The Llama 3 Herd of Models, arXiv:2407.21783.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpoint, generate, ops
from .cache import Append, KVCache
from .config import LlamaConfig
from .reference import FP8_DTYPE
from .weights import DTYPES, LayerWeights, RandomSource, Weights, assemble


class Llama:
    def __init__(self, config: LlamaConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self.rope = ops.rope_table(config, config.max_position_embeddings, device=self.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        *,
        progress: bool | None = None,
    ) -> Llama:
        """Loads a folder in Hugging Face's format: config.json and safetensors.

        dtype: bfloat16, float16 or float32. quantize: "fp8" every linear layer, "fp8_ffn" Meta's
        405B recipe; a checkpoint that is in FP8 already stays so. progress: a bar on stderr; None:
        where that is a terminal. Raises OSError or ValueError naming what is wrong with the files.
        """
        config = LlamaConfig.from_pretrained(path)
        dtype, device = _checked(dtype, device)
        return cls(
            config,
            checkpoint.load(
                path, config, dtype=dtype, quantize=quantize, device=device, progress=progress
            ),
        )

    @classmethod
    def from_config(
        cls,
        config: LlamaConfig,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.bfloat16,
        quantize: str | None = None,
        device: torch.device | str | None = None,
    ) -> Llama:
        """Random weights, for benchmarks: activations have a trained model's scale."""
        dtype, device = _checked(dtype, device)
        return cls(config, assemble(config, RandomSource(seed, dtype, device), quantize))

    def __call__(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """tokens [B, S] integers -> logits [B, S, vocab] fp32.

        positions [B, S] or [S]: where the tokens stand; None: after what the cache holds, from 0
        without one. cache: attended to, and the tokens appended, a row of the batch for each of its
        sequences.
        """
        return self.logits(self.hidden(tokens, positions, cache))

    @torch.inference_mode()
    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """As the model itself, but stops before the head: [B, S, hidden]."""
        self._check(tokens, positions, cache)
        batch, seqlen = tokens.shape
        append = None if cache is None else cache.append(seqlen)
        if positions is not None:
            positions = positions.expand(batch, seqlen).flatten()
        elif append is not None:
            positions = append.positions
        else:
            positions = torch.arange(seqlen, device=self.device).repeat(batch)
        x, residual = F.embedding(tokens, self.weights.embedding), None
        for i, layer in enumerate(self.weights.layers):
            x, residual = self._norm(x, residual, layer.attention_norm)
            if cache is None or append is None:
                x = self._attend(layer, x, positions)
            else:
                kv = cache.k[i], cache.v[i]
                x = self._attend_cached(layer, x, positions, *kv, append, cache.scales(i))
            x, residual = self._norm(x, residual, layer.ffn_norm)
            x = layer.down(ops.silu_and_mul(layer.gate_up(x)))
        x, _ = self._norm(x, residual, self.weights.norm)
        if cache is not None:
            cache.advance(seqlen)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] fp32: ask only for the tokens that are wanted."""
        return self.weights.head(hidden).float()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int | None = None,
        stop_ids: Sequence[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """See llama_fast.generate.generate."""
        return generate.generate(
            self,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_ids=stop_ids,
            on_token=on_token,
        )

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        if residual is None:
            return ops.rms_norm(x, weight, self.config.rms_norm_eps), x
        return ops.add_rms_norm(x, residual, weight, self.config.rms_norm_eps)

    def _qkv(self, layer: LayerWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, hidden] -> q [B * S, H, D], k and v [B * S, Hkv, D]."""
        c = self.config
        heads = layer.qkv(x).flatten(0, 1).unflatten(1, (-1, c.head_dim))
        return heads.split((c.num_attention_heads, *[c.num_key_value_heads] * 2), dim=1)

    def _attend(self, layer: LayerWeights, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self._qkv(layer, x)
        q, k = ops.apply_rope(q, k, positions, self.rope)
        out = ops.attention(*(t.unflatten(0, x.shape[:2]) for t in (q, k, v)))
        return layer.output(out.flatten(2))

    def _attend_cached(
        self,
        layer: LayerWeights,
        x: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        append: Append,
        scales: dict[str, Tensor | None],
    ) -> Tensor:
        q, k, v = self._qkv(layer, x)
        q = ops.apply_rope_and_append(
            q, k, v, positions, self.rope, k_cache, v_cache, append.slots, **scales
        ).unflatten(0, x.shape[:2])
        out = ops.attention_with_kvcache(
            q, k_cache, v_cache, append.cache_seqlens, block_table=append.block_table, **scales
        )
        return layer.output(out.flatten(2))

    def _check(self, tokens: Tensor, positions: Tensor | None, cache: KVCache | None) -> None:
        for name, t in (("tokens", tokens), ("positions", positions)):
            if t is None and name == "positions":
                continue
            if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
                got = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{name}: got {got}, want a tensor of int32 or int64")
            if t.device != self.device:
                raise ValueError(f"{name}: got device {t.device}, want the model's, {self.device}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens: got shape {list(tokens.shape)}, want [B, S]")
        if positions is not None and tuple(positions.shape) not in (tokens.shape, tokens.shape[1:]):
            want = f"{list(tokens.shape)} or {list(tokens.shape[1:])}"
            raise ValueError(f"positions: got shape {list(positions.shape)}, want {want}")
        if cache is not None and len(cache) != tokens.shape[0]:
            raise ValueError(
                f"tokens: got {tokens.shape[0]} rows, want the cache's {len(cache)} sequences"
            )
        if cache is not None and (
            cache.k.dtype not in (self.dtype, FP8_DTYPE) or cache.k.device != self.device
        ):
            got = f"{cache.k.dtype} on {cache.k.device}"
            raise ValueError(f"cache: got {got}, want {self.dtype} on {self.device}")
        if tokens.is_cpu and tokens.numel():
            low, high = tokens.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                bad = int(low if low < 0 else high)
                raise ValueError(f"tokens: got id {bad}, want 0 to {self.config.vocab_size - 1}")


def _checked(
    dtype: torch.dtype, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, want bfloat16, float16 or float32")
    return dtype, torch.get_default_device() if device is None else torch.device(device)
