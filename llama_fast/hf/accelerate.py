"""accelerate() a transformers model in place, and restore() it."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.shards import Shards
from ..checkpoint.weights import ACTIVATION_BOUND
from ..nn import FP8Linear
from ..ops.quantize import quantize_fp8
from ..reference import unpack_weight
from . import linears, modules
from .attention import NAME

QUANTIZE = (None, "fp8", "fp8_all", "fp8_ffn")
# The architectures whose layers are Llama's, and the classes of theirs that have our forms.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_FORMS = {
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
    """What restore() and report() need to know of an accelerated model."""

    config: Any  # before accelerate()
    quantize: str | None
    left: dict[str, str] = field(default_factory=dict)  # module's name -> why it is untouched


def accelerate(model: PreTrainedModel, quantize: str | None = None) -> PreTrainedModel:
    """Run a transformers model's layers on the kernels, in place, and return it.

    model: Llama, Mistral, Qwen2 or Qwen3, with or without a head, of bf16, fp16 or fp32. Modules
    keep their names, parameters and places, and are still instances of their classes. Weights are
    rearranged one layer at a time, without a second copy. What has another form, hooks or an
    adapter stays as it is: report(model) shows it with the reason. Other models are untouched.

    quantize: "fp8" for every linear layer but the head, "fp8_all" with the head, "fp8_ffn" for
    Meta's 405B recipe: the feed-forward layers but the first and the last. FP8 weights are frozen.
    Call accelerate again after weights were replaced or the model was moved.

    Raises TypeError for something other than a transformers model, ValueError for an unknown
    quantize or to quantize weights that are being trained.
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
    if state is None:
        state = State(model.config, quantize)
        setattr(model, STATE, state)
        _use_config(model, model.config, _with_attention(model))
    state.quantize = quantize or state.quantize
    state.left = {}
    shared = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    layers = [n for n, m in model.named_modules() if _form(m) == "DecoderLayer"]
    for name, module in list(model.named_modules()):
        form = _form(module)
        if form is None:
            continue
        if linears.hooked(module) and "forward" in module.__dict__:
            state.left[name] = "its forward is replaced"
            continue
        if form in ("Attention", "MLP"):
            inside = 0 < layers.index(name.rpartition(".")[0]) < len(layers) - 1
            _take_linears(module, name, form, state, shared, inside, quantize)
        if form == "MLP" and not _is_silu(module):
            state.left[name] = "its activation is not SiLU"
            continue
        if modules.original(module) is None:
            modules.swap(module, _FORMS[form])
        if isinstance(module, modules.Fusing) and (why := module.fuse()) is not None:
            state.left[f"{name}.{'|'.join(module.together)}"] = f"not fused: {why}"
    _take_head(model, state, shared, quantize)
    if not layers:
        state.left[""] = f"{type(model).__name__} is none of {', '.join(FAMILIES.values())}"
        warnings.warn(f"llama_fast: nothing to accelerate: {state.left['']}", stacklevel=2)
    return model


def restore(model: PreTrainedModel, path: str | Path | None = None) -> PreTrainedModel:
    """Undo accelerate(), in place, and return the model, its weights bit for bit as they were.

    Weights that were quantized to FP8 are read again from the checkpoint at path, a folder; None:
    the folder that the model was loaded from. Raises ValueError before anything changes if there is
    none, or if it does not hold the weights that were quantized.
    """
    state = getattr(model, STATE, None)
    if state is None:
        return model
    quantized = {n: m for n, m in model.named_modules() if type(m) is FP8Linear}
    source = _Checkpoint(model, state, path) if quantized else None
    if source is not None:
        for name, module in quantized.items():
            source.check(name, module)
    for name, module in list(model.named_modules()):
        if source is not None and name in quantized:
            _replace(model, name, source.linear(name, quantized[name]))
        elif type(module) is linears.PackedLinear:
            linears.unpack(module)
        elif (base := modules.original(module)) is not None:
            module.__dict__.pop("_fused", None)
            module.__class__ = base
    _use_config(model, model.config, state.config)
    delattr(model, STATE)
    return model


def _form(module: nn.Module) -> str | None:
    """Return which of _FORMS a module has, swapped already or not."""
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
    """Return a copy of the model's config that selects our attention. A config may be shared with
    other models."""
    config = copy.copy(model.config)
    config._attn_implementation = NAME
    return config


def _use_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new


def _take_linears(
    module: nn.Module,
    name: str,
    form: str,
    state: State,
    shared: Counter[int],
    inside: bool,
    quantize: str | None,
) -> None:
    """Pack or quantize the linears of an attention or an MLP."""
    bound = ACTIVATION_BOUND if quantize == "fp8_ffn" else None
    fp8 = quantize in ("fp8", "fp8_all") or (quantize == "fp8_ffn" and form == "MLP" and inside)
    together = modules.Attention.together if form == "Attention" else modules.MLP.together
    packable = linears.packable_together([module._modules[part] for part in together])
    for part in _ATTENTION if form == "Attention" else _FFN:
        allowed = packable or part not in together
        why = _take(module, part, shared, fp8=fp8, bound=bound, packable=allowed)
        if why is not None:
            state.left[f"{name}.{part}"] = why


def _take(
    owner: nn.Module,
    name: str,
    shared: Counter[int],
    *,
    fp8: bool,
    bound: float | None = None,
    packable: bool = True,
) -> str | None:
    """Pack the linear owner.name, or replace it by an FP8 one. Return why not, if so."""
    linear = owner._modules[name]
    if type(linear) is FP8Linear:
        return None
    if type(linear) not in (nn.Linear, linears.PackedLinear):
        return f"it is {type(linear).__module__}.{type(linear).__qualname__}"
    if linears.hooked(linear):
        return "it has hooks"
    if linear.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its weight is {linear.weight.dtype}"
    if linear.weight.is_meta:
        return "its weight is on the meta device"
    if not fp8 and shared[id(linear.weight)] > 1:
        return "another module has the same weight"
    if not fp8:
        linears.pack(linear, packable)
        return None
    if linear.weight.dim() == 4:
        linear.weight.data = unpack_weight(linear.weight.data)
    setattr(owner, name, FP8Linear.from_linear(linear, scale_ub=bound))
    return None


def _take_head(
    model: PreTrainedModel, state: State, shared: Counter[int], quantize: str | None
) -> None:
    """Pack or quantize the output projection, if the model has one under its usual name."""
    if "lm_head" not in model._modules:
        return
    why = _take(model, "lm_head", shared, fp8=quantize == "fp8_all")
    if why is not None:
        state.left["lm_head"] = why


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


class _Checkpoint:
    """The weights that FP8 ones were made of, in a folder of safetensors."""

    def __init__(self, model: PreTrainedModel, state: State, path: str | Path | None) -> None:
        folder = Path(path or model.name_or_path or "")
        remedy = "pass restore(model, path), or load the model again with from_pretrained"
        if not (path or model.name_or_path) or not folder.is_dir():
            raise ValueError(
                f"model: its weights were quantized, and {str(folder)!r}, from where it was "
                f"loaded, is no folder to read them from; {remedy}"
            )
        self.folder, self.remedy = folder, remedy
        self.shards = Shards(folder)
        self.prefix = model.base_model_prefix
        self.dtype = next(p.dtype for p in model.parameters() if p.dtype != torch.float8_e4m3fn)

    def read(self, name: str) -> Tensor:
        for key in self._keys(name):
            if key in self.shards.entries:
                return self.shards.read(key).to(self.dtype)
        raise ValueError(f"{self.folder}: has no {name}.weight; {self.remedy}")

    def _keys(self, name: str) -> Iterator[str]:
        yield f"{name}.weight"
        yield f"{self.prefix}.{name}.weight"  # a model without a head, of a checkpoint with one
        yield re.sub(rf"^{self.prefix}\.", "", name) + ".weight"  # and the reverse
        if name == "lm_head":
            yield f"{self.prefix}.embed_tokens.weight"

    def check(self, name: str, module: FP8Linear) -> None:
        """Raise ValueError unless quantizing the checkpoint's weight gives the module's."""
        q, scale = quantize_fp8(self.read(name))
        same = torch.equal(q.view(torch.uint8), unpack_weight(module.weight.data).view(torch.uint8))
        if not same or not torch.equal(scale, module.weight_scale):
            raise ValueError(
                f"{self.folder}: its {name}.weight is not what was quantized; {self.remedy}"
            )

    def linear(self, name: str, module: FP8Linear) -> nn.Linear:
        weight = self.read(name).to(module.weight.device)
        out = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        out.weight = nn.Parameter(weight)
        out.register_parameter("bias", module.bias)
        return out.train(module.training)
