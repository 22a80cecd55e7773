"""accelerate(): run a transformers model's layers on the kernels, in place."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.weights import ACTIVATION_BOUND
from ..nn import FP8Linear
from ..ops.checks import ACTIVATIONS
from ..reference import unpack_weight
from . import linears, modules
from .attention import NAME
from .fp8 import declare
from .fp8_config import LlamaFastFP8Config
from .linears import PackedLinear

QUANTIZE = (None, "fp8", "fp8_all", "fp8_ffn")
# The architectures whose layers are Llama's: module in transformers -> prefix of its classes.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_FORMS: dict[str, Any] = {
    "RMSNorm": modules.RMSNorm,
    "RotaryEmbedding": modules.RotaryEmbedding,
    "MLP": modules.MLP,
    "Attention": modules.Attention,
    "DecoderLayer": modules.DecoderLayer,
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FFN = ("gate_proj", "up_proj", "down_proj")
STATE = "_llama_fast"  # an attribute of an accelerated model


@dataclass
class State:
    """What restore() and report() need to know about an accelerated model."""

    config: Any  # the model's config before accelerate()
    quantize: str | None
    left: dict[str, str] = field(default_factory=dict)  # module's name -> why it is untouched
    # names of linears -> whether the weights required a gradient
    quantized: dict[str, bool] = field(default_factory=dict)


def accelerate(model: PreTrainedModel, quantize: str | None = None) -> PreTrainedModel:
    """Run a transformers model's layers on the kernels, in place, and return it.

    model: Llama, Mistral, Qwen2 or Qwen3, with or without a head, of bf16, fp16 or fp32. Modules
    keep their names, parameters and places, and are still instances of their classes. Weights are
    rearranged one layer at a time, without a second copy. A module of another form, or with hooks
    or an adapter, stays as it is: report(model) shows it with the reason. Other models do not
    change.

    quantize: "fp8" for every linear layer but the head, "fp8_all" with the head, "fp8_ffn" for
    Meta's 405B recipe: the feed-forward layers but the first and the last. FP8 weights are frozen.
    Call accelerate again after replacing weights or moving the model.

    Raises TypeError unless model is a transformers model, and ValueError for a quantize that is
    unknown or another than before, or if it would quantize weights that are being trained.
    """
    if not isinstance(model, PreTrainedModel):
        got = type(model).__name__
        raise TypeError(f"model: got {got}, want a model of transformers (PreTrainedModel)")
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize: got {quantize!r}, want None, 'fp8', 'fp8_all' or 'fp8_ffn'")
    if quantize and model.training and any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"quantize: got {quantize!r} for a model in training mode, whose linear layers it "
            "would freeze; call model.eval() or model.requires_grad_(False) first"
        )
    state = getattr(model, STATE, None)
    if state is not None and state.quantized and quantize not in (None, state.quantize):
        raise ValueError(
            f"quantize: got {quantize!r} for a model that is in {state.quantize!r}; "
            "call restore(model) first"
        )
    if state is None:
        state = State(model.config, quantize)
        setattr(model, STATE, state)
        use_config(model, model.config, _with_attention(model))
    state.quantize = quantize or state.quantize
    state.left = {}
    taker = _Taker(model, state, quantize)
    # A list of all modules would keep replaced ones alive, and with them a second copy of weights.
    formed = [(n, m, f) for n, m in model.named_modules() if (f := _form(m)) is not None]
    for name, module, form in formed:
        if linears.hooked(module) and "forward" in module.__dict__:
            state.left[name] = "its forward is replaced"
            continue
        if form in ("Attention", "MLP"):
            taker.take_layer_part(module, name, form)
        if form == "MLP" and not _is_silu(module):
            state.left[name] = "its activation is not SiLU"
            continue
        if modules.original(module) is None:
            modules.swap(module, _FORMS[form])
        if isinstance(module, modules.Fusing) and (why := module.fuse()) is not None:
            state.left[f"{name}.{'|'.join(module.together)}"] = f"not fused: {why}"
    if "lm_head" in model._modules:
        taker.take(model, "lm_head", fp8=quantize == "fp8_all")
    if state.quantized:
        declare(model, LlamaFastFP8Config("fp8_ffn" if state.quantize == "fp8_ffn" else "fp8"))
        if "lm_head" in state.quantized:  # no longer the embedding's weight
            model.config.tie_word_embeddings = False
    if not formed:
        state.left[""] = f"{type(model).__name__} is none of {', '.join(FAMILIES.values())}"
        warnings.warn(f"llama_fast: nothing to accelerate: {state.left['']}", stacklevel=2)
    return model


def _form(module: nn.Module) -> str | None:
    """Return the name in _FORMS of a module's class, swapped or not, or None."""
    cls = modules.original(module) or type(module)
    return _known().get(cls)


@functools.cache
def _known() -> dict[type, str]:
    from importlib import import_module

    known = {}
    for package, prefix in FAMILIES.items():
        theirs = import_module(f"transformers.models.{package}.modeling_{package}")
        for form in _FORMS:
            known[getattr(theirs, f"{prefix}{form}")] = form
    return known


def _is_silu(mlp: nn.Module) -> bool:
    act = mlp.act_fn
    return isinstance(act, nn.SiLU) or type(act).__name__ in ("SiLUActivation", "SiLU")


def _with_attention(model: PreTrainedModel) -> Any:
    """Return a copy of the model's config that selects our attention. It is a copy because other
    models may share the config."""
    config = copy.copy(model.config)
    config._attn_implementation = NAME
    return config


def use_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new


class _Taker:
    """Packs or quantizes linears one by one."""

    def __init__(self, model: PreTrainedModel, state: State, quantize: str | None) -> None:
        self.state, self.quantize = state, quantize
        self.layers = [n for n, m in model.named_modules() if _form(m) == "DecoderLayer"]
        self.owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())

    def take_layer_part(self, module: nn.Module, name: str, form: str) -> None:
        """Take the linears of an attention or an MLP."""
        ffn = form == "MLP"
        inner = name.rpartition(".")[0] in self.layers[1:-1]
        recipe_ffn = self.quantize == "fp8_ffn" and ffn and inner
        fp8 = self.quantize in ("fp8", "fp8_all") or recipe_ffn
        together = _FORMS[form].together
        packable = linears.packable_together([getattr(module, part) for part in together])
        for part in _FFN if ffn else _ATTENTION:
            allowed = packable or part not in together
            bound = ACTIVATION_BOUND if recipe_ffn else None
            self.take(module, f"{name}.{part}", fp8=fp8, bound=bound, packable=allowed)

    def take(
        self,
        owner: nn.Module,
        name: str,
        *,
        fp8: bool,
        bound: float | None = None,
        packable: bool = True,
    ) -> None:
        """Pack the owner's linear, or replace it by an FP8 one, or note why not."""
        last = name.rpartition(".")[2]
        linear: Any = getattr(owner, last)
        if type(linear) is FP8Linear:
            return
        if why := self._why_not(linear, fp8):
            self.state.left[name] = why
        elif not fp8:
            linears.pack(linear, packable)
        else:
            if linear.weight.dim() == 4:
                linear.weight.data = unpack_weight(linear.weight.data)
            setattr(owner, last, FP8Linear.from_linear(linear, scale_ub=bound))
            self.state.quantized[name] = linear.weight.requires_grad

    def _why_not(self, linear: nn.Module, fp8: bool) -> str | None:
        if type(linear) not in (nn.Linear, PackedLinear):
            return f"it is {type(linear).__module__}.{type(linear).__qualname__}"
        if linears.hooked(linear):
            return "it has hooks"
        weight = linear._parameters["weight"]
        if weight is None or weight.dtype not in ACTIVATIONS:
            return f"its weight is {None if weight is None else weight.dtype}"
        if weight.is_meta:
            return "its weight is on the meta device"
        if not fp8 and self.owners[id(weight)] > 1:
            return "another module has the same weight"
        return None
