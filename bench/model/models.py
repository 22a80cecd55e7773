"""Make the random weights that every implementation runs, and ours as a ModelPeer."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fast as lf
from llama_fast.checkpoint.weights import Linear, assemble, packed, quantized
from llama_fast.parallel import Span

from ..peers import CHUNK, ModelPeer
from ..timing import CPU, Run
from ..timing.events import captured

PREFILL = 512  # tokens of a job's prompt


def shape(layers: int = 4, vocab: int = 32000) -> lf.LlamaConfig:
    return replace(lf.LlamaConfig.llama_3_1_8b(), num_hidden_layers=layers, vocab_size=vocab)


def fitting(config: lf.LlamaConfig, memory: float, bytes_each: float) -> lf.LlamaConfig:
    """Keep as many layers as fit; bytes_each: per weight, of all implementations together."""
    c, head = config, config.hidden_size * config.vocab_size
    per_layer = prefill_flops(replace(c, num_hidden_layers=1), 1) / 2 - head
    layers = int((memory / bytes_each - 2 * head) // per_layer)
    return replace(c, num_hidden_layers=max(1, min(layers, c.num_hidden_layers)))


class _Unfilled(TorchDispatchMode):
    """Skip random initialization, which on a CPU takes longer than all that follows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def transformers_model(
    config: lf.LlamaConfig, device: torch.device = CPU, weights: Any = None
) -> Any:
    """Make a bf16 LlamaForCausalLM of config's shape with random weights, or one in fp32 with the
    weights of another model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {**asdict(config), "bos_token_id": 1, "eos_token_id": 2}
    del fields["rope_scaling"]
    hf = LlamaConfig(**fields)
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
            for rows in p.data.split(4096):  # drawn in fp32: a quarter of the time of bf16
                rows.copy_(torch.randn(rows.shape, generator=generator, device=device).mul_(std))
    return model


class Ours(ModelPeer):
    """llama_fast with weights in bf16 or FP8."""

    def __init__(self, label: str, model: lf.Llama) -> None:
        self.label, self.model = label, model
        self._caches: dict[Any, lf.KVCache] = {}

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).cpu()

    def after(self, context: Tensor, tokens: Tensor, times: int) -> Run:
        on_gpu = context.device.type != "cpu" and tokens.shape[1] == 1
        return self._after(context, tokens, times, on_gpu)

    def _after(self, context: Tensor, tokens: Tensor, times: int, on_gpu: bool) -> Run:
        """Make the run. On a GPU a step is one CUDA graph, repeated at the same length."""
        model, cache = self.model, self._cache(context, tokens.shape[1] * times)
        held: list[int] = [context.shape[1]] * context.shape[0]
        out: list[Tensor] = []
        used = cache
        if on_gpu:
            cache.truncate(held)
            appended, used = cache.append(1), copy.copy(cache)
            used.append = lambda count: appended  # type: ignore[method-assign]
            used.advance = lambda count: None  # type: ignore[method-assign]

        def step() -> None:
            out[:] = [model.logits(model.hidden(tokens, cache=used, last=True)[:, -1])]

        once = captured(step, context.device) if on_gpu else step

        def run(_: int) -> Tensor:
            cache.truncate(held)
            for _ in range(times):
                once()
            return out[0]

        return run

    def _cache(self, context: Tensor, room: int) -> lf.KVCache:
        """Return a cache that holds the context."""
        model, key = self.model, (tuple(context.shape), *context.flatten().tolist())
        batch, length = context.shape
        cache = self._caches.get(key)
        if cache is None or cache.block_table.shape[1] * cache.block_size < length + room:
            options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
            cache = lf.KVCache(model.config, length + max(room, CHUNK), batch, **options)
            for part in context.split(CHUNK, dim=1) if length else ():
                model.hidden(part, cache=cache, last=True)
            self._caches[key] = cache
        return cache

    def weight_bytes(self) -> int:
        return sum(w.nbytes for w in linears(self.model))

    def close(self) -> None:
        self._caches.clear()
        del self.model


def linears(model: lf.Llama) -> list[Tensor]:
    """List the weights that every token reads whole, so without the embedding."""
    layers = [w for x in model.weights.layers for w in (x.qkv, x.output, x.gate_up, x.down)]
    return [w.weight for w in (*layers, model.weights.head)]


def prefill_flops(config: lf.LlamaConfig, tokens: int = CHUNK, depth: int = 0) -> float:
    """Count the operations that the last token's logits need: causal attention, the linear layers
    on every token, the head and the last layer's FFN and output projection on the last one. depth:
    tokens already in the cache."""
    c, hidden = config, config.hidden_size
    heads = c.num_attention_heads * c.head_dim
    spared = 2.0 * (tokens - 1) * hidden * (heads + 3 * c.intermediate_size)
    layer = hidden * (2 * heads + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    attended = (tokens**2 + 2.0 * tokens * depth) * heads  # two products, half of each masked
    per_layer = 2.0 * layer * tokens + 2.0 * attended
    return c.num_hidden_layers * per_layer - spared + 2.0 * hidden * c.vocab_size


class _Weights:
    """Weights of a transformers model, with the interface of a checkpoint's files."""

    def __init__(self, hf: Any) -> None:
        self._named = hf.state_dict()

    def tensor(self, name: str, *dims: Span) -> Tensor:
        return self._named[name]

    def linear(self, parts: dict[str, Span], k: Span, *, fp8: bool, bound: float | None) -> Linear:
        weight = torch.cat([self._named[f"{name}.weight"] for name in parts])
        return quantized(weight, bound) if fp8 else Linear(packed(weight))


def same_weights(hf: Any) -> dict[str, Ours]:
    """Make our models in bf16 and FP8 from transformers' weights, on the same device; the two share
    the embedding."""
    config = lf.LlamaConfig.from_hf(hf.config)
    return {
        name: Ours(name, lf.Llama(config, assemble(config, _Weights(hf), quantize)))
        for name, quantize in (("bf16", None), ("FP8", "fp8_all"))
    }


def prompt(config: lf.LlamaConfig, tokens: int, batch: int = 1) -> Tensor:
    """Draw token ids [batch, tokens], always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (batch, tokens), generator=generator)
