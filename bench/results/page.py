"""Write the tables of README.md and docs/results.md as Markdown from runs' JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..model import scaling
from . import files, plot
from .style import machine

Row = dict[str, Any]
Runs = Mapping[str, Row]  # a machine's runs by file stem

HEAD = """# Results

<!-- written by `python -m bench --publish` from bench/results; edits here are lost -->

`python -m bench` measured every figure; the pages are generated from the JSON files in
[bench/results](../bench/results), one folder per machine. Times are medians of rounds in which all
implementations take turns, so a change of the machine's speed affects all of them. The limit of a
case is measured in the same rounds: a copy of the same bytes, a read of the same weights or cache,
or the faster of multiply-adds in registers (fma) and a matrix product (matmul). "1/n of it" marks a
baseline that is too slow for its turn: it was measured on an nth of the work, and the time is
multiplied by n. Where bf16 products are no faster than fp32's, the table also has eager PyTorch in
fp32. Errors are the largest against fp64, divided by the largest value. Q8_0 is llama.cpp's 8-bit
form of the weights; bf16 reads twice its bytes.

A run goes through the ops and the forward pass several times, minutes apart, since other loads on
the processor come and go. Freed memory is kept for the next output (`--allocator keep`): the page
faults of new memory would take longer than many ops, and the C library decides which ops get them.
Eager PyTorch with its temporaries has most of them. `--allocator system` measures them too.

The forward pass runs as many layers as all implementations have room for together. Our prefill,
like llama.cpp's and ik_llama.cpp's, computes the last layer's FFN for the last token only. Of 8B's
32 layers that spares 2.8 %, of 4 layers 22 % and of 3 layers 29 %, so a shallow model flatters the
three against transformers and OpenVINO.

`--compare` compares the fast end of each case in two runs, with the noise between their passes.

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


def page(machines: Mapping[str, Runs]) -> str:
    """Write docs/results.md. machines: runs by folder name."""
    parts = [HEAD]
    for name, runs in machines.items():
        env = next(iter(runs.values()))["environment"]
        parts.append(f"\n## {env.get('gpu') or env.get('cpu')} ({name})\n\n{_environment(runs)}")
        parts += [_run(name, runs, stem, run) for stem, run in runs.items()]
        parts.append(_behind(runs))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def brief(run: Row, folder: str) -> str:
    """Write README.md's part: a row for each case, the forward pass, and the plot."""
    commit = run["environment"].get("commit") or "unknown"
    lines = [f"{machine(run['environment'])}; commit {commit}.", ""]
    head = ("op", "shape", "ours", "rate", "of the limit", "times faster than")
    lines += table(
        head,
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


def _run(name: str, runs: Runs, stem: str, run: Row) -> str:
    options, first = run.get("options", {}), next(iter(runs.values()))
    what = [f"{options.get('model', '8b').upper()} shapes", options.get("dtype", "bf16")]
    if options.get("tp", 1) > 1:
        what.append(f"one rank of {options['tp']}")
    if options.get("backend"):
        what.append(f"backend {options['backend']}")
    lines = [f"\n### `{stem}.json`: {', '.join(what)}\n"]
    if run["environment"] != first["environment"]:
        lines.append(f"{_environment({stem: run})}\n")
    if not run.get("complete", True):
        lines.append("This run was interrupted: the table holds what it had measured.\n")
    plots = plot.planned(run)

    def picture(plotted: str) -> list[str]:
        file = f"{stem}.svg" if plotted == "speed-ups" else f"{stem}-{plotted}.svg"
        found = [f"\n![{plotted}](../bench/results/{name}/{file})\n"]
        return found if plotted in plots else []

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


def _environment(runs: Runs) -> str:
    run = next(iter(runs.values()))
    known = {**run["environment"], **{f"peer {n}": v for n, v in run.get("peers", {}).items()}}
    return ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in known.items() if v is not None)


def _summary(run: Row) -> str:
    met = [m for r in files.rows(run) for m in r["met"].values()]
    wrong = [f"{r['op']} {r['shape']}" for r in run["ops"] if r["wrong"]]
    text = f"Targets met: {sum(met)} of {len(met)}." if met else "No targets at these shapes."
    return text + (f" WRONG: {', '.join(wrong)}." if wrong else "")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def times(x: float) -> str:
    return f"{x:.1f}x" if x >= 0.95 else f"{x:.2f}x"


def ops(rows: list[Row]) -> list[str]:
    groups = [g for g in GROUPS if any(_group(n) == g for r in rows for n in r["times"])]
    head = ("op", "shape", "ours", *groups, "rate", "of the limit", "error (eager's)", "targets")

    def other(r: Row, group: str) -> Iterator[str]:
        for name, x in r["times"].items():
            if _group(name) != group:
                continue
            text = f"{ms(r['seconds'][name]['median'])}, {times(x)}"
            error = r.get("errors", {}).get(name)
            if group == "peers" and error is not None:  # peers may compute in other formats
                text += f", error {error:.1e}"
            yield text if name in GROUPS else f"{name}: {text}"

    def cells(r: Row) -> Iterator[str]:
        yield from (r["op"], r["shape"], ms(r["seconds"]["ours"]["median"]))
        yield from ("<br>".join(other(r, group)) for group in groups)
        yield f"{r['rate']:.3g} {r['unit']}"
        yield f"{r['of_limit']:.0%} of {r['limit']}"
        yield f"{r['error']:.1e} ({r['eager_error']:.1e})" + " **WRONG**" * r["wrong"]
        yield _targets(r)

    return table(head, map(cells, rows))


def _group(name: str) -> str:
    """Return an implementation's column: "eager fp32, 1/2 of it" is in eager's."""
    base = re.sub(r"( fp32)?(, 1/\d+ of it)?$", "", name)
    if base in GROUPS:
        return base
    return "PyTorch's own" if name.startswith(PYTORCH) else "peers"


def _targets(r: Row) -> str:
    return "<br>".join(
        f"{name} {wanted:g}: {'met' if r['met'][name] else '**missed**'}"
        for name, wanted in r["targets"].items()
        if name in r["met"]
    )


def forward(rows: list[Row], full: bool = False) -> list[str]:
    """Write a row for each job and kind of weights: every implementation's tokens a second."""
    ours = {files.own(r) for r in rows}
    others = list(dict.fromkeys(n for r in rows for n in r["times"] if n not in ours))
    head = ["job", "our weights", "ours", *others]
    if full:
        head += ["of the limit", "all layers, extrapolated", "targets"]

    def cells(r: Row) -> Iterator[str]:
        yield from (r["op"], files.own(r), f"{r['tokens_per_s']:.1f}")
        for name in others:
            x = r["times"].get(name)
            yield f"{r['tokens_per_s'] / x:.1f} ({times(x)})" if x else ""
        if full:
            yield f"{r['of_limit']:.0%} of {r['limit']}"
            yield f"{r['all_layers_tokens_per_s']:.2f}"
            yield _targets(r)

    return table(head, map(cells, rows))


def end_to_end(found: Row) -> list[str]:
    lines = [
        f"\n**Forward pass.** {found['what']}. Tokens a second, and in brackets how many times "
        "faster ours is. pp: a prompt at once; tg: tokens one by one; @ d: after so many tokens. "
        '"All layers" is what the whole 8B would do by its bytes or operations: not run.\n',
        *forward(found["rows"], full=True),
    ]
    memory, errors = found.get("memory", {}), found.get("logits", {})
    if not memory and not errors:
        return lines

    def gib(name: str, what: str) -> str:
        return f"{memory[name][what]:.2f} GiB" if name in memory else ""

    return [
        *lines,
        "",
        "Memory, and the largest error of a logit against fp32:\n",
        *table(
            ("", "weights", "a prompt beside them", "logit error"),
            (
                (
                    name,
                    gib(name, "weights_gib"),
                    gib(name, "prompt_gib"),
                    f"{errors[name]:.1e}" if name in errors else "",
                )
                for name in dict.fromkeys([*memory, *errors])
            ),
        ),
    ]


def whole(found: Row) -> str:
    return (
        "\n**The whole 8B preset**, 32 layers, FP8, random weights: prefill "
        f"{found['prefill_tokens_per_s']:.1f} tokens/s, decode {found['decode_tokens_per_s']:.2f} "
        f"tokens/s, peak memory {found['peak_gib']:.1f} GiB."
    )


def growth(found: Row) -> list[str]:
    lines = [
        "\n**Growth.** Exponents fitted from an eighth of each curve's largest size on, with one "
        "standard error; memory is the peak beyond the inputs, outputs included.\n"
    ]

    def exponent(line: Row, what: str) -> str:
        fit = line.get(what)
        return f"{fit['exponent']:.2f} +- {fit['error']:.2f}" if fit else ""

    lines += table(
        ("curve", "implementation", "largest", "time", "time ~ n^", "memory", "memory ~ n^"),
        (
            (
                curve["name"],
                name,
                f"{line['points'][-1]['size']} {curve['axis']}",
                ms(line["points"][-1]["seconds"]),
                exponent(line, "seconds_fit"),
                f"{line['points'][-1]['bytes'] / 2**20:.1f} MiB",
                exponent(line, "bytes_fit") if curve["axis"] == "tokens" else "",
            )
            for curve in found["curves"]
            for name, line in curve["lines"].items()
            if line["points"]
        ),
    )
    for curve in found["curves"]:
        if "linear_memory" in curve:
            lines.append(f"\n{curve['name']}: {scaling.verdict(curve['linear_memory'])}")
    return lines


def slower(run: Row) -> Iterator[tuple[str, str, float, bool]]:
    """Yield each case where another implementation is faster: the case, the implementation, the
    ratio (below 1), and whether it exceeds the noise."""
    ours = {files.own(r) for r in run.get("end_to_end", {}).get("rows", [])}
    for r in files.rows(run):
        for name, x in r["times"].items():
            if x < 1 and name not in ours:
                ratio = r["seconds"].get(name, {}).get("ratio")
                sure = not ratio or -ratio["log"] > 2 * ratio["error"]
                yield f"{r['op']} {r['shape']}", name, x, sure


def _behind(runs: Runs) -> str:
    rows = [
        (
            f"{stem}.json",
            case,
            name,
            f"{math.expm1(-math.log(x)):.0%}" + ("" if sure else ", within the noise"),
        )
        for stem, run in runs.items()
        for case, name, x, sure in slower(run)
    ]
    lines = ["\n### Where ours is behind\n"]
    if not rows:
        return "\n".join([*lines, "In no case."])
    return "\n".join([*lines, *table(("run", "case", "what is faster", "by"), rows)])
