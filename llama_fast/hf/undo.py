"""restore(): undo accelerate()."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.shards import Shards
from ..nn import FP8Linear
from ..ops.checks import ACTIVATIONS
from ..ops.quantize import quantize_fp8
from ..reference import unpack_weight
from . import linears, modules
from .apply import STATE, use_config
from .fp8 import DECLARED


def restore(model: PreTrainedModel, path: str | Path | None = None) -> PreTrainedModel:
    """Undo accelerate(), in place, and return the model, its weights bit for bit as they were.

    Weights that were quantized to FP8 are read again from the checkpoint folder at path; None: the
    folder that the model was loaded from. Raises ValueError, before anything changes, if there is
    no such folder or if it does not hold the weights that were quantized.
    """
    state = getattr(model, STATE, None)
    if state is None:
        return model
    source = _Checkpoint(model, path) if state.quantized else None
    for name in sorted(state.quantized):
        assert source is not None
        source.check(name, model.get_submodule(name))
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        if source is not None and name in state.quantized:
            linear = source.linear(name, module)
            linear.weight.requires_grad_(state.quantized[name])
            if name == "lm_head" and state.config.tie_word_embeddings:
                linear.weight = model.get_input_embeddings().weight
            model.set_submodule(name, linear)
        elif type(module) is FP8Linear:
            module.weight.data = module.weight.data.clone()  # it may be a view of a fused one
        elif type(module) is linears.PackedLinear:
            linears.unpack(module)
        elif (base := modules.original(module)) is not None:
            module.__dict__.pop("_fused", None)
            module.__class__ = base
    use_config(model, model.config, state.config)
    if state.quantized:
        for name in DECLARED:
            model.__dict__.pop(name, None)
    delattr(model, STATE)
    return model


class _Checkpoint:
    """The weights that were quantized to FP8, in a folder of safetensors."""

    def __init__(self, model: PreTrainedModel, path: str | Path | None) -> None:
        source = path or model.name_or_path
        remedy = "pass restore(model, path), or load the model again with from_pretrained"
        if not source or not Path(source).is_dir():
            held = f"{str(source)!r} is no folder" if source else "there is no folder"
            raise ValueError(
                f"model: its weights were quantized, and {held} to read them from; {remedy}"
            )
        self.folder, self.remedy = Path(source), remedy
        self.shards = Shards(self.folder)
        self.prefix = model.base_model_prefix
        self.dtype = next(p.dtype for p in model.parameters() if p.dtype in ACTIVATIONS)

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
        q, scale = quantize_fp8(self.read(name).to(module.weight.device))
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
