"""LoRA adapters (peft) on FP8Linear: training works as it is; merging needs this module."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from ..nn import FP8Linear


def mergeable(config: LoraConfig) -> LoraConfig:
    """Make merge_adapter() and merge_and_unload() work on FP8 layers, and return the config.

    The sum of weight and adapter is rounded to e4m3 again, which loses what is smaller than about
    2^-4 of a weight. peft's own layer raises, since it would add to the FP8 weight itself.
    """
    config._register_custom_module({FP8Linear: LoraFP8Linear})
    return config


class LoraFP8Linear(Linear):
    """peft's LoRA layer around an FP8Linear. While merged, it keeps the FP8 weight that it had, so
    that unmerge() is exact."""

    _before: tuple[Tensor, Tensor] | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters. Raises NotImplementedError for variants (DoRA) and for lora_bias."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise NotImplementedError(
                    f"adapter {name}: only plain LoRA without lora_bias can be merged into FP8"
                )
            base = self.get_base_layer()
            assert isinstance(base, FP8Linear)
            before = base.weight.data, base.weight_scale
            base.quantize(base.dequantize() + self.get_delta_weight(name).float())
            self._before = self._before or before
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if self._before is not None:
            base = self.get_base_layer()
            assert isinstance(base, FP8Linear)
            base.set_weight(*self._before)
            self._before = None
            self.merged_adapters.clear()
