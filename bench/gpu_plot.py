"""A GPU report's plots: the roofline with every kernel on it, and the speed-ups as bars."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .files import read
from .plot import bars, save


def draw(found: dict[str, Any], out: Path) -> list[Path]:
    """roofline and speedups, as SVG and PNG."""
    parts = found["parts"]
    ops = parts.get("ops", {}).get("rows", [])
    model = [r for r in parts.get("model", {}).get("rows", []) if "times" in r]
    limits = {r["shape"]: r["rate"] for r in parts.get("limits", {}).get("rows", [])}
    env = found["environment"]
    title = f"llama_fast on {env.get('gpu') or env.get('cpu')}, torch {env.get('torch')}"
    written = []
    if ops:
        written += roofline(ops, limits, title, out / "roofline.svg")
    if ops or model:
        tagged = {r["tag"]: r for r in ops[::-1] if r["tag"]}  # the first of each
        written += bars(([*tagged.values()][::-1] or ops) + model, title, out / "speedups.svg")
    return written


def roofline(
    ops: list[dict[str, Any]], limits: dict[str, float], title: str, path: Path
) -> list[Path]:
    """TFLOP/s over operations a byte, both logarithmic; the ceilings are this run's own limits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    points = [
        (r["op"], r["flops"] / r["bytes"], r["flops"] / r["seconds"]["ours"]["median"] / 1e12)
        for r in ops
    ]
    xs = [x for _, x, _ in points]
    low, high = min(xs) / 2, max(xs) * 2
    memory = max((limits[n] for n in ("read", "copy") if n in limits), default=None)
    for name in ("bf16", "fp8"):
        if name in limits and memory:
            ridge, top = limits[name] / memory, limits[name] / 1e12
            line = [(low, low * memory / 1e12), (ridge, top), (max(high, 2 * ridge), top)]
            axes.plot(*zip(*line, strict=True), color="0.4", linewidth=1)
            axes.text(line[-1][0], top * 1.05, f"{name} {top:.0f} TFLOP/s", ha="right", fontsize=8)
    if memory:
        axes.text(
            low * 1.1,
            low * memory / 1e12 * 1.4,
            f"{memory / 1e12:.2f} TB/s",
            fontsize=8,
            rotation=35,
        )
    names = list(dict.fromkeys(op for op, _, _ in points))
    palette = plt.get_cmap("tab20")
    for i, name in enumerate(names):
        mine = [(x, y) for op, x, y in points if op == name]
        axes.scatter(*zip(*mine, strict=True), s=28, color=palette(i % 20), label=name, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte that has to move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(title)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw(read(folder / "report.json") or {"parts": {}, "environment": {}}, folder)
