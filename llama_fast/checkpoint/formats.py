"""The FP8 formats of checkpoints, recognized by config.json's quantization_config.

quant_method         weight e4m3 [N, K] and
fbgemm_fp8           weight_scale [N, 1]; activations bounded by activation_scale_ub
compressed-tensors   weight_scale [N, 1] or [1] (format float-quantized)
fp8                  weight_scale_inv, one per 128 x 128 block; without weight_block_size one per
                     tensor, named weight_scale_inv or weight_scale

A static scale of activations (input_scale, activation_scale) is ignored: they get a scale per row.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from ..reference import FP8_BLOCK

# Tensors that a checkpoint may contain and this model does not use.
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|input_scale|input_scale_ub|activation_scale)")


@dataclass(frozen=True)
class Format:
    scale_names: tuple[str, ...]  # of a weight's scale: one of them
    block: bool  # a scale per 128 x 128 block, else per row or tensor
    excluded: tuple[str, ...]  # modules that are not quantized
    activation_bound: float | None = None

    def scale(self, module: str, names: Container[str]) -> str:
        """Return the full name of a module's scale, the one of names if there is any."""
        candidates = [f"{module}.{name}" for name in self.scale_names]
        return next((name for name in candidates if name in names), candidates[0])

    def excludes(self, module: str) -> bool:
        """Compare names by whole components: layers.1 is not layers.12."""
        path = module.split(".")
        for pattern in self.excluded:
            if pattern.startswith("re:"):
                if re.match(pattern[3:], module):
                    return True
                continue
            parts = pattern.split(".")
            starts = range(len(path) - len(parts) + 1)
            if any(path[i : i + len(parts)] == parts for i in starts):
                return True
        return False


def parse(quantization: Any) -> Format | None:
    """Return the format, or None if not quantized. Raises ValueError for an unsupported format."""
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        got = type(quantization).__name__
        raise ValueError(f"quantization_config: got {got}, want an object")
    method = quantization.get("quant_method")
    if method == "fbgemm_fp8":
        bound = quantization.get("activation_scale_ub")
        excluded = _modules(quantization, "modules_to_not_convert")
        return Format(("weight_scale",), False, excluded, None if bound is None else float(bound))
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if block not in (None, [FP8_BLOCK, FP8_BLOCK]):
            raise ValueError(
                f"quantization_config.weight_block_size: got {block!r}, want [128, 128] or null"
            )
        names = ("weight_scale_inv",) if block else ("weight_scale_inv", "weight_scale")
        # AutoFP8 and vLLM write ignored_layers.
        keys = ("modules_to_not_convert", "ignored_layers")
        return Format(names, bool(block), sum((_modules(quantization, key) for key in keys), ()))
    if method == "compressed-tensors":
        _check_compressed_tensors(quantization)
        return Format(("weight_scale",), False, _modules(quantization, "ignore"))
    raise ValueError(
        f"quantization_config.quant_method: got {method!r}, "
        "want 'fbgemm_fp8', 'compressed-tensors' or 'fp8'"
    )


def describe(
    excluded: list[str], *, block: bool = False, activation_bound: float | None = None
) -> dict[str, Any]:
    """Return the quantization_config of a checkpoint whose linear layers, but the excluded ones,
    hold e4m3 with a scale per row, or per block; readers then quantize activations by token, or in
    blocks. Only one format stores a bound on activations, and only one stores blocks."""
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
    names = quantization.get(key) or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"quantization_config.{key}: got {names!r}, want a list of module names")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise ValueError(f"quantization_config.{key}: {name!r}: {error}") from None
    return tuple(names)


def _check_compressed_tensors(quantization: Mapping[str, Any]) -> None:
    if quantization.get("format") != "float-quantized":
        got = quantization.get("format")
        raise ValueError(f"quantization_config.format: got {got!r}, want 'float-quantized'")
    groups = quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise ValueError(f"quantization_config.config_groups.{name}.weights: missing")
        for key, wanted in (
            ("num_bits", (8,)),
            ("type", ("float",)),
            ("strategy", ("channel", "tensor")),
            ("symmetric", (True,)),
        ):
            if weights.get(key, wanted[0]) not in wanted:
                raise ValueError(
                    f"quantization_config.config_groups.{name}.weights.{key}: "
                    f"got {weights[key]!r}, want one of {wanted}"
                )
