"""Draw a run's plots: speed-ups as bars and the roofline; curves.py draws the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import curves, files
from .style import FAINT, INK, called, color, machine, save, short, style, title

BAR, GAP, HEAD = 0.135, 0.09, 0.36  # inches: a bar, between two cases, an op's name
WIDTH, TOP = 10.0, 0.72  # inches
LETTER, HANDLE = 0.068, 0.42  # inches of a legend: a letter, and the handle beside a name
NAMED = 20  # up to so many points of a roofline have a color each; beyond that ops have

Panel = tuple[str, list[tuple[str, dict[str, float]]]]  # op, case -> implementation -> times


def planned(results: dict[str, Any]) -> dict[str, Callable[[Path], list[Path]]]:
    """Return the plots that a run has figures for, "speed-ups", "roofline", "context" and
    "scaling", with the function that draws each."""
    forward = results.get("end_to_end", {}).get("rows", [])
    where = machine(results["environment"])
    ops, scaling = results["ops"], results.get("scaling", {})
    found: dict[str, Callable[[Path], list[Path]]] = {}
    if any(r["times"] for r in [*ops, *forward]):
        found["speed-ups"] = lambda path: bars(files.rows(results), where, path)
    if any(r.get("flops") and r.get("bytes") for r in ops):
        found["roofline"] = lambda path: roofline(ops, where, path)
    if curves.contexts(forward):
        found["context"] = lambda path: curves.draw_contexts(forward, where, path)
    if scaling.get("curves"):
        found["scaling"] = lambda path: curves.draw_scaling(scaling, where, path)
    return found


def named(path: Path, plot: str) -> Path:
    """Return a plot's path: speed-ups have path itself, the others are beside it."""
    return path if plot == "speed-ups" else path.with_name(f"{path.stem}-{plot}{path.suffix}")


def all_of(results: dict[str, Any], path: Path) -> list[Path]:
    """Draw every plot that a run has the figures for, as PNG and SVG."""
    return [file for name, draw in planned(results).items() for file in draw(named(path, name))]


# ---- how many times faster ----


def bars(rows: list[dict[str, Any]], where: str, path: Path) -> list[Path]:
    """Draw the rows' times as bars that start at 1, "as fast", in two columns of ops."""
    found = panels(rows)
    columns = _columns(found)
    values = [x for _, cases in found for _, times in cases for x in times.values()]
    limits = min(0.97, *values), max(2.5, *values) * 1.5
    names = list(dict.fromkeys(called(n) for _, cases in found for _, t in cases for n in t))
    body = max(sum(map(_height, column)) for column in columns)
    legend_columns = _legend_columns(names)
    legend = 0.2 * -(-len(names) // legend_columns)
    height = body + TOP + legend + 0.12
    with style() as plt:
        figure = plt.figure(figsize=(WIDTH, height))
        below = "how many times faster than each of the others; log scale, from 1, as fast"
        title(figure, f"llama_fast on {where}", below)
        handles = [plt.Rectangle((0, 0), 1, 1, color=color(name)) for name in names]
        options = {"handlelength": 1.0, "columnspacing": 1.4, "loc": "upper left"}
        anchor = (0.0, 1 - 0.48 / height)
        figure.legend(handles, names, ncols=legend_columns, bbox_to_anchor=anchor, **options)
        for i, column in enumerate(columns):
            tall = sum(map(_height, column))
            left, width = 0.5 * i + 0.165, (0.98 if len(columns) == 1 else 0.485) - 0.165
            bottom = height - TOP - legend + 0.1 - tall
            axes = figure.add_axes((left, bottom / height, width, tall / height))
            _draw(axes, column, limits, tall)
        return save(figure, path)


def panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Group by op; forward passes share one panel. The ending that an op's shapes share is moved to
    its name."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = "forward pass" if "tokens_per_s" in row else row["op"]
        grouped.setdefault(name, []).append(row)
    found = []
    for name, mine in grouped.items():
        labels, rest = short([r["shape"] for r in mine])
        if name == "forward pass":
            labels, rest = [f"{r['op']}, {r['shape']}" for r in mine], ""
        own = {r.get("ours") for r in mine}  # FP8 is not compared with bf16
        times = [{n: x for n, x in r["times"].items() if n not in own} for r in mine]
        cases = [(label, t) for label, t in zip(labels, times, strict=True) if t]
        if cases:
            found.append((f"{name}   {rest}".strip(), cases))
    return found


def _height(panel: Panel) -> float:
    return HEAD + sum(BAR * len(times) + GAP for _, times in panel[1])


def _columns(found: list[Panel]) -> list[list[Panel]]:
    """Split into two columns, in order, so that the taller one is lowest."""
    if len(found) < 2:
        return [found]
    halves = [(found[:i], found[i:]) for i in range(1, len(found))]
    return list(min(halves, key=lambda both: max(sum(map(_height, half)) for half in both)))


def _legend_columns(names: Sequence[str]) -> int:
    """Return how many columns fit the figure's width; entries go down the columns."""
    for columns in range(min(7, len(names)), 1, -1):
        rows = -(-len(names) // columns)
        longest = [max(map(len, names[i : i + rows])) for i in range(0, len(names), rows)]
        if sum(LETTER * n + HANDLE for n in longest) <= WIDTH:
            return columns
    return 1


def _draw(axes: Any, column: list[Panel], limits: tuple[float, float], tall: float) -> None:
    """Draw a column of ops from the top; y is in inches."""
    from matplotlib.ticker import NullLocator

    y, ticks = 0.0, {}
    for op, cases in column:
        y += HEAD
        place = {"transform": axes.get_yaxis_transform(), "va": "bottom", "ha": "left"}
        axes.text(-0.01, y - BAR / 2, op, weight="bold", size=9.5, **place)
        for label, times in cases:
            ticks[y + BAR * len(times) / 2] = label
            for name, x in times.items():
                y += BAR
                axes.barh(y - BAR / 2, x - 1, left=1, color=color(name), height=BAR * 0.86)
                text, ink = (f"{x:.1f}", INK) if x >= 0.95 else (f"{x:.2f}", "#b00020")
                axes.text(max(x, 1) * 1.05, y - BAR / 2, text, va="center", size=7.5, color=ink)
            y += GAP
        axes.plot([1, 1], [y - _height((op, cases)) + HEAD, y], color=FAINT, linewidth=0.8)
    axes.set(xscale="log", xlim=limits, ylim=(tall, 0))
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(length=0, which="both")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.xaxis.set_minor_locator(NullLocator())


# ---- the roofline ----


def roofline(rows: list[dict[str, Any]], where: str, path: Path) -> list[Path]:
    """Draw each kernel's operations a second over its operations per byte. The roofs are the
    fastest limits that the run measured."""
    roofs: dict[str, float] = {}
    for r in rows:
        name, scale = (r["limit"], 1e9) if r["limit"] in ("copy", "read") else ("compute", 1e12)
        roofs[name] = max(roofs.get(name, 0.0), r["limit_rate"] * scale)
    rows = [r for r in rows if r.get("bytes") and r.get("flops")]
    points = [(r["flops"] / r["bytes"], _flops(r, "ours"), _fastest(r)) for r in rows]
    xs, ys = [p[0] for p in points], [y for _, *both in points for y in both if y]
    low, high = min(xs) / 2.5, max(xs) * 3
    labels = _labels(rows)
    each = len(rows) <= NAMED
    legend = labels if each else list(dict.fromkeys(r["op"] for r in rows))
    with style() as plt:
        figure, axes = plt.subplots(figsize=(10, 6.2))
        figure.subplots_adjust(left=0.075, right=0.66, top=0.875, bottom=0.085)
        below = "filled: llama_fast; hollow: the fastest of the others; lines: measured limits"
        title(figure, f"Roofline: {where}", below)
        axes.set(xscale="log", yscale="log", xlim=(low, high))
        axes.set_ylim(min(ys) / 2, max(*ys, roofs.get("compute", 0.0)) * 2.2)
        axes.set(xlabel="floating-point operations a byte that has to move")
        axes.set(ylabel="operations a second")
        axes.yaxis.set_major_formatter(_operations)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.grid(True, which="major")
        axes.tick_params(which="minor", length=0)
        _roofs(axes, roofs, low, high)
        palette = plt.get_cmap("tab20")
        for r, label, (x, y, other) in zip(rows, labels, points, strict=True):
            ink = palette(legend.index(label if each else r["op"]) % 20)
            if other:
                axes.plot([x, x], [other, y], color="#c4c4c4", linewidth=0.8, zorder=2)
                axes.scatter([x], [other], s=20, color="white", edgecolor=[ink], zorder=3)
            axes.scatter([x], [y], s=38, color=[ink], edgecolor="white", linewidth=0.7, zorder=4)
        inks = [palette(i % 20) for i in range(len(legend))]
        handles = [plt.Line2D([], [], marker="o", ls="", color=ink) for ink in inks]
        axes.legend(handles, legend, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7.5)
        return save(figure, path)


def _labels(rows: list[dict[str, Any]]) -> list[str]:
    """Label each row by its op and the part of its shape that differs between the op's cases."""
    found: dict[int, str] = {}
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [i for i, r in enumerate(rows) if r["op"] == op]
        names, _ = short([rows[i]["shape"] for i in mine])
        found.update({i: f"{op} {n}" for i, n in zip(mine, names, strict=True)})
    return [found[i] for i in range(len(rows))]


def _flops(r: dict[str, Any], name: str) -> float:
    return r["flops"] / r["seconds"][name]["median"]


def _fastest(r: dict[str, Any]) -> float:
    """Return the operations a second of the fastest other implementation; 0: none."""
    return _flops(r, "ours") / min(r["times"].values()) if r["times"] else 0.0


def _operations(value: float, _: int) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"


def _roofs(axes: Any, roofs: dict[str, float], low: float, high: float) -> None:
    top = roofs.get("compute")
    memory = {name: roofs[name] for name in ("read", "copy") if name in roofs}
    (_, y0), (_, y1) = (axes.transData.transform((1.0, y)) for y in (1e9, 1e10))
    (x0, _), (x1, _) = (axes.transData.transform((x, 1e9)) for x in (1.0, 10.0))
    slope = {"rotation": math.degrees(math.atan2(y1 - y0, x1 - x0)), "rotation_mode": "anchor"}
    for name, rate in memory.items():
        end = top / rate if top else high
        axes.plot([low, end], [low * rate, end * rate], color=INK, linewidth=1.1, zorder=1)
        text = f"{name} {rate / 1e9:,.0f} GB/s"
        axes.text(low * 1.08, low * 1.16 * rate, text, va="bottom", size=8, **slope)
    if top:
        start = top / max(memory.values(), default=top / low)
        axes.plot([start, high], [top, top], color=INK, linewidth=1.1, zorder=1)
        text = f"products {top / 1e12:,.2f} TFLOP/s"
        axes.text(high * 0.97, top * 1.07, text, ha="right", size=8)
