"""Linear layers in vLLM: 16- and 32-bit weights in packed order, and weight-only FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear as vllm_kernels
from vllm.model_executor.kernels.linear import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.quantization.fbgemm_fp8 import FBGEMMFp8Config
from vllm.model_executor.layers.quantization.utils import w8a8_utils
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum, current_platform

from ..ops.checks import ACTIVATIONS
from ..ops.linear import fp8_linear, linear, pack_weight
from ..reference import FP8_BLOCK, PACK_ROWS

logger = init_logger("vllm.llama_fast")
_LISTS = ("_POSSIBLE_FP8_KERNELS", "_POSSIBLE_FP8_BLOCK_KERNELS", "_POSSIBLE_WFP8A16_KERNELS")


def _packed(weight: Tensor) -> Tensor:
    """Return weight [N, K] in pack_weight's order where the shape allows, else contiguous."""
    n, k = weight.shape
    weight = weight.contiguous()
    return weight if n % PACK_ROWS or k % 2 else pack_weight(weight)


class FastFP8LinearKernel(FP8ScaledMMLinearKernel):
    """FP8 weights with activations as they are: a scale per tensor, row or 128 x 128 block."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if current_platform.is_cpu() else (False, "requires a CPU.")

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        weight = c.weight_quant_key
        if weight.dtype != torch.float8_e4m3fn:
            return False, f"requires float8_e4m3fn weights, not {weight.dtype}."
        if c.out_dtype not in ACTIVATIONS or c.input_dtype not in ACTIVATIONS:
            return False, f"requires 16- or 32-bit activations, not {c.input_dtype}."
        if _in_blocks(c) and tuple(weight.scale.group_shape) != (FP8_BLOCK, FP8_BLOCK):
            return False, f"requires blocks of 128 x 128, not {weight.scale.group_shape}."
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        blocks = _in_blocks(self.config)
        name = "weight_scale_inv" if hasattr(layer, "weight_scale_inv") else "weight_scale"
        # Without blocks vLLM passes the weight as [K, N].
        weight = layer.weight.data if blocks else layer.weight.data.t()
        scale = getattr(layer, name).data.float().contiguous()
        if not blocks:
            scale = scale.reshape(1) if scale.numel() == 1 else scale.reshape(-1, 1)
        # Multi-head latent attention reads the weight of a layer that it marks so.
        marked = getattr(layer, "_cpu_skip_gemm_dispatch", False)
        replace_parameter(layer, "weight", weight.contiguous() if marked else _packed(weight))
        replace_parameter(layer, name, scale)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        scale = getattr(layer, "weight_scale_inv", None)
        return fp8_linear(x, layer.weight, layer.weight_scale if scale is None else scale, bias)

    def apply_scaled_mm(self, **arguments: Any) -> Tensor:
        raise NotImplementedError("apply_weights does not quantize activations")


def _in_blocks(c: FP8ScaledMMLinearLayerConfig) -> bool:
    shape = c.weight_quant_key.scale.group_shape
    return shape.row > 1 and shape.col > 1


def register() -> None:
    """Put the FP8 kernel first in vLLM's lists for CPUs, and pack other weights once loaded."""
    for name in _LISTS:
        getattr(vllm_kernels, name)[PlatformEnum.CPU].insert(0, FastFP8LinearKernel)
    dispatch = utils.dispatch_cpu_unquantized_gemm

    def pack(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        if weight.is_meta or weight.dim() != 2 or weight.dtype not in ACTIVATIONS:
            kind = f"{weight.dtype} of {weight.dim()} dimensions"
            logger.info_once("llama_fast: left to vLLM: a product with a weight in %s", kind)
            dispatch(layer, remove_weight)
        elif remove_weight:
            layer.weight = Parameter(_packed(weight.data), requires_grad=False)
            layer.cpu_linear = linear
        else:
            layer.cpu_linear = _Head(weight.data)

    utils.dispatch_cpu_unquantized_gemm = pack
    w8a8_utils.requantize_with_max_scale = _scale_of_each_row
    # On a CPU it would choose Marlin, a kernel for GPUs.
    init = FBGEMMFp8Config.__init__

    def without_marlin(self: FBGEMMFp8Config, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.use_marlin = False

    FBGEMMFp8Config.__init__ = without_marlin


def _scale_of_each_row(
    weight: Tensor, weight_scale: Tensor, logical_widths: list[int]
) -> tuple[Tensor, Tensor]:
    """Return fp32 [N, 1] and the weight as it is, for a fused layer [N, K] with a scale per tensor.

    vLLM would quantize all tensors again by their largest scale, with a kernel for GPUs. A scale
    below 0 marks that the checkpoint had one for the whole layer.
    """
    scales = weight_scale.reshape(-1).float()
    if len(scales) == 1 or scales[-1] < 0:
        return scales.max(), weight
    return scales.repeat_interleave(torch.tensor(logical_widths))[:, None], weight


class _Head:
    """The product of a vocabulary's weight, which stays as it is for the embedding. It is packed at
    the first call: an embedding that is not tied to the head has none."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.packed: Tensor | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.packed is None:
            self.packed = _packed(self.weight)
        return linear(x, self.packed, bias)
