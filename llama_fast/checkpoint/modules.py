"""Weights from a transformers model in memory, and back: every tensor is copied."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LlamaConfig
from ..nn import FP8Linear
from ..ops.quantize import quantize_fp8
from ..parallel import Span
from ..reference import FP8_BLOCK, FP8_DTYPE, dequantize_fp8, unpack_weight
from ..rope_scaling import RopeFunction
from .formats import scale_shapes
from .load import joined_scales
from .weights import DTYPES, Linear, Weights, assemble, packed


def read_config(model: Any) -> LlamaConfig:
    """Return a LlamaForCausalLM's config, with the stop ids of its generation_config. Raises
    TypeError for another class and ValueError for a setting that Llama does not have."""
    if not all(hasattr(model, name) for name in ("config", "model", "lm_head")):
        got = type(model).__name__
        raise TypeError(f"model: got {got}, want a LlamaForCausalLM of transformers")
    held = model.config.to_dict()
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    config = LlamaConfig.from_hf(held if eos is None else held | {"eos_token_id": eos})
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    if config.tie_word_embeddings and head is not embedding:  # by accelerate(), or by hand
        head = unpack_weight(head)
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            config = replace(config, tie_word_embeddings=False)  # as it computes
    return config


def read_weights(
    model: Any, config: LlamaConfig, dtype: torch.dtype, quantize: str | None, device: torch.device
) -> Weights:
    """Copy a model's weights. FP8Linear keeps its own; quantize applies to the others.

    Raises NotImplementedError or ValueError, with the module's name, for a linear layer of another
    kind (adapters, other quantizations), for weights that are not in memory, and for parameters
    that Llama does not have.
    """
    source = _Modules(model, dtype, device)
    weights = assemble(config, source, quantize)
    tied = {"lm_head"} if config.tie_word_embeddings else set()
    extra = [
        n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in source.seen | tied
    ]
    if extra:
        raise NotImplementedError(f"model: Llama has no {extra[0]}; merge adapters first")
    return weights


class _Modules:
    """The Source that reads modules."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self.seen: set[str] = set()

    def tensor(self, name: str, *dims: Span) -> Tensor:
        module = name.removesuffix(".weight")
        self.seen.add(module)
        weight = self._model.get_parameter(name).detach()
        _check(module, weight, tuple(map(len, dims)))
        return weight.to(self._device, self._dtype, copy=True)

    def linear(self, parts: dict[str, Span], k: Span, *, fp8: bool, bound: float | None) -> Linear:
        modules = {name: self._model.get_submodule(name) for name in parts}
        self.seen |= {*parts}
        rows, held = [len(span) for span in parts.values()], list(modules.values())
        weights = [_plain(name, module) for name, module in modules.items()]
        for name, weight, n in zip(parts, weights, rows, strict=True):
            _check(name, weight, (n, len(k)))
        weights = [weight.to(self._device) for weight in weights]
        scales = [_scale(m).to(self._device) for m in held if isinstance(m, FP8Linear)]
        if len(scales) == len(held):
            bounds = {(m.scale_ub, m.quantize_activation) for m in held}
            if len(bounds) > 1 or held[0].quantize_activation is not None:
                raise NotImplementedError(
                    f"{', '.join(parts)}: want one scale_ub, and quantize_activation=None"
                )
            weight = packed(_joined(weights))
            return Linear(weight, joined_scales(scales, rows, len(k)), scale_ub=held[0].scale_ub)
        weights = [
            dequantize_fp8(weight, _scale(m).to(self._device))
            if isinstance(m, FP8Linear)
            else weight
            for weight, m in zip(weights, held, strict=True)
        ]
        if not fp8:
            return Linear(packed(_joined([weight.to(self._dtype) for weight in weights])))
        pairs = [quantize_fp8(weight.contiguous(), "row") for weight in weights]
        q, scale = (_joined(list(each)) for each in zip(*pairs, strict=True))
        return Linear(packed(q), scale, scale_ub=bound)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Stack weights, FP8 ones as bytes: torch joins no FP8 on a CPU."""
    if tensors[0].dtype == FP8_DTYPE:
        return torch.cat([t.view(torch.uint8) for t in tensors]).view(FP8_DTYPE)
    return torch.cat(tensors)


def _plain(name: str, module: Any) -> Tensor:
    """Return a linear layer's weight [N, K]."""
    kind = type(module)
    if kind is not nn.Linear and not (
        isinstance(module, nn.Linear) and kind.__module__.startswith("llama_fast.")
    ):
        raise NotImplementedError(
            f"{name}: got {kind.__module__}.{kind.__name__}, want nn.Linear or lf.nn.FP8Linear"
        )
    if module.bias is not None:
        raise NotImplementedError(f"{name}: got a bias, want none")
    weight = module.weight.detach()
    if type(weight) is not Tensor:
        got = type(weight).__name__
        raise NotImplementedError(f"{name}.weight: got {got}, want an ordinary tensor")
    return unpack_weight(weight)


def _scale(module: FP8Linear) -> Tensor:
    scale = module.weight_scale
    return scale.reshape(scale_shapes(module.out_features, module.in_features)[tuple(scale.shape)])


def _check(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    if weight.is_meta:
        raise ValueError(f"{name}.weight: is on the meta device (offloaded); want it in memory")
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"{name}.weight: got shape {list(weight.shape)}, the config wants {list(shape)}"
        )
    if weight.dtype not in (*DTYPES, torch.float64, FP8_DTYPE):
        raise ValueError(f"{name}.weight: got {weight.dtype}, want 16 or 32 bits, or FP8")


# ---- and back ----


def to_transformers(config: LlamaConfig, weights: Weights) -> Any:
    """Return a LlamaForCausalLM with copies of the weights, bit for bit; FP8 layers are
    lf.nn.FP8Linear. Raises ImportError without transformers, and NotImplementedError for scales
    that FP8Linear does not have."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        raise ImportError(
            "to_transformers needs transformers: pip install 'llama_fast[hf]'"
        ) from None
    dtype, device = weights.embedding.dtype, weights.embedding.device
    with torch.device("meta"):
        model = LlamaForCausalLM(_hf_config(config)).to(dtype).eval()
    rotary = model.model.rotary_emb
    with torch.device(device):
        model.model.rotary_emb = type(rotary)(config=model.config)

    def put(name: str, weight: Tensor) -> None:
        model.get_submodule(name).weight = nn.Parameter(weight.clone())

    def split(linear: Linear, *names: str) -> None:
        modules = [model.get_submodule(name) for name in names]
        rows = [module.out_features for module in modules]
        plain = unpack_weight(linear.weight)
        if linear.scale is None:
            for name, part in zip(names, plain.split(rows), strict=True):
                put(name, part)
            return
        by_row, k = linear.scale.shape == (sum(rows), 1), plain.shape[1]
        if not by_row and linear.scale.shape[0] == sum(rows) > 1:
            raise NotImplementedError(f"{', '.join(names)}: scales by row and block of columns")
        at = 0
        for name, part, n in zip(names, plain.split(rows), rows, strict=True):
            height = n if by_row else -(-n // FP8_BLOCK)
            made = FP8Linear(
                k,
                n,
                bias=False,
                granularity="row" if by_row else "block",
                scale_ub=linear.scale_ub,
                device=device,
                dtype=dtype,
            )
            made.set_weight(part.contiguous(), linear.scale[at : at + height].clone())
            at += height
            model.set_submodule(name, made.eval())

    put("model.embed_tokens", weights.embedding)
    for i, layer in enumerate(weights.layers):
        at = f"model.layers.{i}"
        put(f"{at}.input_layernorm", layer.attention_norm)
        put(f"{at}.post_attention_layernorm", layer.ffn_norm)
        split(layer.qkv, *(f"{at}.self_attn.{name}_proj" for name in "qkv"))
        split(layer.output, f"{at}.self_attn.o_proj")
        split(layer.gate_up, f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
        split(layer.down, f"{at}.mlp.down_proj")
    put("model.norm", weights.norm)
    if weights.head.weight is weights.embedding:
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        model.config.tie_word_embeddings = False  # fp8_all quantizes a tied head apart
        split(weights.head, "lm_head")
    first = next((m for m in model.modules() if isinstance(m, FP8Linear)), None)
    if first is not None:
        from ..hf.fp8 import declare
        from ..hf.fp8_config import LlamaFastFP8Config

        made = LlamaFastFP8Config(granularity=first.granularity)
        made.format = replace(made.format, activation_bound=first.scale_ub)
        declare(model, made)
    return model


def _hf_config(config: LlamaConfig) -> Any:
    from transformers import LlamaConfig as HFConfig

    shared = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in ("rope_theta", "rope_scaling", "eos_token_id")
    }
    eos = config.eos_token_id
    shared["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos) or None
    scaling: dict[str, Any] = {"rope_type": "default"}
    if isinstance(config.rope_scaling, RopeFunction):
        scaling = {
            "rope_type": config.rope_scaling.rope_type,
            **dict(config.rope_scaling.parameters),
        }
    elif config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **vars(config.rope_scaling)}
    if hasattr(HFConfig(), "rope_parameters"):  # transformers 5
        return HFConfig(**shared, rope_parameters={**scaling, "rope_theta": config.rope_theta})
    return HFConfig(**shared, rope_theta=config.rope_theta, rope_scaling=scaling)
