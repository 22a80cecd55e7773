"""Speed-up of every op over its slowest and fastest baseline, as bars on a log scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def speedups(results: dict[str, Any], path: Path) -> list[Path]:
    """Writes path as PNG and SVG; returns both."""
    rows = results["ops"] + results.get("end_to_end", {}).get("rows", [])
    env = results["environment"]
    title = f"llama_fast on {env['cpu']}, {env['threads']} threads, {env['isa']}"
    if "driver" in env or "sm" in env:  # measured on the GPU
        title = f"llama_fast on {env['gpu']}, torch {env['torch']}"
    return bars(rows, title, path)


def all_of(results: dict[str, Any], path: Path) -> list[Path]:
    """Every plot that a run has the figures for, beside path."""
    return speedups(results, path) if results["ops"] else []


def bars(rows: list[dict[str, Any]], title: str, path: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(f"{r['op']}\n{r['shape']}", n, x) for r in rows for n, x in r["times"].items()][::-1]
    names = list(dict.fromkeys(name for _, name, _ in bars))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.34 * len(bars)), layout="constrained")
    colours = 10 if len(names) <= 10 else 20
    palette = plt.get_cmap(f"tab{colours}")
    for y, (_, name, value) in enumerate(bars):
        axes.barh(y, value, color=palette(names.index(name) % colours), height=0.75)
        axes.text(value * 1.04, y, f"{value:.1f}x", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("times faster than (log scale; 1 = as fast)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=palette(i % colours)) for i in range(len(names))]
    axes.legend(handles, names, fontsize=8, loc="lower right")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def save(figure: Any, path: Path) -> list[Path]:
    """As PNG and SVG; both paths."""
    import matplotlib.pyplot as plt

    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for target in written:
        figure.savefig(target, dpi=130)
    plt.close(figure)
    return written
