"""The suite's cases: every op at Llama 3.1's shapes, with eager PyTorch and what torch offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from . import machine
from .attention_cases import attention
from .baselines import SDPA
from .case import CPU, Case, Plan, Spec
from .elementwise_cases import activations, norms, rope
from .linear_cases import linears
from .shapes import fitted, shapes, sweep

GROUPS: tuple[Callable[[Spec], Iterator[Plan]], ...] = (
    norms,
    rope,
    activations,
    attention,
    linears,
)
OPS = (
    "rms_norm",
    "add_rms_norm",
    "apply_rope",
    "silu_and_mul",
    "quantize_fp8",
    "attention",
    "attention_with_kvcache",
    "fp8_linear",
    "linear",
)


def on(spec: Spec, case: Case) -> Case:
    """The case with the device's own rules. The targets are a CPU's, for 8B; a GPU's are in
    targets.py, which the GPU report is held against."""
    if spec.shapes.name != "8b" or spec.dtype != torch.bfloat16 or spec.device.type != "cpu":
        case = replace(case, targets={})
    if spec.device.type == "cpu":
        return case
    waits = ("eager",) if case.op == "attention_with_kvcache" else ()
    return replace(case, device=spec.device, uncapturable=waits)


def spec(
    model: str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    level: str = "default",
    tp: int = 1,
    speed: machine.Speed = machine.UNBOUND,
) -> Spec:
    """speed: sizes that would take this machine too long are made smaller, but for a full run."""
    layer, sizes = shapes(model, tp), sweep(model, device, level)
    if level != "full":
        sizes = fitted(sizes, layer, speed.ours)
    return Spec(layer, sizes, dtype, device, speed)


def plan(spec: Spec, ops: list[str] | None = None) -> list[Plan]:
    """Every case of the ops (None: of all), in the order of OPS; nothing is allocated yet."""
    return [p for group in GROUPS for p in group(spec) if ops is None or p.op in ops]


# What PyTorch offers: --baseline takes these names.
BASELINES = (
    "eager",
    "torch.compile",
    "F.rms_norm",
    "SDPA",
    *SDPA,
    "F.linear",
    "bf16 F.linear",
    "torch._scaled_mm",
    "torch._scaled_mm + quantising",
    "transformers",
    "transformers eager",
    *(f"{name} fp32" for name in ("eager", "SDPA", "F.linear", "transformers")),
)
