"""The implementations of the whole model: ours and transformers', on the same random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fast as lf
from llama_fast.checkpoint.weights import Linear, assemble, packed, quantized
from llama_fast.generation.cache import KVCache

from .case import CPU
from .peers.peer import CHUNK
from .timing import Run

PREFILL = 512  # tokens of the prompt that everybody is measured on


def shape(layers: int = 4, vocab: int = 32000) -> lf.LlamaConfig:
    return dataclasses.replace(
        lf.LlamaConfig.llama_3_1_8b(), num_hidden_layers=layers, vocab_size=vocab
    )


def narrow() -> lf.LlamaConfig:
    """Two layers of no size, for a run through every path."""
    return dataclasses.replace(
        lf.LlamaConfig.llama_3_1_8b(),
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=2,
        vocab_size=256,
    )


class _Unfilled(TorchDispatchMode):
    """Random initialisation does nothing here: on a CPU it takes longer than all that follows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def transformers_model(
    config: lf.LlamaConfig, device: torch.device = CPU, weights: Any = None
) -> Any:
    """A bf16 LlamaForCausalLM of config's shape with random weights; or with those of another one,
    in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if weights is None else torch.float32)
    try:
        with device, _Unfilled():
            model = LlamaForCausalLM(hf).eval()
    finally:
        torch.set_default_dtype(before)
    if weights is not None:
        model.load_state_dict(weights.state_dict())
        return model
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 1.0 if "embed" in name else p.shape[1] ** -0.5
            for rows in p.data.split(4096):  # drawn in fp32, a quarter of bf16's time
                rows.copy_(torch.randn(rows.shape, generator=generator, device=device).mul_(std))
    return model


class Ours:
    """llama_fast, weights in bf16 or FP8."""

    def __init__(self, label: str, model: lf.Llama) -> None:
        self.label, self.model = label, model
        self._caches: dict[tuple[int, ...], KVCache] = {}

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def extend(self, context: Tensor, tokens: Tensor) -> Run:
        """The tokens after a context, from where the next round starts again."""
        model, cache = self.model, self._cache(context, tokens.shape[1])

        def run(_: int) -> Tensor:
            cache.truncate([context.shape[1]])
            return model.logits(model.hidden(tokens, cache=cache)[:, -1])

        return run

    def decode(self, context: Tensor, steps: int) -> Run:
        model, cache = self.model, self._cache(context, steps)
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

        def run(_: int) -> None:
            cache.truncate([context.shape[1]])
            for _ in range(steps):
                model(token, cache=cache)

        return run

    def _cache(self, context: Tensor, room: int) -> KVCache:
        """Holds the context, which takes minutes when it is long: the jobs after it share one.
        Each of their rounds begins by truncating it to the context."""
        model, key = self.model, tuple(context.flatten().tolist())
        cache = self._caches.get(key)
        if cache is None or cache.block_table.shape[1] * cache.block_size < len(key) + room:
            cache = KVCache(
                model.config,
                len(key) + max(room, CHUNK),
                1,
                dtype=model.dtype,
                device=model.device,
            )
            for part in context.split(CHUNK, dim=1) if key else ():
                model.hidden(part, cache=cache)
            self._caches[key] = cache
        return cache

    def weight_bytes(self) -> int:
        return self.model.weights.embedding.nbytes + sum(w.nbytes for w in linears(self.model))

    def close(self) -> None:
        self._caches.clear()
        del self.model


class Transformers:
    """Eager transformers, as it is used today. attention: "sdpa" or "eager"."""

    def __init__(self, model: Any, attention: str = "sdpa") -> None:
        self.label = "transformers" if attention == "sdpa" else f"transformers {attention}"
        self.model, self.attention = model, attention
        self._contexts: dict[tuple[int, ...], Any] = {}

    def logits(self, tokens: Tensor) -> Tensor:
        return self._call(tokens, use_cache=False).logits.float()

    def extend(self, context: Tensor, tokens: Tensor) -> Run:
        past = self._past(context)

        def run(_: int) -> Tensor:
            _rewind(past, context.shape[1])
            return self._call(tokens, logits_to_keep=1, use_cache=True, past_key_values=past).logits

        return run

    def decode(self, context: Tensor, steps: int) -> Run:
        past = self._past(context)
        token = torch.zeros(1, 1, dtype=torch.int64, device=context.device)

        def run(_: int) -> None:
            _rewind(past, context.shape[1])
            for _ in range(steps):
                self._call(token, use_cache=True, past_key_values=past)

        return run

    def _past(self, context: Tensor) -> Any:
        """As Ours._cache."""
        from transformers import DynamicCache

        key = tuple(context.flatten().tolist())
        if key not in self._contexts:
            past = self._contexts[key] = DynamicCache(config=self.model.config)
            for part in context.split(CHUNK, dim=1) if key else ():
                self._call(part, use_cache=True, past_key_values=past, logits_to_keep=1)
        return self._contexts[key]

    def _call(self, tokens: Tensor, **options: Any) -> Any:
        self.model.config._attn_implementation = self.attention
        return self.model(tokens, **options)

    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    def close(self) -> None:
        self._contexts.clear()
        del self.model


def linears(model: lf.Llama) -> list[Tensor]:
    """The weights that every token passes through; the embedding is only looked up."""
    layers = [w for x in model.weights.layers for w in (x.qkv, x.output, x.gate_up, x.down)]
    return [w.weight for w in (*layers, model.weights.head)]


def prefill_flops(config: lf.LlamaConfig, tokens: int = CHUNK, depth: int = 0) -> float:
    """The linear layers on every token, the head on the last, and causal attention; depth: how many
    tokens are in the cache before."""
    c, hidden = config, config.hidden_size
    heads = c.num_attention_heads * c.head_dim
    layer = hidden * (2 * heads + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    attended = (tokens**2 + 2.0 * tokens * depth) * heads  # two products, half of each masked
    per_layer = 2.0 * layer * tokens + 2.0 * attended
    return c.num_hidden_layers * per_layer + 2.0 * hidden * c.vocab_size


class _Weights:
    """transformers' weights where ours come from files otherwise."""

    def __init__(self, hf: Any) -> None:
        self._named = hf.state_dict()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._named[name]

    def linear(self, parts: dict[str, int], k: int, *, fp8: bool, bound: float | None) -> Linear:
        weight = torch.cat([self._named[f"{name}.weight"] for name in parts])
        return quantized(weight, bound) if fp8 else Linear(packed(weight))


def same_weights(hf: Any) -> dict[str, lf.Llama]:
    """Ours with transformers' weights, on its device; the embedding is shared."""
    config = lf.LlamaConfig.from_hf(hf.config)
    return {
        name: lf.Llama(config, assemble(config, _Weights(hf), quantize))
        for name, quantize in (("bf16", None), ("FP8", "fp8"))
    }


def _rewind(past: Any, tokens: int) -> None:
    """Of a transformers cache, all but the first tokens go. Negative counts mean the same in every
    version."""
    beyond = past.get_seq_length() - tokens
    if beyond > 0:
        past.crop(-beyond)


def prompt(config: lf.LlamaConfig, tokens: int) -> Tensor:
    """Random ids [1, tokens], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (1, tokens), generator=generator)
