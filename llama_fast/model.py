"""Llama 3.1's forward pass: embed -> blocks -> norm -> head.

With tensor parallelism (parallel.py) each rank runs it on its own heads and its own part of the FFN
and the vocabulary.

Source: The Llama 3 Herd of Models, arXiv:2407.21783.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint.load import load
from .checkpoint.weights import DTYPES, Linear, Quantized, RandomSource, Weights, assemble
from .config import LlamaConfig
from .generation.cache import Append, KVCache
from .generation.decode import Decoder
from .generation.generate import generate
from .generation.logprobs import logprobs
from .ops import activation, attention, decode_attention, rms_norm, rope
from .parallel import Group, Share, vocab_sizes
from .reference import FP8_DTYPE


class Llama:
    def __init__(self, config: LlamaConfig, weights: Weights, tp: Group | None = None) -> None:
        """config: of the whole model. weights: those of this rank. tp: the ranks that hold the
        model; None: this process alone. self.config then has this rank's heads and inner width."""
        self.tp = tp or Group()
        share = Share.of(config, self.tp.rank, self.tp.size)
        self.config, self.weights = share.config(config), weights
        self.first_token = share.vocab.start  # of this rank's part of the vocabulary
        self.vocab_sizes = vocab_sizes(config.vocab_size, self.tp.size)
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self.rope = rope.rope_table(config, config.max_position_embeddings, device=self.device)
        self.decoders: list[Decoder] = []  # idle, for the next call of generate

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        *,
        progress: bool | None = None,
        tp: Group | None = None,
    ) -> Llama:
        """Load a folder in Hugging Face's format: config.json and safetensors.

        dtype: bfloat16, float16 or float32. quantize: "fp8" for every linear layer but the head,
        "fp8_all" with the head, "fp8_ffn" for Meta's 405B recipe; weights that the checkpoint holds
        in FP8 stay as they are. progress: whether to show a bar on stderr; None: if stderr is a
        terminal. tp: parallel.join(), to split the model among the processes that torchrun started;
        each then reads only its part of the files, to its own device. Raises OSError or ValueError
        that names the fault in the files; with tp, on all ranks if on one (Group.together).
        """
        tp = tp or Group()
        with tp.together() as check:
            config = LlamaConfig.from_pretrained(path)
            check(config=config, dtype=dtype, quantize=quantize)
            dtype, device = _checked(dtype, device, tp)
            weights = load(
                path,
                config,
                dtype=dtype,
                quantize=quantize,
                device=device,
                progress=progress if tp.rank == 0 else False,
                share=Share.of(config, tp.rank, tp.size),
                check_in=check,
            )
        return cls(config, weights, tp)

    @classmethod
    def from_config(
        cls,
        config: LlamaConfig,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.bfloat16,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        tp: Group | None = None,
    ) -> Llama:
        """Make random weights, for benchmarks. Activations have the scale of a trained model's. tp:
        as for from_pretrained; each rank draws its own part, so another number of ranks gives
        another model."""
        tp = tp or Group()
        dtype, device = _checked(dtype, device, tp)
        share = Share.of(config, tp.rank, tp.size)
        source = RandomSource(seed, dtype, device, None if tp.size == 1 else tp.rank)
        return cls(config, assemble(config, source, quantize, share=share), tp)

    def __call__(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return logits [B, S, vocab] fp32 for tokens [B, S], int32 or int64.

        positions [B, S] or [S]: the tokens' positions; None: after the cache's tokens, or from 0
        without a cache. cache: attended to, and extended by the tokens; row i of the batch belongs
        to its sequence i. No gradients are recorded, but the result is an ordinary tensor: a head
        of your own may train on it.
        """
        return self.logits(self.hidden(tokens, positions, cache))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        last: bool = False,
    ) -> Tensor:
        """Like __call__, but return hidden states [B, S, hidden] instead of logits. last: return
        those of each row's last token only, [B, 1, hidden]; the last layer's output projection and
        FFN are then skipped for all others."""
        self._check(tokens, positions, cache)
        batch, seqlen = tokens.shape
        with torch.inference_mode():  # no_grad costs 22 us a layer (Zen 4)
            append = None if cache is None else cache.append(seqlen)
            if positions is not None:
                positions = positions.expand(batch, seqlen).flatten()
            elif append is not None:
                positions = append.positions
            else:
                positions = torch.arange(seqlen, device=self.device).repeat(batch)
            x = self.forward(self.embed(tokens), positions, cache, append, last)
            if cache is not None:
                cache.advance(seqlen)
        return x.clone()  # an ordinary tensor, which autograd may save

    def embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings [B, S, hidden] for tokens [B, S]. On a GPU an id outside the vocabulary
        gives NaN, which affects no other sequence: checking the id would wait for the device, and
        torch's assertion on the device would make the GPU unusable for the process."""
        if tokens.is_cpu:
            return self.lookup(tokens)
        inside = (tokens >= 0) & (tokens < self.config.vocab_size)
        return self.lookup(tokens.where(inside, 0)).masked_fill(~inside[..., None], math.nan)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return embeddings like embed, of tokens that are all in the vocabulary."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weights.embedding)
        rows = tokens - self.first_token
        elsewhere = (rows < 0) | (rows >= len(self.weights.embedding))
        x = F.embedding(rows.masked_fill(elsewhere, 0), self.weights.embedding)
        return self.tp.all_reduce(x.masked_fill(elsewhere[..., None], 0.0))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: KVCache | None = None,
        append: Append | None = None,
        last: bool = False,
    ) -> Tensor:
        """Run all layers and the last norm: x [B, S, hidden], positions [B * S] -> [B, S, hidden];
        last: [B, 1, hidden], of each row's last token. Neither checks arguments nor waits for the
        device: decode.py captures it in CUDA graphs."""
        residual: Tensor | None = None
        final = len(self.weights.layers) - 1
        for i, layer in enumerate(self.weights.layers):
            normed, residual = self._norm(x, residual, layer.attention_norm, layer.qkv)
            x = self._attend(layer.qkv(normed), positions, i, cache, append)
            if last and i == final:  # its keys and values are all that other tokens leave behind
                x, residual = x[:, -1:], residual[:, -1:]
            x = self.tp.all_reduce(layer.output(x))
            normed, residual = self._norm(x, residual, layer.ffn_norm, layer.gate_up)
            x = self.tp.all_reduce(layer.down(self._swiglu(layer.gate_up(normed), layer.down)))
        return self._plain_norm(x, residual, self.weights.norm)[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocab] fp32 for hidden [..., hidden], of all tokens or only some."""
        return self.tp.all_gather(self.weights.head(hidden), self.vocab_sizes).float()

    generate = generate
    logprobs = logprobs

    def _plain_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return rms_norm(x + residual) and x + residual."""
        eps = self.config.rms_norm_eps
        if residual is None:
            return rms_norm.rms_norm(x, weight, eps), x
        return rms_norm.add_rms_norm(x, residual, weight, eps)

    def _norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, into: Linear
    ) -> tuple[Tensor | Quantized, Tensor]:
        """Like _plain_norm, but quantize the result if the linear that reads it wants FP8."""
        if not into.wants_fp8:
            return self._plain_norm(x, residual, weight)
        q, scale, *total = rms_norm.rms_norm_fp8(
            x, weight, self.config.rms_norm_eps, residual=residual, scale_ub=into.scale_ub
        )
        return Quantized(q, scale, x.dtype), total[0] if total else x

    def _swiglu(self, gate_up: Tensor, into: Linear) -> Tensor | Quantized:
        if into.wants_fp8:
            return Quantized(
                *activation.silu_and_mul_fp8(gate_up, scale_ub=into.scale_ub), gate_up.dtype
            )
        return activation.silu_and_mul(gate_up)

    def _attend(
        self,
        qkv: Tensor,
        positions: Tensor,
        layer: int,
        cache: KVCache | None,
        append: Append | None,
    ) -> Tensor:
        """Return the attention output [B, S, H * D] for qkv [B, S, (H + 2 * Hkv) * D]."""
        c, shape = self.config, qkv.shape[:2]
        heads = qkv.flatten(0, 1).unflatten(1, (-1, c.head_dim))
        q, k, v = heads.split((c.num_attention_heads, *[c.num_key_value_heads] * 2), dim=1)
        if cache is None or append is None:
            q, k = rope.apply_rope(q, k, positions, self.rope)
            out = attention.attention(*(t.unflatten(0, shape) for t in (q, k, v)))
            return out.flatten(2)
        if cache.measures(layer) and len(positions):
            cache.measure(layer, rope.apply_rope(q, k, positions, self.rope)[1], v)
        kv, scales = (cache.k[layer], cache.v[layer]), cache.scales(layer)
        q = rope.apply_rope_and_append(q, k, v, positions, self.rope, *kv, append.slots, **scales)
        q = q.unflatten(0, shape)
        if append.run is not None and shape[1] > 1:
            k, v = (pool.flatten(0, 1)[append.run].unsqueeze(0) for pool in kv)
            return attention.attention(q, k, v).flatten(2)
        out = decode_attention.attention_with_kvcache(
            q, *kv, append.cache_seqlens, block_table=append.block_table, **scales
        )
        return out.flatten(2)

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
    dtype: torch.dtype, device: torch.device | str | None, tp: Group
) -> tuple[torch.dtype, torch.device]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, want bfloat16, float16 or float32")
    if tp.device is not None:
        if device is not None and torch.device(device) not in (
            tp.device,
            torch.device(tp.device.type),
        ):
            raise ValueError(f"device: got {device}, want None or the group's, {tp.device}")
        return dtype, tp.device
    return dtype, torch.get_default_device() if device is None else torch.device(device)
