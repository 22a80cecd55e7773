"""Run torchao's linear layers with quantized weights, and transformers with them. Written against
0.18.0's source; it has run on a CPU and not yet on a GPU.

On a CPU its weights are int8 with a scale per row, and torch.compile finds the kernel for them.
Uncompiled, each call would first widen the whole weight, which took six times as long as bf16's
product. Its FP8 has no CPU kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..timing import Run
from . import ModelPeer, Ops, Unsupported
from .in_transformers import exchanged

FP8 = "torchao FP8 by row"


def fp8_linear(x: Tensor, weights: list[Tensor]) -> dict[str, Run]:
    """Return runs with torchao's own quantization of the bf16 weights."""

    def over(config: Callable[[], Any]) -> Run:
        # Quantized in the first call, so that a failure affects only this column.
        layers = cache(lambda: [_layer(weight, config()) for weight in weights])

        def run(i: int) -> Tensor:
            with torch.inference_mode():
                return layers()[i % len(weights)](x)

        return run

    return {name: over(config) for name, config in _configs(x.device).items()}


def _layer(weight: Tensor, config: Any) -> Any:
    from torchao.quantization import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, config)
    return torch.compile(layer, dynamic=False) if weight.device.type == "cpu" else layer


def _configs(device: torch.device) -> dict[str, Callable[[], Any]]:
    from torchao import quantization as q

    if device.type == "cpu":
        return {"torchao int8 weight-only, compiled": q.Int8WeightOnlyConfig}
    row = {"granularity": q.PerRow()}
    return {
        FP8: lambda: q.Float8DynamicActivationFloat8WeightConfig(**row),
        "torchao FP8 weight-only": lambda: q.Float8WeightOnlyConfig(**row),
        "torchao int8 weight-only": q.Int8WeightOnlyConfig,
    }


def models(hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
    if device.type != "cuda":
        raise Unsupported(
            "torchao on a CPU needs torch.compile of the whole model, which takes minutes"
        )
    from torchao.quantization import quantize_

    config = _configs(device)[FP8]()
    yield exchanged(f"transformers, {FP8}", hf_model, lambda model: quantize_(model, config))


OPS: Ops = {"fp8_linear": fp8_linear}
