"""torchao: linear layers with quantised weights, and transformers with them in it. Written against
0.18.0's source; its CPU side was run, its GPU side never.

On a CPU its weights are int8 with a scale a row, and torch.compile finds the kernel for them:
uncompiled, each call would first widen the whole weight, which took six times as long as bf16's.
FP8 without a GPU has no kernel there at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .in_transformers import InTransformers
from .peer import Inputs, ModelPeer, Run, Unsupported, refusing


def fp8_linear(inputs: Inputs) -> dict[str, Run]:
    """Its own quantisation of the same bf16 weights."""
    x, weights = inputs["x"], inputs["weights"]
    found, why = {}, ""
    for label, config in _configs(x.device).items():
        try:
            found[label] = refusing(_over(x, weights, config()))
        except Unsupported as error:
            why = f"{label}: {error}"
    if not found:
        raise Unsupported(why)
    return found


def _over(x: Tensor, weights: list[Tensor], config: Any) -> Run:
    from torchao.quantization import quantize_

    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(layer, config)
        layers.append(torch.compile(layer, dynamic=False) if x.device.type == "cpu" else layer)

    def run(i: int) -> Tensor:
        with torch.inference_mode():
            return layers[i % len(layers)](x)

    return run


def _configs(device: torch.device) -> dict[str, Callable[[], Any]]:
    from torchao import quantization as q

    if device.type == "cpu":
        return {"torchao int8 weight-only, compiled": q.Int8WeightOnlyConfig}
    by_row = q.PerRow()
    return {
        "torchao FP8 by row": lambda: q.Float8DynamicActivationFloat8WeightConfig(
            granularity=by_row
        ),
        "torchao FP8 weight-only": lambda: q.Float8WeightOnlyConfig(granularity=by_row),
        "torchao int8 weight-only": q.Int8WeightOnlyConfig,
    }


def models(hf_model: Any, config: Any, device: torch.device) -> Iterator[ModelPeer]:
    if device.type != "cuda":
        raise Unsupported(
            "torchao on a CPU needs torch.compile of the whole model, which takes minutes"
        )
    from torchao.quantization import quantize_

    label = "torchao FP8 by row"
    yield InTransformers(
        f"transformers, {label}",
        hf_model,
        lambda model: quantize_(model, _configs(device)[label]()),
    )


OPS = {"fp8_linear": fp8_linear}
