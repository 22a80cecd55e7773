"""The tables of README.md and docs/results.md: a run's JSON in, Markdown out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import plot
from .plot_style import machine
from .results_tables import end_to_end, forward, growth, ms, ops, own_name, table, times, whole

if TYPE_CHECKING:
    from .publish import Machine

Row = dict[str, Any]

HEAD = """# Results

<!-- written by `python -m bench --publish` from bench/results; edits here are lost -->

Every figure was measured by `python -m bench` and is cut from the JSON files in
[bench/results](../bench/results), one folder a machine. Times are medians of rounds in which all
implementations take turns, so a ratio holds where a machine's speed does not. The limit of a case
is measured in the same rounds: a copy of the same bytes, a read of the same weights or cache, or
what the machine computes fastest with, multiply-adds in registers (fma) or a matrix product
(matmul). "1/n of it": a baseline too slow for its turn, measured on an nth of the work, times n.
Where bf16 products are no faster than fp32's, eager PyTorch in fp32 stands beside it. Errors are
the largest, against fp64, as a share of the largest value.

Ops and forward pass are gone through several times, minutes apart, since whoever shares the
processor comes and goes. Memory that somebody freed is kept for the next output
(`--allocator keep`): the page faults of a fresh one would cost more than many an op, mostly eager
PyTorch's with its temporaries, and fall on whom the C library pleases. `--allocator system` leaves
them in. `--compare` holds two runs against each other by the fast end of each case, with the noise
that their passes show.

```sh
python -m bench --json bench/results/MACHINE/bench.json     # the ops and the forward pass
python -m bench --full --json bench/results/MACHINE/full.json
python -m bench --scaling --json bench/results/MACHINE/scaling.json
python -m bench --publish                                   # this page, README's table, the plots
python -m bench --compare OLD.json                          # has anything become slower?
pytest tests/bench --benchmark-only --bench-model 8b --benchmark-autosave    # tracking over commits
```
"""


def page(machines: Sequence[Machine]) -> str:
    """docs/results.md."""
    parts = [HEAD]
    for m in machines:
        parts += _machine(m)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def brief(run: Row, folder: str) -> str:
    """README's: a row a case, the forward pass, and the plot."""
    lines = [f"{machine(run['environment'])}; {_commit(run)}.", ""]
    lines += table(
        ("op", "shape", "ours", "rate", "of the limit", "times faster than"),
        (
            (
                r["op"],
                r["shape"],
                ms(r["seconds"]["ours"]["median"]),
                f"{r['rate']:.3g} {r['unit']}",
                f"{r['of_limit']:.0%} of {r['limit']}",
                ", ".join(f"{name} {times(x)}" for name, x in r["times"].items()),
            )
            for r in run["ops"]
        ),
    )
    found = run.get("end_to_end")
    if found:
        lines += ["", f"{found['what']}; tokens a second:", "", *forward(found["rows"])]
    if "speed-ups" in plot.planned(run):
        lines += ["", f"![how many times faster]({'bench/results/' + folder}/bench.svg)"]
    return "\n".join(lines)


def _machine(m: Machine) -> Iterator[str]:
    suite = {stem: run for stem, run in m.runs.items() if "ops" in run}
    for stem, run in m.runs.items():
        first = stem == next(iter(m.runs))
        if first:
            env = run["environment"]
            device = env.get("gpu") or env.get("cpu")
            yield f"\n## {device} ({m.name})\n\n{_environment(run)}"
        if "parts" in run:
            yield _gpu_report(m, stem, run)
        elif "ops" in run:
            yield _run(m, stem, run)
    if suite:
        yield _behind(m)


def _run(m: Machine, stem: str, run: Row) -> str:
    lines = [f"\n### `{stem}.json`: {_options(run)}\n"]
    env, first = run["environment"], next(iter(m.runs.values()))["environment"]
    if env != first:
        lines.append(f"{_environment(run)}\n")
    if not run.get("complete", True):
        lines.append("This run was interrupted: the table holds what it had measured.\n")
    plots = plot.planned(run)

    def picture(name: str) -> list[str]:
        if name not in plots:
            return []
        file = f"{stem}.svg" if name == "speed-ups" else f"{stem}-{name}.svg"
        return [f"\n![{name}]({m.link(file)})\n"]

    if run["ops"]:
        lines += [_summary(run), *picture("speed-ups"), *ops(run["ops"]), *picture("roofline")]
    elif run.get("end_to_end"):
        lines += [_summary(run), *picture("speed-ups")]
    if run.get("end_to_end"):
        lines += [*end_to_end(run["end_to_end"]), *picture("context")]
    if run.get("scaling", {}).get("curves"):
        lines += [*growth(run["scaling"]), *picture("scaling")]
    if run.get("whole"):
        lines.append(whole(run["whole"]))
    return "\n".join(lines)


def _commit(run: Row) -> str:
    return f"commit {run['environment'].get('commit') or 'unknown'}"


def _environment(run: Row) -> str:
    known = {**run["environment"], **{f"peer {n}": v for n, v in run.get("peers", {}).items()}}
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in known.items() if value is not None
    )


def _options(run: Row) -> str:
    options = run.get("options", {})
    model = options.get("model", "8b").upper()
    told = [f"{model} shapes", options.get("dtype", "bf16")]
    if options.get("tp", 1) > 1:
        told.append(f"one rank of {options['tp']}")
    if options.get("backend"):
        told.append(f"backend {options['backend']}")
    return ", ".join(told)


def _summary(run: Row) -> str:
    rows = _rows(run)
    met = [m for r in rows for m in r["met"].values()]
    wrong = [f"{r['op']} {r['shape']}" for r in run["ops"] if r["wrong"]]
    told = f"Targets met: {sum(met)} of {len(met)}." if met else "No targets at these shapes."
    return told + (f" WRONG: {', '.join(wrong)}." if wrong else "")


def _rows(run: Row) -> list[Row]:
    return run["ops"] + run.get("end_to_end", {}).get("rows", [])


def _gpu_report(m: Machine, stem: str, run: Row) -> str:
    lines = [f"\n### `{stem}.json`: the GPU report\n"]
    if run.get("targets"):
        lines += table(
            ("target", "wanted", "got", "verdict"),
            (
                (
                    t["what"],
                    f"{t['wanted']:g} {t['unit']}".strip(),
                    "" if t["got"] is None else f"{t['got']:.3g}",
                    t["verdict"],
                )
                for t in run["targets"]
            ),
        )
    parts = run["parts"]
    if any("tag" in r for p in parts.values() for r in p.get("rows", [])):
        for name in ("speedups", "roofline"):
            lines.append(f"\n![{name}]({m.link(name + '.svg')})")
    return "\n".join(lines)


def slower(run: Row) -> Iterator[tuple[str, str, float, bool]]:
    """Case, who is faster there, times (below 1), and whether that is more than noise."""
    own = {own_name(r) for r in run.get("end_to_end", {}).get("rows", [])}
    for r in _rows(run):
        for name, x in r["times"].items():
            if x < 1 and name not in own:
                ratio = r["seconds"].get(name, {}).get("ratio")
                sure = not ratio or -ratio["log"] > 2 * ratio["error"]
                yield f"{r['op']} {r['shape']}", name, x, sure


def _behind(m: Machine) -> str:
    rows = []
    for stem, run in m.runs.items():
        for case, name, x, sure in slower(run) if "ops" in run else ():
            why = m.notes.get(f"{case}: {name}", m.notes.get(case, ""))
            by = f"{math.expm1(-math.log(x)):.0%}" + ("" if sure else ", within the noise")
            rows.append((f"{stem}.json", case, name, by, why))
    lines = ["\n### Where ours is behind\n"]
    if not rows:
        return "\n".join([*lines, "Nobody was faster in any case."])
    return "\n".join([*lines, *table(("run", "case", "who is faster", "by", "why"), rows)])


def idle(m: Machine) -> list[str]:
    """Notes about cases in which nobody is faster."""
    known = set()
    for run in m.runs.values():
        for case, name, *_ in slower(run) if "ops" in run else ():
            known |= {case, f"{case}: {name}"}
    return sorted(m.notes.keys() - known)
