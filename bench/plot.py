"""A run's plots: speed-ups as bars, the roofline, tokens/s over context, curves of scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plot_curves, plot_roofline
from .plot_style import FAINT, INK, called, colour, machine, save, short, style, title

__all__ = ["all_of", "bars", "named", "planned", "save", "speedups"]

BAR, GAP = 0.135, 0.09  # inches: a bar's height, and what is between two cases
LABELS = 0.165  # of the width: a column's cases
WIDTH, HEAD, PANEL_HEAD = 10.0, 0.72, 0.36  # inches
LETTER, HANDLE = 0.068, 0.42  # inches of a legend: a letter, and what is beside a name


def planned(results: dict[str, Any]) -> dict[str, Callable[[Path], list[Path]]]:
    """What a run has the figures for: "speed-ups", "roofline", "context" and "scaling", each with
    what draws it."""
    rows = results.get("end_to_end", {}).get("rows", [])
    where = machine(results["environment"])
    ops, scaling = results["ops"], results.get("scaling", {})
    found: dict[str, Callable[[Path], list[Path]]] = {}
    if any(r["times"] for r in [*ops, *rows]):
        found["speed-ups"] = lambda path: speedups(results, path)
    if any(r.get("flops") and r.get("bytes") for r in ops):
        found["roofline"] = lambda path: plot_roofline.draw(ops, where, path)
    if plot_curves.contexts(rows):
        found["context"] = lambda path: plot_curves.draw_contexts(rows, where, path)
    if scaling.get("curves"):
        found["scaling"] = lambda path: plot_curves.draw_scaling(scaling, where, path)
    return found


def named(path: Path, plot: str) -> Path:
    """Where a run's plot goes: speed-ups to path itself, the others beside it."""
    return path if plot == "speed-ups" else path.with_name(f"{path.stem}-{plot}{path.suffix}")


def all_of(results: dict[str, Any], path: Path) -> list[Path]:
    """Every plot that a run has the figures for, as PNG and SVG."""
    return [file for name, draw in planned(results).items() for file in draw(named(path, name))]


def speedups(results: dict[str, Any], path: Path) -> list[Path]:
    """Writes path as PNG and SVG; returns both."""
    rows = results["ops"] + results.get("end_to_end", {}).get("rows", [])
    return bars(rows, f"llama_fast on {machine(results['environment'])}", path)


@dataclass(frozen=True)
class _Panel:
    """One op."""

    name: str
    cases: list[tuple[str, dict[str, float]]]  # label -> implementation -> times

    @property
    def height(self) -> float:
        return PANEL_HEAD + sum(BAR * len(times) + GAP for _, times in self.cases)


def bars(rows: list[dict[str, Any]], heading: str, path: Path) -> list[Path]:
    """rows: with op, shape, times. A panel an op, in two columns; bars begin at 1, "as fast"."""
    panels = _panels(rows)
    columns = _columns(panels)
    body = max(sum(p.height for p in c) for c in columns)
    everything = [x for p in panels for _, times in p.cases for x in times.values()]
    low, high = min(0.97, *everything), max(2.5, *everything) * 1.5
    names = list(dict.fromkeys(called(n) for p in panels for _, times in p.cases for n in times))
    with style() as plt:
        legend_columns = _legend_columns(names)
        legend_rows = -(-len(names) // legend_columns)
        height = body + HEAD + 0.2 * legend_rows + 0.12
        figure = plt.figure(figsize=(WIDTH, height))
        title(
            figure,
            heading,
            "how many times faster than each of the others; log scale, from 1, as fast",
        )
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour(name)) for name in names]
        figure.legend(
            handles,
            names,
            ncols=legend_columns,
            loc="upper left",
            bbox_to_anchor=(0.0, 1 - 0.48 / height),
            handlelength=1.0,
            columnspacing=1.4,
        )
        for i, column in enumerate(columns):
            top = height - HEAD - 0.2 * legend_rows + 0.1
            for panel in column:
                inner = panel.height - PANEL_HEAD
                left, width = 0.5 * i + LABELS, (0.98 if len(columns) == 1 else 0.485) - LABELS
                bottom = (top - panel.height) / height
                axes = figure.add_axes((left, bottom, width, inner / height))
                _draw(axes, panel, low, high)
                top -= panel.height
        return save(figure, path)


def _legend_columns(names: Sequence[str]) -> int:
    """As many as the figure is wide enough for; a legend's entries go down its columns."""
    for columns in range(min(7, len(names)), 1, -1):
        rows = -(-len(names) // columns)
        longest = [max(map(len, names[i : i + rows])) for i in range(0, len(names), rows)]
        if sum(LETTER * n + HANDLE for n in longest) <= WIDTH:
            return columns
    return 1


def _panels(rows: list[dict[str, Any]]) -> list[_Panel]:
    """Forward passes share one panel; what all of an op's shapes end in goes to its name."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["times"]:
            name = "forward pass" if "tokens_per_s" in row else row["op"]
            grouped.setdefault(name, []).append(row)
    found = []
    for name, mine in grouped.items():
        if name == "forward pass":
            labels, rest = [f"{r['op']}, {r['shape']}" for r in mine], ""
        else:
            labels, rest = short([r["shape"] for r in mine])
        own = {r.get("ours") for r in mine}  # FP8 beside bf16 is no rival
        times = [{n: x for n, x in r["times"].items() if n not in own} for r in mine]
        cases = [(label, t) for label, t in zip(labels, times, strict=True) if t]
        if cases:
            found.append(_Panel(f"{name}   {rest}".strip(), cases))
    return found


def _columns(panels: list[_Panel]) -> list[list[_Panel]]:
    """In order, parted where the taller of two columns is lowest."""
    if len(panels) < 2:
        return [panels]

    def taller(i: int) -> float:
        return max(sum(p.height for p in part) for part in (panels[:i], panels[i:]))

    best = min(range(1, len(panels)), key=taller)
    return [panels[:best], panels[best:]]


def _draw(axes: Any, panel: _Panel, low: float, high: float) -> None:
    y, ticks = 0.0, []
    for label, times in panel.cases:
        ticks.append((y + BAR * (len(times) - 1) / 2, label))
        for name, value in times.items():
            axes.barh(y, value - 1, left=1, color=colour(name), height=BAR * 0.86)
            axes.text(
                max(value, 1.0) * 1.05,
                y,
                f"{value:.1f}" if value >= 0.95 else f"{value:.2f}",
                va="center",
                size=7.5,
                color=INK if value >= 0.95 else "#b00020",
            )
            y += BAR
        y += GAP
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(y - BAR / 2, -BAR / 2 - GAP / 2)
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
    axes.tick_params(length=0, which="both")
    axes.axvline(1.0, color=FAINT, linewidth=0.8)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.xaxis.set_minor_locator(_none())
    axes.text(-0.01, 1.0, panel.name, transform=axes.transAxes, **TITLE)


TITLE = {"weight": "bold", "size": 9.5, "ha": "left", "va": "bottom"}


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
