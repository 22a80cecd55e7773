"""Run the forward passes of Liger-Kernel's Triton kernels, and transformers with them. Written
against 0.8.5's source; not yet run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..timing import Run
from . import ModelPeer, Ops
from .in_transformers import exchanged

LABEL = "liger"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> dict[str, Run]:
    from liger_kernel.ops import LigerRMSNormFunction as F

    return {LABEL: lambda _: F.apply(x, weight, eps)}


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> dict[str, Run]:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction as F

    return {LABEL: lambda _: F.apply(x, residual, weight, eps)}


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> dict[str, Run]:
    """Return a run in place, on copies that each round rotates further. The lookup of the table's
    rows is not timed, since transformers does it once for all layers. The heads, a view [1, H, T,
    D], stay packed as [T, H, D] in memory."""
    from liger_kernel.ops import LigerRopeFunction as F

    q, k = (t.clone()[None].transpose(1, 2) for t in (q, k))
    halves = table[positions].chunk(2, -1)
    cos, sin = (torch.cat((half, half), -1)[None].to(q.dtype) for half in halves)
    return {f"{LABEL}, in place": lambda _: F.apply(q, k, cos, sin)}


def silu_and_mul(gate_up: Tensor) -> dict[str, Run]:
    """Return a run on separate gate and up, as Liger's layer has them; the split is not timed."""
    from liger_kernel.ops import LigerSiLUMulFunction as F

    gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
    return {f"{LABEL}, gate and up apart": lambda _: F.apply(gate, up)}


def models(hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
    """Yield transformers with every kernel that Liger has for it.

    Liger's patch also replaces classes and the rotary function in transformers' module, for every
    model. They are restored at once, and the function is replaced only while this model runs.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.models.llama import modeling_llama as module

    @contextmanager
    def kept(*names: str) -> Iterator[None]:
        before = {name: getattr(module, name) for name in names}
        try:
            yield
        finally:
            vars(module).update(before)

    def change(model: Any) -> None:
        with kept("LlamaRMSNorm", "LlamaMLP"):
            apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=False, model=model)

    @contextmanager
    def around() -> Iterator[None]:
        with kept("apply_rotary_pos_emb"):
            module.apply_rotary_pos_emb = liger_rotary_pos_emb
            yield

    yield exchanged(f"transformers, {LABEL}", hf_model, change, around)


OPS: Ops = {f.__name__: f for f in (rms_norm, add_rms_norm, apply_rope, silu_and_mul)}
