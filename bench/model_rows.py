"""Rows of the forward pass, a job and its figures each: made, printed, summed up."""

from __future__ import annotations

import re
from typing import Any

from .timing import figures


def row(
    what: str,
    name: str,
    timings: dict[str, Any],
    tokens: int,
    limit: str,
    fastest: float,
    targets: dict[str, float] | None = None,
) -> dict[str, Any]:
    """name: which of timings is ours. fastest: the seconds that the limit alone would take."""
    t = timings[name]
    others = {n: v for n, v in timings.items() if n != name and not n.startswith("limit")}
    times = {n: v.median / t.median for n, v in others.items()}
    targets = {n: wanted for n, wanted in (targets or {}).items() if n in times}
    return {
        "op": what,
        "shape": name,
        "ours": name,
        "tokens_per_s": tokens / t.median,
        "rate": tokens / t.median,
        "unit": "tokens/s",
        "ms_per_token": 1e3 * t.median / tokens,
        "limit": limit,
        "of_limit": fastest / t.median,
        "times": times,
        "targets": targets,
        "met": {k: times[k] >= v for k, v in targets.items()},
        "seconds": figures(timings, name),
    }


def line(r: dict[str, Any]) -> str:
    against = "  ".join(
        f"{name} {times:.2f}x"
        + (
            ""
            if name not in r["met"]
            else "*"
            if r["met"][name]
            else f" (>={r['targets'][name]:g})"
        )
        for name, times in r["times"].items()
    )
    return (
        f"{r['op']:<16}{r['shape']:<6}{r['rate']:>9.1f} tokens/s"
        f"{r['ms_per_token']:>10.2f} ms a token {r['of_limit']:>5.0%} of {r['limit']:<8}{against}"
    )


def table(found: dict[str, Any]) -> str:
    """What a run prints of it."""
    lines = [found["what"], *map(line, found["rows"])]
    first = next((r for r in found["rows"] if re.fullmatch(r"pp\d+", r["op"])), None)
    if first:
        shown = {n: t["median"] for n, t in first["seconds"].items() if not n.startswith("limit")}
        lines.append(
            f"time to first token, {first['op'][2:]} tokens: "
            + ", ".join(f"{n} {1e3 * s:.0f} ms" for n, s in shown.items())
        )
    whole = {
        f"{r['op']} {r['shape']}": r["all_layers_tokens_per_s"]
        for r in found["rows"]
        if "all_layers_tokens_per_s" in r
    }
    if whole:
        lines.append(
            "extrapolated, not run, to all of 8B's layers and vocabulary, tokens/s: "
            + ", ".join(f"{name} {rate:.3g}" for name, rate in whole.items())
        )
    if "memory" in found:
        lines.append(
            "memory, weights + a prompt's peak: "
            + ", ".join(
                f"{n} {m['weights_gib']:.2f} + {m['prompt_gib']:.2f} GiB"
                for n, m in found["memory"].items()
            )
        )
    lines.append(
        "largest logit error, of the largest logit, against fp32: "
        + ", ".join(f"{name} {value:.1e}" for name, value in found["logits"].items())
    )
    return "\n".join(lines)
