"""Draw a run's plots: speed-ups, the roofline, and curves over context and size."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from ..model.fit import UPPER
from . import files

INK, FAINT, RED = "#222222", "#777777", "#b00020"
# Okabe and Ito's colors and some of Tol's, distinct with any color vision.
COLORS = {
    "ours": "#0072b2",
    "FP8": "#0072b2",
    "bf16": "#56b4e9",
    "eager": "#888888",
    "transformers": "#444444",
    "transformers eager": "#aaaaaa",
    "torch.compile": "#e69f00",
    "SDPA": "#009e73",
    "F.rms_norm": "#cc79a7",
    "F.linear": "#d55e00",
    "torch._scaled_mm": "#997700",
    "llama.cpp Q8_0": "#882255",
    "llama.cpp bf16": "#aa4499",
}
_SAME = {"bf16 F.linear": "F.linear"}  # drawn as one implementation
_OTHERS = ("#332288", "#117733", "#999933", "#661100", "#6699cc", "#44aa99", "#aa4466", "#dd7788")
_RC = {
    "svg.hashsalt": "llama_fast",  # equal figures give equal bytes
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
OURS = ("ours", "FP8")
LEAST_SPAN = 16.0  # between the ends of a vertical axis, or noise would look like growth
NAMED = 20  # up to so many points of a roofline have a color each; beyond that ops have

Rows = Sequence[dict[str, Any]]
Line = tuple[list[float], list[float]]
Curves = tuple[str, str, str, dict[str, Line]]  # title, the sizes' name, unit, line by label
Panel = tuple[str, list[tuple[str, dict[str, float]]]]  # op, case -> implementation -> times


def planned(results: dict[str, Any]) -> dict[str, Callable[[Sequence[Path]], None]]:
    """Return the plots that a run has figures for, with functions that draw each into files."""
    forward = results.get("end_to_end", {}).get("rows", [])
    where, ops = machine(results["environment"]), results["ops"]
    found: dict[str, Callable[[Sequence[Path]], None]] = {}
    if any(r["times"] for r in [*ops, *forward]):
        found["speed-ups"] = partial(bars, files.rows(results), where)
    if any(r.get("flops") and r.get("bytes") for r in ops):
        found["roofline"] = partial(roofline, ops, where)
    if panels := context_panels(forward):
        title, below = f"Tokens a second over context: {where}", "layers of 8B's shape"
        found["context"] = partial(draw_curves, panels, title, below)
    if panels := list(scaling_panels(results.get("scaling", {}).get("curves", []))):
        below = f"n^x: the exponent, fitted from 1/{UPPER} of the largest size on"
        found["scaling"] = partial(draw_curves, panels, f"Growth with size: {where}", below)
    return found


def named(path: Path, plot: str) -> Path:
    """Return a plot's path: speed-ups have path itself, the others are beside it."""
    return path if plot == "speed-ups" else path.with_name(f"{path.stem}-{plot}{path.suffix}")


def all_of(results: dict[str, Any], path: Path) -> list[Path]:
    """Draw every plot that a run has the figures for, as PNG and SVG; return the files."""
    written: list[Path] = []
    for name, draw in planned(results).items():
        both = [named(path, name).with_suffix(suffix) for suffix in (".png", ".svg")]
        draw(both)
        written += both
    return written


def machine(env: Mapping[str, Any]) -> str:
    """Describe the machine in a line."""
    if "driver" in env or "sm" in env:  # on the GPU
        return f"{env['gpu']}, torch {env['torch']}"
    names = {"torch_isa": "", "onednn_max_isa": "oneDNN "}
    held = ", ".join(f"{what}{env[name]}" for name, what in names.items() if env.get(name))
    held = f" ({held})" if held else ""
    return f"{env['cpu']}, {env['threads']} threads, {env['isa']}, torch {env['torch']}{held}"


def color(name: str) -> str:
    """Return an implementation's color, the same in every plot."""
    name = _SAME.get(name, name)
    return COLORS.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


@contextlib.contextmanager
def canvas(
    paths: Sequence[Path],
    title: str,
    below: str,
    size: tuple[float, float],
    rows: int,
    columns: int,
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its grid of axes, and save it without dates. below: a line under it."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    with plt.rc_context(_RC):
        figure, grid = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
        figure.supxlabel(below, x=0.01, ha="left", color=FAINT, size=8)
        yield figure, grid
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            unstamped = {"Software"} if path.suffix == ".png" else {"Date", "Creator"}
            figure.savefig(path, dpi=144, metadata=dict.fromkeys(unstamped))
        plt.close(figure)


# ---- how many times faster ----


def panels(rows: Rows) -> list[Panel]:
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
        if cases := [(label, t) for label, t in zip(labels, times, strict=True) if t]:
            found.append((f"{name}   {rest}".strip(), cases))
    return found


def _height(column: Sequence[Panel]) -> float:
    """Return a column's height in bars: 2.5 for an op's name, 0.7 between cases."""
    return sum(2.5 + sum(len(times) + 0.7 for _, times in cases) for _, cases in column)


def bars(rows: Rows, where: str, paths: Sequence[Path]) -> None:
    """Draw the rows' times as bars that start at 1, "as fast", in two columns of ops."""
    found = panels(rows)
    halves = [[found[:i], found[i:]] for i in range(1, len(found))] or [[found]]
    columns = min(halves, key=lambda both: max(map(_height, both)))
    times = [t for _, cases in found for _, t in cases]
    values = [x for t in times for x in t.values()]
    names = list(dict.fromkeys(_SAME.get(n, n) for t in times for n in t))
    tall = max(map(_height, columns))
    below = "how many times faster than each of the others; log scale, from 1, as fast"
    size = 10.0, 0.135 * tall + 0.8 + 0.2 * -(-len(names) // 5)
    with canvas(paths, "", below, size, 1, len(columns)) as (figure, grid):
        for axes, column in zip(grid[0], columns, strict=True):
            axes.set(xscale="log", xlim=(min(0.97, *values), max(2.5, *values) * 1.8), xticks=[])
            axes.set(ylim=(tall, 0))
            axes.minorticks_off()
            _bars(axes, column)
        handles = [grid[0][0].bar(1, 0, color=color(name)) for name in names]
        legend = figure.legend(handles, names, ncols=5, loc="outside upper left", alignment="left")
        legend.set_title(f"llama_fast on {where}", {"weight": "bold", "size": 11})


def _bars(axes: Any, column: Sequence[Panel]) -> None:
    y, ticks = 0.0, {}
    for op, cases in column:
        y += 2.5
        axes.text(0, y - 0.5, op, weight="bold", size=9.5, transform=axes.get_yaxis_transform())
        for label, times in cases:
            ticks[y + len(times) / 2] = label
            for name, x in times.items():
                y += 1
                axes.barh(y - 0.5, x - 1, left=1, color=color(name), height=0.86)
                text, ink = (f"{x:.1f}", INK) if x >= 0.95 else (f"{x:.2f}", RED)
                axes.text(max(x, 1) * 1.05, y - 0.5, text, va="center", size=7.5, color=ink)
            y += 0.7
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def short(shapes: Sequence[str]) -> tuple[list[str], str]:
    """Split off the ending that all shapes share; return the shapes and the ending."""
    split = [re.split(r"(, | x )", shape) for shape in shapes]
    common = 0  # parts, separators included: an even number
    while (
        len(shapes) > 1
        and all(len(s) > common + 2 for s in split)
        and len({"".join(s[len(s) - common - 2 :]) for s in split}) == 1
    ):
        common += 2
    if not common:
        return list(shapes), ""
    rest = "".join(split[0][-common:])
    kept = ["".join(s[:-common]) for s in split]
    return kept, f"n{rest}" if rest.startswith(" x ") else rest.removeprefix(", ")


# ---- the roofline ----


def roofline(rows: Rows, where: str, paths: Sequence[Path]) -> None:
    """Draw each kernel's operations a second over its operations per byte. The roofs are the
    fastest limits that the run measured."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    roofs: dict[str, float] = {}
    for r in rows:
        name, scale = (r["limit"], 1e9) if r["limit"] in ("copy", "read") else ("products", 1e12)
        roofs[name] = max(roofs.get(name, 0.0), r["limit_rate"] * scale)
    top, inf = roofs.pop("products", None), float("inf")
    rows = [r for r in rows if r.get("bytes") and r.get("flops")]
    labels = _labels(rows) if len(rows) <= NAMED else [r["op"] for r in rows]
    xs = [r["flops"] / r["bytes"] for r in rows]
    low, high = min(xs) / 2.5, max(xs) * 3
    below = "filled: llama_fast; hollow: the fastest of the others; lines: measured limits"
    with canvas(paths, f"Roofline: {where}", below, (10, 6.2), 1, 1) as (figure, ((axes,),)):
        axes.set(xscale="log", yscale="log", xlabel="floating-point operations a byte that moves")
        axes.yaxis.set_major_formatter(EngFormatter("FLOP/s"))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.grid(True)
        for (name, rate), dash in zip(roofs.items(), ("-", "--"), strict=False):
            ends = [low, min(high, (top or inf) / rate)]
            text = f"{name} {rate / 1e9:,.0f} GB/s"
            axes.plot(ends, [x * rate for x in ends], dash, color=INK, lw=1.1, label=text)
        if top:
            ends = [top / max(roofs.values(), default=top / low), high]
            axes.plot(ends, [top] * 2, ":", color=INK, label=f"products {top / 1e12:,.2f} TFLOP/s")
        inks = dict(
            zip(dict.fromkeys(labels), map(colormaps["tab20"], cycle(range(20))), strict=False)
        )
        for r, label, x in zip(rows, labels, xs, strict=True):
            y = r["flops"] / r["seconds"]["ours"]["median"]
            if r["times"]:
                other = y / min(r["times"].values())
                axes.plot([x, x], [other, y], color="#c4c4c4", linewidth=0.8, zorder=2)
                axes.scatter(x, other, s=20, color="white", edgecolor=[inks[label]], zorder=3)
            axes.scatter(x, y, s=38, color=[inks[label]], edgecolor="white", label=label, zorder=4)
        handles, texts = axes.get_legend_handles_labels()
        one = dict(zip(texts, handles, strict=True))  # of an op's points
        figure.legend(one.values(), one.keys(), loc="outside right upper", fontsize=7.5)


def _labels(rows: Rows) -> list[str]:
    """Label each row by its op and the part of its shape that differs between the op's cases."""
    found: dict[int, str] = {}
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [i for i, r in enumerate(rows) if r["op"] == op]
        names, _ = short([rows[i]["shape"] for i in mine])
        found.update({i: f"{op} {n}" for i, n in zip(mine, names, strict=True)})
    return [found[i] for i in range(len(rows))]


# ---- curves ----


def contexts(rows: Rows) -> dict[str, dict[str, Line]]:
    """Return, for "tg" and "pp", each implementation's average tokens in the cache and tokens/s, if
    it was measured at two contexts or more."""
    found: dict[str, dict[str, dict[float, float]]] = {"tg": {}, "pp": {}}
    for row in rows:
        job = re.fullmatch(r"(pp|tg)(\d+)(?: @ d(\d+))?", row["op"])
        for name, seconds in row["seconds"].items():
            if job and not name.startswith("limit"):
                tokens, line = int(job[2]), found[job[1]].setdefault(name, {})
                line[int(job[3] or 0) + tokens / 2] = tokens / seconds["median"]
    lines = {
        kind: {n: (sorted(at), [at[x] for x in sorted(at)]) for n, at in by.items() if len(at) > 1}
        for kind, by in found.items()
    }
    return {kind: by for kind, by in lines.items() if by}


def context_panels(rows: Rows) -> list[Curves]:
    kinds = {"tg": "generating, one by one", "pp": "reading a prompt"}
    found = contexts(rows).items()
    return [(kinds[kind], "tokens in the cache", "tokens/s", lines) for kind, lines in found]


def scaling_panels(curves: list[dict[str, Any]]) -> Iterator[Curves]:
    """Yield a panel for each curve's time, and one for its memory if it is over tokens."""
    for curve in curves:
        for what, name, unit in (("seconds", "time", "s"), ("bytes", "memory", "B")):
            lines = {}
            for implementation, line in curve["lines"].items():
                fit = line.get(f"{what}_fit")
                label = implementation + (f"  n^{fit['exponent']:.2f}" if fit else "")
                points = [(p["size"], p[what]) for p in line["points"] if p[what] > 0]
                lines[label] = ([x for x, _ in points], [y for _, y in points])
            if name == "time" or curve["axis"] == "tokens":
                title = f"{curve['name']}: {name}\n{curve['what']}"
                yield title, curve["axis"], unit, {n: xy for n, xy in lines.items() if xy[0]}


def draw_curves(panels: list[Curves], title: str, below: str, paths: Sequence[Path]) -> None:
    rows = -(-len(panels) // 2)
    with canvas(paths, title, below, (10, 0.7 + 2.9 * rows), rows, 2) as (_, grid):
        for axes, (name, axis, unit, lines) in zip(grid.flat, panels, strict=False):
            _lines(axes, lines, unit)
            axes.set_title(name, size=8)
            axes.set_xlabel(axis)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)


def _lines(axes: Any, lines: Mapping[str, Line], unit: str) -> None:
    """Draw lines on logarithmic axes. A label begins with the implementation's name."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for label, (xs, ys) in lines.items():
        name = label.split("  ")[0]
        width = 2.0 if name in OURS else 1.3
        axes.plot(xs, ys, marker="o", ms=3.6, color=color(name), linewidth=width, label=label)
    axes.set(yscale="log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    low, high = axes.get_ylim()
    widen = max(1.0, LEAST_SPAN * low / high) ** 0.5
    axes.set_ylim(low / widen, high * widen)
    if high / low < 100:  # decades alone would give one label or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(unit))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True)
    axes.legend(fontsize=7.5)
