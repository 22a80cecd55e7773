"""Format what a run prints: one aligned line per case."""

from __future__ import annotations

import re
from typing import Any

from ..timing import Speed
from . import files

HEADER = (
    f"{'op':<23}{'shape':<34}{'median (p10-p90) ms':<25}{'rate':>15}{'of limit':>9} {'':<7}"
    f"{'x eager':>13}  {'error':<7}  against"
)
LEGEND = (
    "x: how many times faster ours is   of limit: share of what this machine moved or computed in "
    "the\nsame rounds (copy; read; the faster of multiply-adds in registers, fma, and PyTorch's "
    "product, matmul)\nerror: largest, against fp64, divided by the largest value   1/n of it: "
    "measured on an nth of the heads,\nrows of the weight or tokens, times n: the whole takes "
    "too long"
)

Row = dict[str, Any]


def heading(results: Row) -> str:
    """Write the lines at the top: hardware, versions, threads, commit and options."""
    known = {**results["environment"], **results["options"]}
    lines = ["  ".join(f"{k} {v}" for k, v in known.items() if v is not None)]
    if results.get("speed"):
        lines.append(str(Speed(**results["speed"])))
    if results["peers"]:
        lines.append("peers: " + ", ".join(f"{n} {v}" for n, v in results["peers"].items()))
    lines += [f"without {name}: {why}" for name, why in results["skipped"].items()]
    return "\n".join(lines)


def line(r: Row, targets: bool = False) -> str:
    """Write a case's line. targets: mark its targets, * met and (>=n) missed."""

    def mark(name: str) -> str:
        if not targets or name not in r["targets"]:
            return ""
        return "*" if r["met"][name] else f" (>={r['targets'][name]:g})"

    forward = "tokens_per_s" in r
    times = {name: f"{x:.2f}x{mark(name)}" for name, x in r["times"].items()}
    eager = "-" if forward else times.pop("eager", "-")
    against = "  ".join(f"{name} {text}" for name, text in times.items())
    if forward:
        return (
            f"{r['op']:<16}{r['shape']:<6}{r['rate']:>9.1f} tokens/s"
            f"{r['ms_per_token']:>10.2f} ms a token {r['of_limit']:>5.0%} of {r['limit']:<8}"
            f"{against}"
        )
    mid, low, high = (1e3 * r["seconds"]["ours"][name] for name in ("median", "p10", "p90"))
    wrong = f"  WRONG{_where(r)}: more than twice eager's error" if r["wrong"] else ""
    return (
        f"{r['op']:<23}{r['shape']:<33} {f'{mid:.3f} ({low:.3f}-{high:.3f})':<25}"
        f"{r['rate']:>8.3g} {r['unit']:<7}{r['of_limit']:>8.0%} {mark('limit'):<7}{eager:>13}  "
        f"{r['error']:.1e}  {against}{wrong}"
    )


def _where(r: Row) -> str:
    return f" ({', '.join(r['wrong_backends'])})" if "wrong_backends" in r else ""


def forward(found: Row, targets: bool = False) -> str:
    """Write the forward pass's lines."""
    rows = found["rows"]
    lines = [found["what"], *(line(r, targets) for r in rows)]
    if first := next((r for r in rows if re.fullmatch(r"pp\d+", r["op"])), None):
        shown = {n: t["median"] for n, t in first["seconds"].items() if not n.startswith("limit")}
        took = ", ".join(f"{n} {1e3 * s:.0f} ms" for n, s in shown.items())
        lines.append(f"time to first token, {first['op'][2:]} tokens: {took}")
    whole = ", ".join(f"{files.name(r)} {r['all_layers_tokens_per_s']:.3g}" for r in rows)
    memory = ", ".join(
        f"{n} {m['weights_gib']:.2f} + {m['prompt_gib']:.2f} GiB"
        for n, m in found.get("memory", {}).items()
    )
    errors = ", ".join(f"{name} {value:.1e}" for name, value in found["logits"].items())
    return "\n".join(
        [
            *lines,
            f"extrapolated, not run, to all of 8B's layers and vocabulary, tokens/s: {whole}",
            f"memory, weights + a prompt's peak: {memory}",
            f"largest logit error, of the largest logit, against fp32: {errors}",
        ]
    )


def summary(results: Row, targets: bool = False) -> str:
    """Write the last lines: what is wrong, or that nothing is."""
    rows = files.rows(results)
    lines = [f"{files.name(r)}: WRONG{_where(r)}" for r in results["ops"] if r["wrong"]]
    lines += [f"{name}: FAILED, {why}" for name, why in results["failed"].items()]
    if not lines:
        lines.append(f"{len(rows)} cases, nothing was wrong")
    if targets:
        met = [m for r in rows for m in r["met"].values()]
        lines.append(f"targets met: {sum(met)} of {len(met)} (* met; (>=n) the target missed)")
        for r in rows:
            got = {**r["times"], "limit": r.get("of_limit")}
            missed = {n: r["targets"][n] for n, met in r["met"].items() if not met}
            text = ", ".join(f"{n} {got[n]:.2f}, wanted {want:g}" for n, want in missed.items())
            lines += [f"  {files.name(r)}: {text}"] if missed else []
    return "\n".join(lines)
