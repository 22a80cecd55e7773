"""Llama 3.1's forward pass: embed -> blocks -> norm -> head.

With tensor parallelism (parallel.py) each rank runs it on its own heads and its own part of the FFN
and the vocabulary.

Source: The Llama 3 Herd of Models, arXiv:2407.21783.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint.weights import Linear, Quantized
from .generation.cache import Append, KVCache
from .generation.generate import generate
from .generation.logprobs import logprobs
from .ops import activation, attention, decode_attention, rms_norm, rope
from .ops.common import check_range
from .pretrained import Pretrained
from .reference import FP8_DTYPE


class Llama(Pretrained):
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
        total: int = 0,
    ) -> Tensor:
        """Like __call__, but return hidden states [B, S, hidden] instead of logits. last: return
        those of each row's last token only, [B, 1, hidden]; the last layer's output projection and
        FFN are then skipped for all others. total: the tokens of the whole text of which these are
        a chunk; the frequencies of rope type "dynamic" depend on it."""
        self._check(tokens, positions, cache)
        batch, seqlen = tokens.shape
        with torch.inference_mode():  # no_grad costs 22 us a layer (Zen 4)
            append = None if cache is None else cache.append(seqlen)
            end = seqlen if cache is None else seqlen + max(cache.seqlens, default=0)
            if positions is not None:
                end = self._end(positions)
                positions = positions.expand(batch, seqlen).flatten()
            elif append is not None:
                positions = append.positions
            else:
                positions = torch.arange(seqlen, device=self.device).repeat(batch)
            table = self.rope.upto(end) if seqlen == 1 else self.rope.text(max(end, total))
            x = self.forward(self.embed(tokens), positions, cache, append, last, table)
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
        table: Tensor | None = None,
    ) -> Tensor:
        """Run all layers and the last norm: x [B, S, hidden], positions [B * S] -> [B, S, hidden];
        last: [B, 1, hidden], of each row's last token. table: of self.rope; None: for all positions
        of the cache, which never changes. Neither checks arguments nor waits for the device:
        decode.py captures it in CUDA graphs."""
        if table is None:
            most = self.config.max_position_embeddings
            table = self.rope.upto(most if cache is None else cache.max_tokens)
        residual: Tensor | None = None
        final = len(self.weights.layers) - 1
        for i, layer in enumerate(self.weights.layers):
            normed, residual = self._norm(x, residual, layer.attention_norm, layer.qkv)
            x = self._attend(layer.qkv(normed), positions, table, i, cache, append)
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
        table: Tensor,
        layer: int,
        cache: KVCache | None,
        append: Append | None,
    ) -> Tensor:
        """Return the attention output [B, S, H * D] for qkv [B, S, (H + 2 * Hkv) * D]."""
        c, shape = self.config, qkv.shape[:2]
        heads = qkv.flatten(0, 1).unflatten(1, (-1, c.head_dim))
        q, k, v = heads.split((c.num_attention_heads, *[c.num_key_value_heads] * 2), dim=1)
        if cache is None or append is None:
            q, k = rope.apply_rope(q, k, positions, table)
            out = attention.attention(*(t.unflatten(0, shape) for t in (q, k, v)))
            return out.flatten(2)
        if cache.measures(layer) and len(positions):
            cache.measure(layer, rope.apply_rope(q, k, positions, table)[1], v)
        kv, scales = (cache.k[layer], cache.v[layer]), cache.scales(layer)
        q = rope.apply_rope_and_append(q, k, v, positions, table, *kv, append.slots, **scales)
        q = q.unflatten(0, shape)
        if append.run is not None and shape[1] > 1:
            k, v = (pool.flatten(0, 1)[append.run].unsqueeze(0) for pool in kv)
            return attention.attention(q, k, v).flatten(2)
        out = decode_attention.attention_with_kvcache(
            q, *kv, append.cache_seqlens, block_table=append.block_table, **scales
        )
        return out.flatten(2)

    def _end(self, positions: Tensor) -> int:
        """Return one more than the last position. On a GPU reading it would wait for the device, so
        that it is read only where frequencies depend on it."""
        most = self.config.max_position_embeddings
        if positions.numel() == 0:
            return 0
        if not positions.is_cpu and self.rope.fixed_length == most:
            return most
        check_range("positions", positions.contiguous(), 0, most - 1)
        return int(positions.max()) + 1

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
