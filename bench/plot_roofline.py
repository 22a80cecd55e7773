"""The roofline: what each kernel computes a second, over the operations a byte that it does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .plot_style import FAINT, INK, colour, save, short, style, title

Point = tuple[str, float, float, float, str]

LABELLED = 26  # points; of more, only the first and the last of each op are named, and no others
# Where a label may go, in points from its dot: the nearest free place is taken.
_PLACES = [
    (dx, dy)
    for reach in (7, 14, 22, 32, 44, 58, 74, 92)
    for dx, dy in (
        (reach, 0),
        (reach * 0.8, reach * 0.8),
        (reach * 0.8, -reach * 0.8),
        (-reach, 0),
        (-reach * 0.8, reach * 0.8),
        (-reach * 0.8, -reach * 0.8),
        (reach, reach * 0.4),
        (reach, -reach * 0.4),
        (-reach, reach * 0.4),
        (-reach, -reach * 0.4),
    )
]


def draw(rows: list[dict[str, Any]], where: str, path: Path) -> list[Path]:
    """rows: a run's ops. The roofs are the fastest of the limits that the run measured."""
    roofs: dict[str, float] = {}
    for r in rows:
        computes = r["limit"] in ("matmul", "fma")
        name, scale = ("compute", 1e12) if computes else (r["limit"], 1e9)
        roofs[name] = max(roofs.get(name, 0.0), r["limit_rate"] * scale)
    rows = [r for r in rows if r.get("bytes") and r.get("flops")]
    points = [_point(r, label) for r, label in zip(rows, _names(rows), strict=True)]
    if not points:
        return []
    xs, ys = [p[1] for p in points], [p[2] for p in points] + [p[3] for p in points if p[3]]
    low, high = min(xs) / 2.5, max(xs) * 3
    floor, top = min(ys) / 2, max([*ys, roofs.get("compute", 0.0)]) * 2.2
    with style() as plt:
        figure, axes = plt.subplots(figsize=(10, 6.2))
        figure.subplots_adjust(left=0.075, right=0.985, top=0.875, bottom=0.085)
        crowded = len(points) > LABELLED
        what = "filled: llama_fast; " + ("" if crowded else "hollow: the fastest of the others; ")
        lines = "lines: what this run measured as the machine's limits"
        title(figure, f"Roofline: {where}", what + lines)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor, top))
        axes.set_xlabel("floating-point operations a byte that has to move")
        axes.set_ylabel("operations a second")
        axes.yaxis.set_major_formatter(_flops)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.grid(True, which="major")
        axes.tick_params(which="minor", length=0)
        taken = _roofs(axes, roofs, low, high)
        for _, x, y, other, name in points:
            if other and not crowded:
                axes.plot([x, x], [other, y], color=GREY, linewidth=0.8, zorder=2)
                marker = {"color": "white", "edgecolor": colour(name), "zorder": 3}
                axes.scatter([x], [other], s=20, linewidth=1.1, **marker)
        blue = {"color": colour("ours"), "edgecolor": "white", "linewidth": 0.7, "zorder": 4}
        axes.scatter(xs, [p[2] for p in points], s=38, **blue)
        figure.canvas.draw()
        _labels(figure, axes, points, taken)
        return save(figure, path)


GREY = "#c4c4c4"


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The op, and of its shape as much as tells its cases apart."""
    found: dict[int, str] = {}
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [i for i, r in enumerate(rows) if r["op"] == op]
        labels, _ = short([rows[i]["shape"] for i in mine])
        for i, label in zip(mine, labels, strict=True):
            found[i] = f"{op} {label}" if len(mine) > 1 else op
    return [found[i] for i in range(len(rows))]


def _point(r: dict[str, Any], label: str) -> Point:
    """Label, operations a byte, ours a second, the fastest other's a second (0: none), who."""
    ours = r["seconds"]["ours"]["median"]
    name = min(r["times"], key=lambda n: r["times"][n], default="")
    other = r["flops"] / (ours * r["times"][name]) if name else 0.0
    return label, r["flops"] / r["bytes"], r["flops"] / ours, other, name


def _flops(value: float, _: int) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"


def _roofs(axes: Any, roofs: dict[str, float], low: float, high: float) -> list[Any]:
    """The texts beside the lines."""
    texts = []
    top = roofs.get("compute")
    for name in ("read", "copy"):
        if name not in roofs:
            continue
        rate = roofs[name]
        end = top / rate if top else high
        axes.plot([low, end], [low * rate, end * rate], color=INK, linewidth=1.1, zorder=1)
        text = axes.annotate(
            f"{name} {rate / 1e9:,.0f} GB/s",
            (end * 0.55, end * 0.55 * rate),
            xytext=(-3, 3),
            textcoords="offset points",
            rotation=_slope(axes),
            rotation_mode="anchor",
            ha="right",
            size=8,
            color=INK,
        )
        texts.append(text)
    if top:
        start = top / max((roofs[n] for n in ("read", "copy") if n in roofs), default=top / low)
        axes.plot([start, high], [top, top], color=INK, linewidth=1.1, zorder=1)
        told = f"matrix product {top / 1e12:,.2f} TFLOP/s"
        texts.append(axes.text(high * 0.97, top * 1.07, told, ha="right", size=8, color=INK))
    return texts


def _slope(axes: Any) -> float:
    """Degrees on paper of a line that grows as its x does."""
    a, b = (axes.transData.transform((x, x * 1e9)) for x in (1.0, 10.0))
    return math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))


def _labels(figure: Any, axes: Any, points: list[Point], texts: list[Any]) -> None:
    """Each label in the nearest place where it covers neither a dot nor another label."""
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    dots = [axes.transData.transform(p[1:3]) for p in points]
    if len(points) <= LABELLED:
        dots += [axes.transData.transform((p[1], p[3])) for p in points if p[3]]
    taken = [text.get_window_extent(renderer) for text in texts]
    for label, x, y, *_ in _named(points):
        at = axes.transData.transform((x, y))
        best = None
        for dx, dy in _PLACES:
            align = "left" if dx > 0 else "right" if dx < 0 else "center"
            text = axes.annotate(
                label,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=align,
                va="center",
                size=7.5,
                zorder=5,
                arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0}
                if max(abs(dx), abs(dy)) > 12
                else None,
            )
            box = text.get_window_extent(renderer).padded(1.5 * scale)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            hits = sum(box.overlaps(other) for other in taken)
            hits += sum(box.contains(*d) for d in dots if abs(d - at).max() > 0.1)
            if inside and not hits:
                best = box
                break
            text.remove()
        if best is not None:
            taken.append(best)


def _named(points: list[Point]) -> list[Point]:
    if len(points) <= LABELLED:
        return points
    by_op: dict[str, list[Point]] = {}
    for p in points:
        by_op.setdefault(p[0].split()[0], []).append(p)
    return [p for mine in by_op.values() for p in ([mine[0], mine[-1]] if mine[1:] else mine)]
