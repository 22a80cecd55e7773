"""A Llama's weights: their types, their quantization, and random ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import RECIPES as RECIPES
from ..config import LlamaConfig
from ..ops import linear, quantize
from ..parallel import Share, Span
from ..reference import FP8_DTYPE, PACK_ROWS, unpack_weight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEW_PANELS = 16  # packed at a time: 1024 rows, 16 MiB of 8192 columns in 16 bits
ACTIVATION_BOUND = 1200.0  # on a row's amax in quantized activations: Meta's 405B recipe
_LINEAR = re.compile(r"(?:model\.)?layers\.(\d+)\.(self_attn|mlp)\.[a-z]+_proj")


class Quantized(NamedTuple):
    """An activation quantized by row by its producer: x is about q * scale."""

    q: Tensor  # e4m3 [..., K]
    scale: Tensor  # fp32 [rows, 1]
    dtype: torch.dtype  # of x, and of a linear's output


@dataclass(frozen=True)
class Linear:
    """A linear layer, [..., K] -> [..., N]. The weight has the model's dtype, or FP8 and scale."""

    weight: Tensor  # [N, K], or packed [N / 64, K / 2, 64, 2]
    scale: Tensor | None = None  # fp32 [N, 1], or one per 128 x 128 block
    bias: Tensor | None = None  # [N]
    scale_ub: float | None = None

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        if isinstance(x, Quantized):
            assert self.scale is not None  # a caller quantizes only if wants_fp8
            rows = x.q.flatten(0, -2)
            out = linear.fp8_gemm(
                rows, self.weight, x.scale, self.scale, bias=self.bias, out_dtype=x.dtype
            )
            return out.unflatten(0, x.q.shape[:-1])
        if self.scale is None:
            return linear.linear(x, self.weight, self.bias)
        return linear.fp8_linear(x, self.weight, self.scale, self.bias, scale_ub=self.scale_ub)

    @property
    def wants_fp8(self) -> bool:
        """Return whether fp8_linear would quantize x by row: x's producer then does. Weights in
        blocks need activations in blocks, which no producer makes."""
        by_row = self.scale is not None and self.weight.dim() == 2 and self.scale.shape[-1] == 1
        return by_row and linear.prefers_fp8_activations(self.weight)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.scale, self.bias) if t is not None)


@dataclass(frozen=True)
class LayerWeights:
    attention_norm: Tensor  # [hidden]
    qkv: Linear  # [(H + 2 * Hkv) * D, hidden]: q, k, v
    output: Linear  # [hidden, H * D]
    ffn_norm: Tensor  # [hidden]
    gate_up: Linear  # [2 * intermediate, hidden]: gate, up
    down: Linear  # [hidden, intermediate]


@dataclass(frozen=True)
class Weights:
    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Tensor  # [hidden]
    head: Linear  # [vocab, hidden]
    k_scale: Tensor | None = None  # fp32 [layers, 1 or Hkv]: the checkpoint's for an FP8 KVCache
    v_scale: Tensor | None = None

    @property
    def linears(self) -> list[Linear]:
        """Return all linear layers, the head last unless it is the embedding."""
        head = [] if self.head.weight is self.embedding else [self.head]
        return [w for x in self.layers for w in (x.qkv, x.output, x.gate_up, x.down)] + head

    @property
    def others(self) -> list[Tensor]:
        norms = [w for x in self.layers for w in (x.attention_norm, x.ffn_norm)]
        return [self.embedding, *norms, self.norm]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes; a tied embedding counts once."""
        return sum(w.nbytes for w in self.linears) + sum(t.nbytes for t in self.others)

    @property
    def parameters(self) -> int:
        """Return the number of parameters, without scales; a tied embedding counts once."""
        biases = [w.bias for w in self.linears if w.bias is not None]
        weights = [w.weight for w in self.linears]
        return sum(t.numel() for t in (*weights, *biases, *self.others))


def moved(weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """Return weights on a device in a dtype, FP8 and scales in their own; the layers are replaced
    one after another, so two copies of one are in memory."""

    def plain(t: Tensor) -> Tensor:
        return t.to(device, dtype)

    def linear(held: Linear) -> Linear:
        weight = held.weight if device.type == "cpu" else unpack_weight(held.weight)
        weight = weight.to(device, weight.dtype if weight.dtype == FP8_DTYPE else dtype)
        scale = None if held.scale is None else held.scale.to(device)
        bias = None if held.bias is None else plain(held.bias)
        weight = packed(weight) if weight.dim() == 2 else weight
        return replace(held, weight=weight, scale=scale, bias=bias)

    for i, x in enumerate(weights.layers):
        weights.layers[i] = LayerWeights(
            plain(x.attention_norm),
            linear(x.qkv),
            linear(x.output),
            plain(x.ffn_norm),
            linear(x.gate_up),
            linear(x.down),
        )
    embedding, tied = plain(weights.embedding), weights.head.weight is weights.embedding
    head = replace(weights.head, weight=embedding) if tied else linear(weights.head)
    scales = (None if s is None else s.to(device) for s in (weights.k_scale, weights.v_scale))
    return Weights(embedding, weights.layers, plain(weights.norm), head, *scales)


class Source(Protocol):
    """The origin of tensors: a checkpoint, or a random generator."""

    def tensor(self, name: str, *dims: Span) -> Tensor:
        """Return a norm or a part of the embedding, in the model's dtype."""

    def linear(self, parts: dict[str, Span], k: Span, *, fp8: bool, bound: float | None) -> Linear:
        """Return linears of one input, name -> rows, fused along their rows. k: their columns. fp8:
        quantize them, by the whole row even if k is a part of it."""


def assemble(
    config: LlamaConfig,
    source: Source,
    quantize: str | None,
    progress: Callable[[], None] = lambda: None,
    share: Share | None = None,
) -> Weights:
    """Get every weight of a Llama from source, by Hugging Face's names, in the order of their use.

    quantize: see is_quantized. progress is called after each layer. share: of one rank; None: all.
    """
    if quantize not in (None, *RECIPES):
        raise ValueError(f"quantize: got {quantize!r}, want None or one of {', '.join(RECIPES)}")
    share = share or Share.of(config)
    hidden, inner = Span.whole(config.hidden_size), share.inner
    q_rows, kv_rows = (heads.times(config.head_dim) for heads in (share.heads, share.kv_heads))
    bound = ACTIVATION_BOUND if quantize == "fp8_ffn" else None

    def linear(parts: dict[str, Span], k: Span) -> Linear:
        fp8 = all(is_quantized(name, quantize, config.num_hidden_layers) for name in parts)
        return source.linear(parts, k, fp8=fp8, bound=bound)

    embedding = source.tensor("model.embed_tokens.weight", share.vocab, hidden)
    progress()
    layers = []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        qkv = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        layers.append(
            LayerWeights(
                attention_norm=source.tensor(f"{at}.input_layernorm.weight", hidden),
                qkv=linear({f"{at}.self_attn.{name}": rows for name, rows in qkv.items()}, hidden),
                output=linear({f"{at}.self_attn.o_proj": hidden}, q_rows),
                ffn_norm=source.tensor(f"{at}.post_attention_layernorm.weight", hidden),
                gate_up=linear({f"{at}.mlp.gate_proj": inner, f"{at}.mlp.up_proj": inner}, hidden),
                down=linear({f"{at}.mlp.down_proj": hidden}, inner),
            )
        )
        progress()
    norm = source.tensor("model.norm.weight", hidden)
    if config.tie_word_embeddings:
        head = quantized(embedding) if quantize == "fp8_all" else Linear(embedding)
    else:
        head = linear({"lm_head": share.vocab}, hidden)
    progress()
    return Weights(embedding, layers, norm, head)


def is_quantized(module: str, quantize: str | None, num_layers: int) -> bool:
    """Return whether a recipe quantizes a module, given its name in Hugging Face's files.

    "fp8": every linear layer but the head, which is the default of compressed-tensors, FBGEMM and
    vLLM. "fp8_all": the head too, at a cost (docs/model.md, FP8 weights). "fp8_ffn", Meta's
    recipe for the 405B: the feed-forward layers, but not the first and the last.
    """
    if quantize is None:
        return False
    if module == "lm_head":
        return quantize == "fp8_all"
    match = _LINEAR.fullmatch(module)
    if match is None:
        return False
    return quantize != "fp8_ffn" or (match[2] == "mlp" and 0 < int(match[1]) < num_layers - 1)


def packable(n: int, k: int, device: torch.device) -> bool:
    """Return whether an [n, k] weight can be packed for the CPU kernels."""
    return device.type == "cpu" and n % PACK_ROWS == 0 and k % 2 == 0


def packed(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return linear.pack_weight(weight) if packable(n, k, weight.device) else weight


def stacked(
    parts: Iterable[Tensor], rows: list[int], k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Stack weights [rows[i], k] in dtype, packed if possible. Packing few rows at a time saves a
    second copy of the whole."""
    if not packable(sum(rows), k, device) or any(n % PACK_ROWS for n in rows):
        out = torch.empty(sum(rows), k, dtype=dtype, device=device)
        for place, part in zip(out.split(rows), parts, strict=True):
            place.copy_(part)
        return packed(out)
    panels = [n // PACK_ROWS for n in rows]
    out = torch.empty(sum(panels), k // 2, PACK_ROWS, 2, dtype=dtype, device=device)
    for place, part in zip(out.split(panels), parts, strict=True):
        pieces = zip(place.split(FEW_PANELS), part.split(FEW_PANELS * PACK_ROWS), strict=True)
        for few, piece in pieces:
            few.copy_(linear.pack_weight(piece.to(dtype)))
    return out


def quantized(weight: Tensor, bound: float | None = None) -> Linear:
    """Quantize a weight [N, K] by row."""
    q, scale = quantize.quantize_fp8(weight, "row")
    return Linear(packed(q), scale, scale_ub=bound)


class RandomSource:
    """Random weights, made directly in their final format, without a second copy.

    Each keeps the variance of its input, so activations have the scale of a trained model's. rank:
    the norms are those of every rank, and the rest is this rank's own.
    """

    def __init__(
        self, seed: int, dtype: torch.dtype, device: torch.device, rank: int | None = None
    ) -> None:
        self._generator = self._common = torch.Generator(device).manual_seed(seed)
        if rank is not None:
            self._generator = torch.Generator(device).manual_seed(seed + 1 + rank)
        self._dtype, self._device = dtype, device

    def tensor(self, name: str, *dims: Span) -> Tensor:
        out = torch.empty([len(d) for d in dims], dtype=self._dtype, device=self._device)
        if len(dims) == 1:
            return out.uniform_(0.75, 1.25, generator=self._common)
        return out.normal_(generator=self._generator)

    def linear(self, parts: dict[str, Span], k: Span, *, fp8: bool, bound: float | None) -> Linear:
        n = sum(map(len, parts.values()))
        panels = (n // PACK_ROWS, len(k) // 2, PACK_ROWS, 2)
        shape = panels if packable(n, len(k), self._device) else (n, len(k))
        if not fp8:
            weight = torch.empty(shape, dtype=self._dtype, device=self._device)
            return Linear(weight.normal_(std=1 / math.sqrt(k.of), generator=self._generator))
        weight, rms = self._random_e4m3(shape)
        scale = torch.empty(n, 1, dtype=torch.float32, device=self._device)
        scale.uniform_(0.75, 1.25, generator=self._generator).div_(rms * math.sqrt(k.of))
        return Linear(weight, scale, scale_ub=bound)

    def _random_e4m3(self, shape: tuple[int, ...]) -> tuple[Tensor, float]:
        """Return random codes and their root mean square. Eight codes at a time cost 0.5 ns a code;
        rounding normals costs 10. Clearing an exponent bit excludes the two NaN codes."""
        words = torch.empty(-(-math.prod(shape) // 8), dtype=torch.int64, device=self._device)
        words.random_(-(2**63), None, generator=self._generator)
        words.bitwise_and_(-0x4040404040404041)  # ~0x40 in each byte
        codes = torch.arange(64, dtype=torch.uint8, device="cpu").view(FP8_DTYPE).float()
        weight = words.view(FP8_DTYPE)[: math.prod(shape)].view(shape)
        return weight, float(codes.pow(2).mean().sqrt())
