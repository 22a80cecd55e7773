"""README.md's table, docs/results.md and the plots, cut from the runs in bench/results.

`python -m bench --publish` writes all of it; nothing in there is typed. A test holds the pages
against what pages() gives, so that neither a new run nor an edited page is forgotten.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plot, results_page
from .files import read
from .report import inserted

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = Path("README.md"), Path("docs") / "results.md"
NOTES = "notes.json"  # case, or "case: implementation" -> why ours is behind there
USAGE = 2


@dataclass(frozen=True)
class Machine:
    """A folder of bench/results. name: the folder's; runs: by file, without .json."""

    name: str
    runs: dict[str, dict[str, Any]]
    notes: dict[str, str]

    def link(self, plot_file: str) -> str:
        """From docs/ to a file of the folder."""
        return f"../bench/results/{self.name}/{plot_file}"


def machines(root: Path) -> list[Machine]:
    """Every folder of bench/results with a run in it, those that measured the suite first."""
    found = []
    for folder in sorted(p for p in (root / "bench" / "results").glob("*") if p.is_dir()):
        files = {p.stem: read(p) for p in sorted(folder.glob("*.json")) if p.name != NOTES}
        order = sorted(files, key=lambda stem: (stem != "bench", stem))
        runs = {stem: run for stem in order if (run := files[stem]) is not None}
        if runs:
            found.append(Machine(folder.name, runs, read(folder / NOTES) or {}))
    return found


def pages(root: Path) -> dict[Path, str]:
    """The pages that are cut from the runs, by path from root, as they have to be."""
    found = machines(root)
    readme = (root / README).read_text()
    tables = [
        results_page.brief(m.runs["bench"], m.name)
        for m in found
        if "ops" in m.runs.get("bench", ())
    ]
    return {
        README: inserted(readme, "\n\n".join(tables)),
        RESULTS: results_page.page(found),
    }


def plots(root: Path) -> dict[Path, Callable[[Path], list[Path]]]:
    """SVG from root -> what draws it, for every run of the suite."""
    found = {}
    for m in machines(root):
        for stem, run in m.runs.items():
            if "ops" not in run:
                continue  # a GPU's report comes with its own
            base = Path("bench") / "results" / m.name / f"{stem}.svg"
            found.update({plot.named(base, name): d for name, d in plot.planned(run).items()})
    return found


def main(root: Path = ROOT, say: Callable[[str], None] = print) -> int:
    if not (root / "bench" / "results").is_dir():
        print("bench: --publish: no bench/results here; it wants a checkout", file=sys.stderr)
        return USAGE
    try:
        written = pages(root)
    except ValueError as error:
        print(f"bench: --publish: {error}", file=sys.stderr)
        return USAGE
    for path, text in written.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    drawn = _draw(root)
    for m in machines(root):
        for case in results_page.idle(m):
            say(f"bench/results/{m.name}/{NOTES}: {case!r}: nobody is faster there")
    say("written: " + "  ".join(str(path) for path in (*written, *drawn)))
    return 0


def _draw(root: Path) -> list[Path]:
    """The SVGs only: what pages embed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f"no plots: {error}; pip install 'llama_fast[bench]'", file=sys.stderr)
        return []
    drawn = []
    with tempfile.TemporaryDirectory(prefix="llama_fast-plots-") as folder:
        for path, draw in plots(root).items():
            for file in draw(Path(folder) / path.name):
                if file.suffix == ".svg":
                    (root / path).write_bytes(file.read_bytes())
                    drawn.append(path)
    return drawn
