"""LlamaFastFP8Config: the quantization_config of FP8 weights in transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.formats import Format, describe, parse
from ..checkpoint.weights import ACTIVATION_BOUND, RECIPES

METHOD = "llama_fast_fp8"
_GRANULARITIES = ("row", "block")


@register_quantization_config(METHOD)
class LlamaFastFP8Config(QuantizationConfigMixin):
    """Quantize a model's linear layers to FP8 while it is loaded, or load its FP8 checkpoint.

    recipe: "fp8" for all linear layers but the head; "fp8_all" for the head too, unless it is tied
    to the embedding; "fp8_ffn" for Meta's 405B recipe, the feed-forward ones of all but the first
    and the last layer, with activations bounded by 1200. granularity: a scale per "row" or per
    128 x 128 "block". modules_to_not_convert: further modules to leave, by whole components of
    their names, or "re:" and a regular expression. A checkpoint that is in FP8 already (fbgemm_fp8,
    fp8, compressed-tensors float-quantized) decides these itself. quantize_activation: as for
    fp8_linear.

    save_pretrained writes one of those three formats, which vLLM, transformers and
    llama_fast.Llama load; with `import llama_fast.hf`, from_pretrained then returns FP8Linear again
    without this config.
    """

    def __init__(
        self,
        recipe: str = "fp8",
        *,
        granularity: str = "row",
        modules_to_not_convert: Iterable[str] = (),
        quantize_activation: bool | None = None,
    ) -> None:
        for name, got, wanted in (
            ("recipe", recipe, RECIPES),
            ("granularity", granularity, _GRANULARITIES),
        ):
            if got not in wanted:
                raise ValueError(f"{name}: got {got!r}, want one of {', '.join(wanted)}")
        bound = ACTIVATION_BOUND if recipe == "fp8_ffn" else None
        if granularity == "block" and bound is not None:
            raise ValueError("granularity: got 'block', want 'row' for the recipe fp8_ffn")
        self.quant_method = METHOD
        self.recipe = recipe
        self.quantize_activation = quantize_activation
        names = tuple(modules_to_not_convert)
        self.format = Format(scale_names(granularity), granularity == "block", names, bound)
        self.left: list[str] = []  # linear layers that the loaded model has in 16 or 32 bits

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read a checkpoint's quantization_config. Raises ValueError for a format not listed."""
        form = parse(config_dict)
        if form is None:
            raise ValueError("quantization_config: got None, want an object")
        config = cls(quantize_activation=kwargs.pop("quantize_activation", None))
        config.format = form
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the quantization_config that save_pretrained writes."""
        form = self.format
        described = describe(
            self.left or list(form.excluded),
            block=form.block,
            activation_bound=form.activation_bound,
        )
        return {**described, METHOD: True}  # others ignore a key that they do not know

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def scale_names(granularity: str) -> tuple[str]:
    """Return the name of a weight's scale in the format that describe() chooses."""
    return ("weight_scale_inv",) if granularity == "block" else ("weight_scale",)


_merge_configs = AutoHfQuantizer.merge_quantization_configs


def _merged(
    of_checkpoint: dict[str, Any] | QuantizationConfigMixin, argument: Any
) -> QuantizationConfigMixin:
    """Combine a checkpoint's quantization_config with from_pretrained's argument. transformers
    raises if their classes differ; here ours may load another format's checkpoint."""
    held = of_checkpoint if isinstance(of_checkpoint, dict) else of_checkpoint.to_dict()
    ours = isinstance(argument, LlamaFastFP8Config)
    if ours or (argument is None and held.get(METHOD)):
        activation = argument.quantize_activation if ours else None
        return LlamaFastFP8Config.from_dict(held, quantize_activation=activation)
    return _merge_configs(of_checkpoint, argument)


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merged)
