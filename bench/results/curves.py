"""Draw curves over a size: a model's tokens/s over its context, and --scaling's figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model.fit import UPPER
from .style import FAINT, apart, color, save, style, title

_JOB = re.compile(r"(pp|tg)(\d+)(?: @ d(\d+))?")
_KINDS = {"tg": "generating, one by one", "pp": "reading a prompt"}
OURS = ("ours", "FP8")
LEAST_SPAN = 16.0  # between the ends of a vertical axis
Line = tuple[list[float], list[float]]


def contexts(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Line]]:
    """Return, for "tg" and "pp", each implementation's average tokens in the cache and tokens/s, if
    it was measured at two contexts or more."""
    found: dict[str, dict[str, dict[float, float]]] = {kind: {} for kind in _KINDS}
    for row in rows:
        job = _JOB.fullmatch(row["op"])
        for name, seconds in row["seconds"].items():
            if job and not name.startswith("limit"):
                tokens, line = int(job[2]), found[job[1]].setdefault(name, {})
                line[int(job[3] or 0) + tokens / 2] = tokens / seconds["median"]
    lines = {
        kind: {
            n: (sorted(at), [at[x] for x in sorted(at)]) for n, at in named.items() if len(at) > 1
        }
        for kind, named in found.items()
    }
    return {kind: named for kind, named in lines.items() if named}


def draw_contexts(rows: Sequence[dict[str, Any]], where: str, path: Path) -> list[Path]:
    panels = contexts(rows)
    with style() as plt:
        figure, all_axes = plt.subplots(1, len(panels), figsize=(10, 4.2), squeeze=False)
        figure.subplots_adjust(left=0.065, right=0.9, top=0.81, bottom=0.12, wspace=0.42)
        title(figure, f"Tokens a second over context: {where}", "4 layers of 8B's shape")
        for axes, (kind, lines) in zip(all_axes[0], panels.items(), strict=True):
            _lines(axes, lines, {name: name for name in lines})
            axes.set_title(_KINDS[kind])
            axes.set_xlabel("tokens in the cache")
            axes.set_ylabel("tokens/s")
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        return save(figure, path)


def draw_scaling(scaling: dict[str, Any], where: str, path: Path) -> list[Path]:
    """Draw a panel for each curve's time, and one for its memory if it is over tokens."""
    kinds = {True: ("seconds", "bytes"), False: ("seconds",)}
    panels = [(c, what) for c in scaling["curves"] for what in kinds[c["axis"] == "tokens"]]
    rows = -(-len(panels) // 2)
    height = 0.75 + 2.9 * rows
    with style() as plt:
        figure, grid = plt.subplots(rows, 2, figsize=(10, height), squeeze=False)
        figure.subplots_adjust(left=0.07, right=0.885, hspace=0.55, wspace=0.5)
        figure.subplots_adjust(top=1 - 0.95 / height, bottom=0.5 / height)
        subtitle = f"n^x: the exponent, fitted from 1/{UPPER} of the largest size on"
        title(figure, f"Growth with size: {where}", subtitle)
        for axes, (curve, what) in zip(grid.flat, panels, strict=False):
            _scaling_panel(axes, curve, what)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        return save(figure, path)


def _scaling_panel(axes: Any, curve: dict[str, Any], what: str) -> None:
    lines, labels = {}, {}
    for name, line in curve["lines"].items():
        points = [(p["size"], p[what]) for p in line["points"] if p[what] > 0]
        if points:
            lines[name] = ([x for x, _ in points], [y for _, y in points])
            fitted = line.get(f"{what}_fit")
            labels[name] = name + (f"  n^{fitted['exponent']:.2f}" if fitted else "")
    memory = what == "bytes"
    _lines(axes, lines, labels, base=2 if memory else 10)
    axes.set_title(f"{curve['name']}: {'memory' if memory else 'time'}", pad=16)
    axes.text(0, 1.03, curve["what"], transform=axes.transAxes, size=7.5, color=FAINT)
    axes.set_xlabel(curve["axis"], labelpad=2)
    axes.yaxis.set_major_formatter(_bytes if memory else _seconds)


def _lines(axes: Any, lines: dict[str, Line], labels: dict[str, str], base: int = 10) -> None:
    """Draw lines on logarithmic axes, with each name at its line's end, apart from the others."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    for name, (xs, ys) in lines.items():
        width, order = (2.0, 3) if name in OURS else (1.3, 2)
        marks = {"marker": "o", "markersize": 3.6}
        axes.plot(xs, ys, color=color(name), linewidth=width, zorder=order, **marks)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_size)
    axes.grid(True, which="major")
    axes.tick_params(which="minor", length=0)
    low, high = axes.get_ylim()
    if high / low < LEAST_SPAN:  # otherwise noise would look like growth
        widen = (LEAST_SPAN * low / high) ** 0.5
        low, high = low / widen, high * widen
    end = max(xs[-1] for xs, _ in lines.values())
    if any(xs[-1] < end for xs, _ in lines.values()):
        high *= (high / low) ** 0.14  # room for the names of shorter lines
    axes.set_ylim(low, high)
    if base == 2:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
    elif high / low < 100:  # decades alone would give one label or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    heights = {n: axes.transData.transform((xs[-1], ys[-1]))[1] for n, (xs, ys) in lines.items()}
    points = axes.figure.dpi / 72
    for name, place in apart(heights, 11 * points).items():
        xs, ys = lines[name]
        shift = (place - heights[name]) / points
        # Above the end of a shorter line, beside the end of the longest ones.
        where, align = ((4, shift + 8), "right") if xs[-1] < end else ((6, shift), "left")
        axes.annotate(
            labels[name],
            (xs[-1], ys[-1]),
            xytext=where,
            textcoords="offset points",
            ha=align,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            size=8,
            color=color(name),
            weight="bold" if name in OURS else "normal",
            annotation_clip=False,
        )


def _size(value: float, _: int) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _seconds(value: float, _: int) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale * 0.999:
            return f"{value / scale:g} {unit}"
    return f"{value:g} s"


def _bytes(value: float, _: int) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:g} B"
