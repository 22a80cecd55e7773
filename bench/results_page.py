"""The tables of README.md and docs/results.md: a run's JSON in, Markdown out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import plot, scaling
from .plot_style import machine

if TYPE_CHECKING:
    from .publish import Machine

Row = dict[str, Any]

HEAD = """# Results

<!-- written by `python -m bench --publish` from bench/results; edits here are lost -->

Every figure was measured by `python -m bench` and is cut from the JSON files in
[bench/results](../bench/results), one folder a machine. Times are medians of rounds in which all
implementations take turns, so a ratio holds where a machine's speed does not. The limit of a case
is measured in the same rounds: a copy of the same bytes, a read of the same weights or cache, or a
bf16 matrix product. Errors are the largest, against fp64, as a share of the largest value.

```sh
python -m bench --json bench/results/MACHINE/bench.json     # the ops and the forward pass
python -m bench --full --json bench/results/MACHINE/full.json
python -m bench --scaling --json bench/results/MACHINE/scaling.json
python -m bench --publish                                   # this page, README's table, the plots
python -m bench --compare OLD.json                          # has anything become slower?
pytest tests/bench --benchmark-only --bench-model 8b --benchmark-autosave    # tracking over commits
```
"""
PYTORCH = ("F.", "bf16 F.", "SDPA", "torch._")  # what names of PyTorch's own fused ops begin with
GROUPS = ("eager", "torch.compile", "PyTorch's own", "peers")


def page(machines: Sequence[Machine]) -> str:
    """docs/results.md."""
    parts = [HEAD]
    for m in machines:
        parts += _machine(m)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def brief(run: Row, folder: str) -> str:
    """README's: a row a case, the forward pass, and the plot."""
    lines = [f"{machine(run['environment'])}; {_commit(run)}.", ""]
    lines += _table(
        ("op", "shape", "ours", "rate", "of the limit", "times faster than"),
        (
            (
                r["op"],
                r["shape"],
                _ms(r["seconds"]["ours"]["median"]),
                f"{r['rate']:.3g} {r['unit']}",
                f"{r['of_limit']:.0%} of {r['limit']}",
                ", ".join(f"{name} {_times(x)}" for name, x in r["times"].items()),
            )
            for r in run["ops"]
        ),
    )
    found = run.get("end_to_end")
    if found:
        lines += ["", f"{found['what']}; tokens a second:", "", *_forward(found["rows"])]
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
        lines += [_summary(run), *picture("speed-ups"), *_ops(run["ops"]), *picture("roofline")]
    if run.get("end_to_end"):
        lines += [*_end_to_end(run["end_to_end"]), *picture("context")]
    if run.get("scaling", {}).get("curves"):
        lines += [*_scaling(run["scaling"]), *picture("scaling")]
    if run.get("whole"):
        lines.append(_whole(run["whole"]))
    return "\n".join(lines)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _times(x: float) -> str:
    return f"{x:.1f}x" if x >= 0.95 else f"{x:.2f}x"


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


def _group(name: str) -> str:
    if name in GROUPS:
        return name
    return "PyTorch's own" if name.startswith(PYTORCH) else "peers"


def _ops(rows: list[Row]) -> list[str]:
    groups = [g for g in GROUPS if any(_group(n) == g for r in rows for n in r["times"])]
    head = ("op", "shape", "ours", *groups, "rate", "of the limit", "error (eager's)", "targets")

    def told(r: Row, name: str, x: float) -> str:
        text = f"{_ms(r['seconds'][name]['median'])}, {_times(x)}"
        error = r.get("errors", {}).get(name)
        if _group(name) == "peers" and error is not None:  # whose numbers may be others than ours
            text += f", error {error:.1e}"
        return text if name in GROUPS else f"{name}: {text}"

    def other(r: Row, group: str) -> str:
        names = (name for name in r["times"] if _group(name) == group)
        return "<br>".join(told(r, name, r["times"][name]) for name in names)

    return _table(
        head,
        (
            (
                r["op"],
                r["shape"],
                _ms(r["seconds"]["ours"]["median"]),
                *(other(r, g) for g in groups),
                f"{r['rate']:.3g} {r['unit']}",
                f"{r['of_limit']:.0%} of {r['limit']}",
                f"{r['error']:.1e} ({r['eager_error']:.1e})" + (" **WRONG**" if r["wrong"] else ""),
                _targets(r),
            )
            for r in rows
        ),
    )


def _targets(r: Row) -> str:
    return "<br>".join(
        f"{name} {wanted:g}: {'met' if r['met'][name] else '**missed**'}"
        for name, wanted in r["targets"].items()
        if name in r["met"]
    )


def _forward(rows: list[Row], full: bool = False) -> list[str]:
    """A row a job and weights: tokens a second of ours and of everybody else."""
    own = {_own(r) for r in rows}
    others = list(dict.fromkeys(n for r in rows for n in r["times"] if n not in own))
    head = ["job", "our weights", "ours", *others]
    if full:
        head += ["of the limit", "all layers, extrapolated", "targets"]

    def cells(r: Row) -> Iterator[str]:
        yield from (r["op"], _own(r), f"{r['tokens_per_s']:.1f}")
        for name in others:
            x = r["times"].get(name)
            yield f"{r['tokens_per_s'] / x:.1f} ({_times(x)})" if x else ""
        if full:
            whole = r.get("all_layers_tokens_per_s")
            yield f"{r['of_limit']:.0%} of {r['limit']}"
            yield f"{whole:.2f}" if whole else ""
            yield _targets(r)

    return _table(head, (list(cells(r)) for r in rows))


def _own(r: Row) -> str:
    return str(r.get("ours", r["shape"]))


def _end_to_end(found: Row) -> list[str]:
    lines = [
        f"\n**Forward pass.** {found['what']}. Tokens a second, and in brackets how many times "
        "faster ours is. pp: a prompt at once; tg: tokens one by one; @ d: after so many tokens. "
        '"All layers" is what the whole 8B would do by its bytes or operations: not run.\n',
        *_forward(found["rows"], full=True),
    ]
    memory, errors = found.get("memory", {}), found.get("logits", {})
    names = list(dict.fromkeys([*memory, *errors]))
    if names:
        lines += ["", "Memory, and the largest error of a logit against fp32:\n"]
        lines += _table(
            ("", "weights", "a prompt beside them", "logit error"),
            (
                (
                    name,
                    _gib(memory.get(name, {}).get("weights_gib")),
                    _gib(memory.get(name, {}).get("prompt_gib")),
                    f"{errors[name]:.1e}" if name in errors else "",
                )
                for name in names
            ),
        )
    return lines


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} GiB"


def _whole(found: Row) -> str:
    return (
        "\n**The whole 8B preset**, 32 layers, FP8, random weights: prefill "
        f"{found['prefill_tokens_per_s']:.1f} tokens/s, decode {found['decode_tokens_per_s']:.2f} "
        f"tokens/s, peak memory {found['peak_gib']:.1f} GiB."
    )


def _scaling(found: Row) -> list[str]:
    lines = ["\n**Growth.** Exponents fitted to the upper sixteenth of each curve, with one "]
    lines[0] += "standard error; memory is the peak beyond the inputs, outputs included.\n"
    rows = []
    for curve in found["curves"]:
        for name, line in curve["lines"].items():
            if not line["points"]:
                continue
            last = line["points"][-1]
            exponents = [
                f"{fit['exponent']:.2f} +- {fit['error']:.2f}" if fit else ""
                for fit in (line.get("seconds_fit"), line.get("bytes_fit"))
            ]
            if curve["axis"] != "tokens":
                exponents[1] = ""
            rows.append(
                (
                    curve["name"],
                    name,
                    f"{last['size']} {curve['axis']}",
                    _ms(last["seconds"]),
                    exponents[0],
                    f"{last['bytes'] / 2**20:.1f} MiB",
                    exponents[1],
                )
            )
    head = ("curve", "who", "largest", "time", "time ~ n^", "memory", "memory ~ n^")
    lines += _table(head, rows)
    for curve in found["curves"]:
        if "linear_memory" in curve:
            lines.append(f"\n{curve['name']}: {scaling.verdict(curve['linear_memory'])}")
    return lines


def _gpu_report(m: Machine, stem: str, run: Row) -> str:
    lines = [f"\n### `{stem}.json`: the GPU report\n"]
    if run.get("targets"):
        lines += _table(
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
    own = {_own(r) for r in run.get("end_to_end", {}).get("rows", [])}
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
    return "\n".join([*lines, *_table(("run", "case", "who is faster", "by", "why"), rows)])


def idle(m: Machine) -> list[str]:
    """Notes about cases in which nobody is faster."""
    known = set()
    for run in m.runs.values():
        for case, name, *_ in slower(run) if "ops" in run else ():
            known |= {case, f"{case}: {name}"}
    return sorted(m.notes.keys() - known)
