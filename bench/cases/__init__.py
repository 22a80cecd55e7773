"""The suite's catalog: every op at Llama 3.1's shapes, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_fast import dispatch

from ..timing import CPU, UNBOUND, Speed
from . import attention, elementwise, linear
from .case import Case, Plan, Spec, relative_error
from .shapes import fitted, layer_shapes, sweep

__all__ = ["BASELINES", "OPS", "Case", "Plan", "Spec", "plan", "relative_error", "spec"]

GROUPS = (elementwise.plans, attention.plans, linear.plans)
OPS = tuple(op for op in dispatch.OPS if op != "pack_weight")  # runs once, at load
# Ops for GPUs: a CPU runs them only if they are named, or in a full run.
FOR_GPUS = ("rms_norm_fp8", "apply_rope_and_append", "silu_and_mul_fp8", "fp8_gemm")

# PyTorch's implementations: the names that --baseline takes.
BASELINES = (
    *("eager", "torch.compile", "F.rms_norm", "SDPA", *attention.SDPA, "SDPA, one by one"),
    *("F.linear", "bf16 F.linear", "torch._scaled_mm", "torch._scaled_mm + quantizing"),
    "ours int16",
    *("transformers", "transformers eager"),
    *(f"{name} fp32" for name in ("eager", "SDPA", "F.linear", "transformers")),
)


def spec(
    model: str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    level: str = "default",
    tp: int = 1,
    speed: Speed = UNBOUND,
) -> Spec:
    """Return the Spec of a run. Sizes that would take too long at that speed are halved, except in
    a full run."""
    layer, sizes = layer_shapes(model, tp), sweep(model, device, level)
    if level != "full":
        sizes = fitted(sizes, layer, speed.ours)
    return Spec(layer, sizes, dtype, device, speed)


def plan(spec: Spec, ops: Sequence[str] | None = None, every: bool = False) -> list[Plan]:
    """Plan the cases of the ops without allocating anything. ops None: all of them, except
    FOR_GPUS on a CPU unless `every`."""
    if ops is None:
        ops = OPS if every or spec.on_gpu else [op for op in OPS if op not in FOR_GPUS]
    return [p for group in GROUPS for p in group(spec) if p.op in ops]
