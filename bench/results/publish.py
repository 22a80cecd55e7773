"""Generate README.md's table, docs/results.md and the plots from the runs in bench/results.

`python -m bench --publish` writes all of them. A test compares the pages with pages(), so that
neither a new run nor an edited page is missed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import page, plot
from .files import ROOT, read

README, RESULTS = Path("README.md"), Path("docs") / "results.md"
USAGE = 2


def machines(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the runs of each folder of bench/results, bench.json first."""
    found = {}
    for folder in sorted(p for p in (root / "bench" / "results").glob("*") if p.is_dir()):
        order = sorted(folder.glob("*.json"), key=lambda p: (p.stem != "bench", p.stem))
        if runs := {p.stem: run for p in order if "ops" in (run := read(p))}:
            found[folder.name] = runs
    return found


def pages(root: Path) -> dict[Path, str]:
    """Return the generated pages by path from root. Raises ValueError without markers."""
    found = machines(root)
    tables = [page.brief(runs["bench"], name) for name, runs in found.items() if "bench" in runs]
    head, begin, rest = (root / README).read_text().partition("<!-- bench:begin -->\n")
    _, end, tail = rest.partition("<!-- bench:end -->")
    if not begin or not end:
        raise ValueError(f"{root / README}: no <!-- bench:begin --> and <!-- bench:end -->")
    readme = "".join((head, begin, "\n\n".join(tables), "\n", end, tail))
    return {README: readme, RESULTS: page.page(found)}


def plots(root: Path) -> dict[Path, Callable[[Sequence[Path]], None]]:
    """Return the function that draws each SVG, which the pages embed, by path from root."""
    found = {}
    for name, runs in machines(root).items():
        for stem, run in runs.items():
            base = Path("bench") / "results" / name / f"{stem}.svg"
            found.update({plot.named(base, what): d for what, d in plot.planned(run).items()})
    return found


def main(root: Path = ROOT) -> int:
    try:
        if not (root / "bench" / "results").is_dir():
            raise ValueError("no bench/results here; it needs a checkout")
        written, drawn = pages(root), plots(root)
    except ValueError as error:
        print(f"bench: --publish: {error}", file=sys.stderr)
        return USAGE
    for path, text in written.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: pip install 'llama_fast[bench]'", file=sys.stderr)
        drawn = {}
    for path, draw in drawn.items():
        draw([root / path])
    print("written: " + "  ".join(map(str, (*written, *drawn))))
    return 0
