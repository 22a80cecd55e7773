"""The FP8 formats of checkpoints, recognized by config.json's quantization_config.

quant_method         the scale of a weight e4m3 [N, K]
fbgemm_fp8           weight_scale by row; activations bounded by activation_scale_ub
compressed-tensors   weight_scale by tensor, row, 1 x 128 group or 128 x 128 block
                     (float-quantized, naive-quantized)
fp8                  weight_scale_inv by block; or, without weight_block_size (AutoFP8),
                     weight_scale or weight_scale_inv by tensor
modelopt             weight_scale by tensor, row or block; may be in hf_quant_config.json instead

Scales multiply: weight = e4m3 * scale. A scale's shape gives its granularity (scale_shapes). Static
scales of activations (input_scale, activation_scale) are ignored: activations get one per row.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from ..files import read_json
from ..reference import FP8_BLOCK
from ..rope_scaling import positive, shown
from .patterns import Patterns

# Tensors that a checkpoint may contain and this model does not use.
IGNORED = re.compile(
    r"(?:.*\.)?(?:inv_freq|original_inv_freq|cos_cached|sin_cached|rope\.freqs"
    r"|activation_scale|(?:input|output|[qkv]|kv|prob)_scale|input_scale_ub|[a-z]+_zero_point)"
)
# Names, in a layer's self_attn, of the scale of K or V in an FP8 KV cache; {} stands for k or v.
KV_SCALES = (
    "{}_scale",  # compressed-tensors
    "{0}_proj.{0}_scale",  # ModelOpt
    "{}_proj.output_scale",  # AutoFP8, older compressed-tensors and ModelOpt
    "attn.{}_scale",  # vLLM
    "kv_scale",  # the first AutoFP8: one for both
)

# The keys of quantization_config that list the modules which are not quantized.
_EXCLUDED = {
    "fbgemm_fp8": ("modules_to_not_convert",),
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "compressed-tensors": ("ignore",),
    "modelopt": ("ignore", "exclude_modules"),
}
MODELOPT = "hf_quant_config.json"  # where ModelOpt describes a quantization
_BLOCK = [FP8_BLOCK, FP8_BLOCK]
# What a method's settings may be; the first is the default.
_SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "fp8": {"weight_block_size": (None, _BLOCK)},
    "compressed-tensors": {"format": ("float-quantized", "naive-quantized")},
    "modelopt": {"quant_algo": ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")},
}
_WEIGHTS: dict[str, tuple[Any, ...]] = {  # of a group in config_groups
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (True,),
    "strategy": ("tensor", "channel", "block", "group"),
    "block_structure": (None, _BLOCK),
    "group_size": (None, FP8_BLOCK),
}


@dataclass(frozen=True)
class Format:
    scale_names: tuple[str, ...]  # of a weight's scale: one of them
    block: bool  # a scale per 128 x 128 block, else per row or tensor
    excluded: tuple[str, ...]  # modules that are not quantized
    activation_bound: float | None = None

    def scale(self, module: str, names: Container[str]) -> str:
        """Return the full name of a module's scale: the one among names, or the first possible."""
        candidates = [f"{module}.{name}" for name in self.scale_names]
        return next((name for name in candidates if name in names), candidates[0])

    def excludes(self, module: str) -> bool:
        """Return whether a module is excluded: by whole components of its name (layers.1 is not
        layers.12), a wildcard (ModelOpt) or a regular expression."""
        path = module.split(".")
        bounds = combinations(range(len(path) + 1), 2)
        named = any(".".join(path[i:j]) in self._names for i, j in bounds)
        try:
            return named or self._patterns.match(module)
        except ValueError as error:
            raise ValueError(f"quantization_config: {error}") from None

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.excluded)

    @cached_property
    def _patterns(self) -> Patterns:
        return Patterns(_regexes(self.excluded))


def scale_shapes(n: int, k: int) -> dict[tuple[int, ...], tuple[int, int]]:
    """Return the shapes in which formats store the scale of a weight [n, k], each with the one that
    the kernels take: [1, 1], [n, 1], [n, ceil(k / 128)] or one per 128 x 128 block."""
    down, across = -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)
    used = ((1, 1), (n, 1), (n, across), (down, across))
    others = {(): (1, 1), (1,): (1, 1), (n,): (n, 1), (down, 1, across, 1): (down, across)}
    return {**others, **{shape: shape for shape in used}}


def read_format(folder: Path) -> Format | None:
    """Return the format of a checkpoint's weights, or None if its configs name no quantization."""
    return parse(quantization_of(folder))


def quantization_of(folder: Path) -> Any:
    """Return what the configs say of the weights' quantization, as parse takes it."""
    held = read_json(folder / "config.json").get("quantization_config")
    if held is None and (folder / MODELOPT).exists():
        held = read_json(folder / MODELOPT).get("quantization")
        held = {**held, "quant_method": "modelopt"} if isinstance(held, Mapping) else held
    return held


def parse(quantization: Any) -> Format | None:
    """Return the format, or None if not quantized. Raises ValueError for an unsupported format."""
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        got = type(quantization).__name__
        raise ValueError(f"quantization_config: got {got}, want an object")
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in _EXCLUDED:
        raise ValueError(
            f"quantization_config.quant_method: got {shown(method)}, want one of "
            f"{', '.join(_EXCLUDED)}"
        )
    _check("quantization_config", quantization, _SUPPORTED.get(method, {}))
    block = quantization.get("weight_block_size") is not None
    block = block or quantization.get("quant_algo") == "FP8_PB_WO"
    groups = quantization.get("config_groups") if method == "compressed-tensors" else None
    groups = {} if groups is None else groups
    if not isinstance(groups, Mapping):
        got = type(groups).__name__
        raise ValueError(f"quantization_config.config_groups: got {got}, want an object")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise ValueError(f"quantization_config.config_groups.{name}.weights: missing")
        _check(f"quantization_config.config_groups.{name}.weights", weights, _WEIGHTS)
        block = block or weights.get("strategy") == "block"
    names = ("weight_scale_inv", "weight_scale") if method == "fp8" else ("weight_scale",)
    excluded = sum((_modules(quantization, key) for key in _EXCLUDED[method]), ())
    bound = quantization.get("activation_scale_ub")
    if bound is not None:
        positive("quantization_config.activation_scale_ub", bound)
        bound = float(bound)
    return Format(names, block, excluded, bound)


def describe(
    excluded: list[str], *, block: bool = False, activation_bound: float | None = None
) -> dict[str, Any]:
    """Return the quantization_config of a checkpoint whose linear layers, except the excluded ones,
    hold e4m3 with a scale per row or block; readers then quantize activations by token or block.
    Only one format stores a bound on activations, and only one stores blocks."""
    if block:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "modules_to_not_convert": excluded,
        }
    if activation_bound is not None:
        return {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": activation_bound,
            "modules_to_not_convert": excluded,
        }
    e4m3 = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**e4m3, "strategy": "channel", "dynamic": False},
                "input_activations": {**e4m3, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": excluded,
        "kv_cache_scheme": None,
    }


def _modules(quantization: Mapping[str, Any], key: str) -> tuple[str, ...]:
    at, names = f"quantization_config.{key}", quantization.get(key) or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{at}: got {shown(names)}, want a list of module names")
    try:
        Patterns(_regexes(names))
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None
    return tuple(names)


def _regexes(names: Iterable[str]) -> dict[str, str]:
    """Return the regular expressions in a list of modules, and those that its wildcards mean."""
    regexes = {name: name[3:] for name in names if name.startswith("re:")}
    wildcards = (name for name in names if "*" in name and name not in regexes)
    return regexes | {name: re.escape(name).replace(r"\*", ".*") + r"\Z" for name in wildcards}


def _check(at: str, settings: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    for key, wanted in supported.items():
        if settings.get(key, wanted[0]) not in wanted:
            raise ValueError(f"{at}.{key}: got {shown(settings[key])}, want one of {list(wanted)}")
