"""Style of every plot: one color per implementation, and the same bytes each time."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

INK, FAINT = "#222222", "#777777"
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
_SAME = {"bf16 F.linear": "F.linear"}  # drawn as one
_OTHERS = ("#332288", "#117733", "#999933", "#661100", "#6699cc", "#44aa99", "#aa4466", "#dd7788")
_RC = {
    "svg.hashsalt": "llama_fast",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def called(name: str) -> str:
    """Return the name in a legend."""
    return _SAME.get(name, name)


def color(name: str) -> str:
    """Return an implementation's color, the same in every plot."""
    name = called(name)
    return COLORS.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


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


def apart(heights: Mapping[str, float], least: float) -> dict[str, float]:
    """Move heights upward until they are at least `least` apart."""
    placed: dict[str, float] = {}
    last = -float("inf")
    for name in sorted(heights, key=lambda n: heights[n]):
        placed[name] = last = max(heights[name], last + least)
    return placed


@contextlib.contextmanager
def style() -> Iterator[Any]:
    """Yield matplotlib.pyplot with our style, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_RC):
        yield plt


def title(figure: Any, text: str, below: str = "") -> None:
    """Write a title at the top left, and `below` in small print. Offsets are in inches, so that
    figures of any height look alike."""
    width, height = figure.get_size_inches()
    figure.text(0.12 / width, 1 - 0.12 / height, text, weight="bold", size=11, va="top")
    figure.text(0.12 / width, 1 - 0.36 / height, below, color=FAINT, size=8, va="top")


def machine(environment: Mapping[str, Any]) -> str:
    """Describe the machine in a line."""
    env = environment
    if "driver" in env or "sm" in env:  # on the GPU
        return f"{env['gpu']}, torch {env['torch']}"
    names = {"torch_isa": "", "onednn_max_isa": "oneDNN "}
    held = ", ".join(f"{called}{env[name]}" for name, called in names.items() if env.get(name))
    held = f" ({held})" if held else ""
    return f"{env['cpu']}, {env['threads']} threads, {env['isa']}, torch {env['torch']}{held}"


def save(figure: Any, path: Path) -> list[Path]:
    """Save as PNG and SVG, without dates: equal figures give equal bytes. Return both paths."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with plt.rc_context(_RC):
        figure.savefig(written[0], dpi=144, metadata={"Software": None})
        figure.savefig(written[1], metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return written
