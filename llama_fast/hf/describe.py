"""report(): list what each part of a transformers model runs on, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..dispatch import choose
from ..nn import FP8Linear
from . import linears, modules
from .apply import STATE, State
from .attention import NAME

_OPS = {
    modules.RMSNorm: ("rms_norm",),
    modules.RotaryEmbedding: (),
    modules.MLP: ("silu_and_mul",),
    modules.Attention: ("apply_rope", "attention", "attention_with_kvcache"),
    modules.DecoderLayer: ("add_rms_norm",),
}


class Row(NamedTuple):
    part: str  # the modules' name, * for the layers' numbers
    modules: int
    runs: str  # ops and backend, or "transformers"
    why: str  # why it was left, or what else there is to know


class Report(list[Row]):
    """The result of report(): a list of Row; str() prints the table."""

    def __str__(self) -> str:
        rows = [("part", "modules", "runs on", "")]
        rows += [(r.part, str(r.modules), r.runs, r.why) for r in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        )


def report(model: PreTrainedModel) -> Report:
    """Return a row for every kind of module that computes: how many there are, what they run on,
    and, for those that accelerate() left as they were, why."""
    state = getattr(model, STATE, State(model.config, None))
    counts: dict[tuple[str, str, str], int] = {}
    for name, module in model.named_modules():
        for runs, why in _described(model, name, module, state):
            key = (re.sub(r"\b\d+\b", "*", name) or type(model).__name__, runs, why)
            counts[key] = counts.get(key, 0) + 1
    return Report(Row(part, n, runs, why) for (part, runs, why), n in counts.items())


def _described(
    model: PreTrainedModel, name: str, module: nn.Module, state: State
) -> Iterator[tuple[str, str]]:
    device = next((p.device for p in module.parameters()), model.device)

    def on(*ops: str) -> str:
        backends = dict.fromkeys(choose(op, device) for op in ops)
        return f"{', '.join(ops)} ({', '.join(backends)})"

    left = state.left.get(name)
    if isinstance(module, FP8Linear):
        yield on("fp8_linear"), f"e4m3, a scale per {module.granularity}"
    elif isinstance(module, linears.PackedLinear):
        yield on("linear"), "packed" if module.weight.dim() == 4 else "plain order"
    elif (mixin := next((m for m in _OPS if isinstance(module, m)), None)) is not None:
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
        if linears.hooked(module) and "forward" in module.__dict__:
            yield "transformers", "its forward is replaced"
        elif mixin is modules.Attention and implementation != NAME:
            yield "transformers", f"attn_implementation is {implementation!r}"
        elif isinstance(module, modules.Fusing):
            together = "|".join(module.together)
            if module.__dict__.get("_fused") is not None:
                yield on(*_OPS[mixin]), f"{together} as one product"
            else:
                yield "transformers", state.left.get(f"{name}.{together}", f"{together}: not fused")
        elif _OPS[mixin]:
            yield on(*_OPS[mixin]), ""
        else:
            yield "transformers", "cosines and sines once a pass, for apply_rope in fp32"
    elif left is not None:
        yield "transformers", left
    elif isinstance(module, nn.Linear) or any(True for _ in module.parameters(recurse=False)):
        yield "transformers", "" if isinstance(module, nn.Embedding) else _unknown(state)


def _unknown(state: State) -> str:
    return state.left.get("", "not among the layers that accelerate() knows")
