"""The one place where the report asks the cost model what a case should take."""

from __future__ import annotations

import importlib
from typing import Any


def predicted(op: str, shape: dict[str, Any], gpu: str | None) -> dict[str, Any] | None:
    """{"seconds", "limit", ...}, {"error"} where the model does not know the op or the shape, or
    None where there is no model of it on that GPU."""
    try:
        model = importlib.import_module(f"{__package__}.cost_model")
    except ModuleNotFoundError:
        return None
    known = [figures for name, figures in model.GPUS.items() if name in (gpu or "")]
    if not shape or not known:
        return None
    try:
        found = model.predict(op, known[0], **shape)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {name: getattr(found, name) for name in ("seconds", "limit", "bytes", "flops")}
