"""FP8 weights in transformers, on CPUs and GPUs: quantize while loading, or load FP8 checkpoints.

    from_pretrained(path, quantization_config=LlamaFastFP8Config())

gives FP8Linear for the linear layers. transformers itself refuses fbgemm_fp8 without an H100 or
newer, and dequantizes fp8 on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantizer

from ..checkpoint.formats import IGNORED
from ..checkpoint.shards import Shards
from ..checkpoint.weights import is_quantized
from ..nn import FP8Linear
from ..reference import FP8_DTYPE
from .fp8_config import METHOD, LlamaFastFP8Config, scale_names

DECLARED = ("hf_quantizer", "is_quantized", "quantization_method")  # attributes of a model


@register_quantizer(METHOD)
class LlamaFastFP8Quantizer(HfQuantizer):
    """Replace linear layers by FP8Linear before transformers loads their tensors."""

    requires_parameters_quantization = True  # transformers 4: calls create_quantized_param
    quantization_config: LlamaFastFP8Config
    _chosen: frozenset[str] | set[str] = frozenset()  # the modules to quantize
    _dtype: torch.dtype | None = None  # the model's, kept here while transformers 4 loads it

    @property
    def is_trainable(self) -> bool:
        return True  # adapters; the weights are frozen

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        model.config.quantization_config = self.quantization_config
        ignored = model._keys_to_ignore_on_load_unexpected
        kind = set if isinstance(ignored, set) else list  # transformers 5, 4
        model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), IGNORED.pattern])
        if not self.pre_quantized:
            config, layers = self.quantization_config, model.config.num_hidden_layers
            if config.recipe == "fp8_all" and model.config.tie_word_embeddings:
                raise ValueError(
                    "recipe: got 'fp8_all', want another for a head that is tied to the embedding; "
                    "`llama-fast quantize --recipe fp8_all` writes an untied checkpoint"
                )
            self._chosen = {
                name
                for name, module in model.named_modules()
                if is_quantized(name, config.recipe, layers)
                and _is_linear(module)
                and not config.format.excludes(name)
            }
        elif checkpoint_files:
            entries = Shards(Path(checkpoint_files[0]).parent).entries
            self._replace_stored(model, entries)
            for name, entry in entries.items():  # transformers would cast from one to the other
                module, fp8 = _submodule(model, name.removesuffix(".weight")), "F8_E4M3"
                if not isinstance(module, nn.Linear) or not name.endswith(".weight"):
                    continue
                if (entry.dtype == fp8) != isinstance(module, FP8Linear):
                    has = "no scale" if entry.dtype == fp8 else "a scale of FP8"
                    raise ValueError(f"{entry.file}: {name}: is {entry.dtype}, but has {has}")
        return model

    def update_expected_keys(
        self, model: Any, expected_keys: list[str], loaded_keys: list[str]
    ) -> list[str]:
        """Replace the modules here in transformers 4, which only now names the file's tensors."""
        if self.pre_quantized:
            self._replace_stored(model, loaded_keys)
        if self._dtype is None:
            # It would cast tensors to this dtype before they reach a module: fp32 scales to bf16,
            # and fp32 weights to bf16, which rounds twice.
            self._dtype = model.config._pre_quantization_dtype
            model.config._pre_quantization_dtype = None
        return list(model.state_dict())

    def _replace_stored(self, model: Any, names: Iterable[str]) -> None:
        """Replace the modules whose scale is among the checkpoint's names."""
        form = self.quantization_config.format
        for name in names:
            module, _, parameter = name.rpartition(".")
            if parameter in form.scale_names:
                if form.excludes(module):
                    raise ValueError(
                        f"{name}: is in the checkpoint, but quantization_config says that the "
                        "module is not converted"
                    )
                self._replace(model, module, parameter)

    def _replace(self, model: Any, name: str, scale_name: str) -> None:
        linear = _submodule(model, name)
        if not _is_linear(linear):
            return  # of a layer that this model lacks
        form = self.quantization_config.format
        made = FP8Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            granularity="block" if form.block else "row",
            quantize_activation=self.quantization_config.quantize_activation,
            scale_ub=form.activation_bound,
            device="meta",
            dtype=linear.weight.dtype,
        )
        made._buffers[scale_name] = made._buffers.pop("weight_scale")  # as in the file
        model.set_submodule(_own_name(model, name), made)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether this class, not transformers, puts the tensor into the model: a weight to
        quantize, or (transformers 4) a stored scale."""
        path, _, name = param_name.rpartition(".")
        if self.pre_quantized:
            module = model.get_submodule(path)
            return isinstance(module, FP8Linear) and name in module._buffers
        return name == "weight" and path in self._chosen

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, **kwargs: Any
    ) -> None:
        """Put a tensor that param_needs_quantization() names into the model (transformers 4)."""
        path, _, name = param_name.rpartition(".")
        if self.pre_quantized:
            model.get_submodule(path)._buffers[name] = param_value.to(target_device)
        else:
            self.quantize(model, path, param_value.to(target_device))

    def quantize(self, model: Any, name: str, weight: Tensor) -> None:
        """Replace a linear layer whose weight has just been read."""
        linear, form = model.get_submodule(name), self.quantization_config.format
        linear.weight = nn.Parameter(weight, requires_grad=False)
        try:
            made = FP8Linear.from_linear(
                linear,
                "block" if form.block else "row",
                quantize_activation=self.quantization_config.quantize_activation,
                scale_ub=form.activation_bound,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        vars(made)["_is_hf_initialized"] = (
            True  # or transformers would initialize it as an nn.Linear
        )
        model.set_submodule(name, made)

    def get_quantize_ops(self) -> Any:
        return _quantize_op()(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if _is_linear(module) and module.weight.dtype == FP8_DTYPE:
                raise ValueError(f"{name}.weight: is FP8, but has no scale")
            if not isinstance(module, FP8Linear) or not self.pre_quantized:
                continue
            (scale,) = module._buffers.values()
            module._buffers.clear()
            module.register_buffer("weight_scale", module.new_scale("meta"))
            try:
                assert scale is not None
                module.set_weight(module.weight.detach(), scale)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
        if self._dtype is not None:
            model.config._pre_quantization_dtype = self._dtype
            model.to(self._dtype)
        return model

    def get_state_dict_and_metadata(
        self, model: Any, safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return what save_pretrained writes, and note which layers are not in FP8. Raises
        NotImplementedError for what the format cannot say of a layer."""
        config, modules = self.quantization_config, dict(model.named_modules())
        config.left = _left(model)
        granularity = "block" if config.format.block else "row"
        for name, module in modules.items():
            if not isinstance(module, FP8Linear):
                continue
            got = (module.granularity, module.scale_ub)
            if got != (want := (granularity, config.format.activation_bound)):
                raise NotImplementedError(
                    f"{name}: has scales by {got[0]} and scale_ub {got[1]}, but one format holds "
                    f"all layers, here by {want[0]} and scale_ub {want[1]}; `llama-fast quantize` "
                    "writes FP8 checkpoints"
                )
        (scale_name,) = scale_names(granularity)
        renamed = {
            f"{name}.weight_scale": f"{name}.{scale_name}"
            for name, module in modules.items()
            if isinstance(module, FP8Linear)
        }
        return {renamed.get(name, name): t for name, t in model.state_dict().items()}, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, FP8Linear):
                model.set_submodule(name, module.to_linear(dtype or model.dtype))
        return model


def declare(model: Any, config: LlamaFastFP8Config) -> None:
    """Declare FP8 weights to transformers: save_pretrained then writes what from_pretrained reads,
    and the Trainer requires adapters."""
    config.left = _left(model)
    declared = (LlamaFastFP8Quantizer(config), True, config.quant_method)
    model.__dict__.update(zip(DECLARED, declared, strict=True))
    model.config.quantization_config = config


def _left(model: Any) -> list[str]:
    """Return the linear layers that are not in FP8."""
    held = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [name for name, module in held if not isinstance(module, FP8Linear)]


@functools.cache
def _quantize_op() -> Any:
    """Return transformers 5's operation for a weight that is quantized while it is loaded."""
    from transformers.core_model_loading import ConversionOps

    class QuantizeFP8(ConversionOps):
        def __init__(self, quantizer: LlamaFastFP8Quantizer) -> None:
            self.quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
            ((name, weight),) = input_dict.items()
            weight = weight[0] if isinstance(weight, list) else weight
            self.quantizer.quantize(kwargs["model"], name.removesuffix(".weight"), weight)
            kwargs["missing_keys"].discard(name)
            return {}  # nothing is left for transformers to put into the model

    return QuantizeFP8


def _is_linear(module: Any) -> bool:
    return type(module) is nn.Linear


def _own_name(model: Any, name: str) -> str:
    """Return the module's name in the model, which may be the checkpoint's inner or outer one."""
    prefix = f"{model.base_model_prefix}."
    if name.startswith(prefix) and not hasattr(model, model.base_model_prefix):
        return name.removeprefix(prefix)
    if hasattr(model, model.base_model_prefix) and name.startswith("layers."):
        return prefix + name
    return name


def _submodule(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(_own_name(model, name))
    except AttributeError:
        return None
