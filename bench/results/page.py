"""Write the tables of README.md and docs/results.md as Markdown from runs' JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..model import scaling
from . import files, plot

Row = dict[str, Any]
Runs = Mapping[str, Row]  # a machine's runs by file stem

HEAD = files.ROOT / "bench" / "results" / "head.md"  # what precedes the figures
PYTORCH = ("F.", "bf16 F.", "SDPA", "torch._")  # what names of PyTorch's own fused ops begin with
GROUPS = ("eager", "torch.compile", "PyTorch's own", "peers")


def page(machines: Mapping[str, Runs]) -> str:
    """Write docs/results.md. machines: runs by folder name."""
    parts = [HEAD.read_text()]
    for name, runs in machines.items():
        env = next(iter(runs.values()))["environment"]
        parts.append(f"\n## {env.get('gpu') or env.get('cpu')} ({name})\n\n{_environment(runs)}")
        parts += [_run(name, runs, stem, run) for stem, run in runs.items()]
        parts += ["\n### Where ours is behind\n", *_behind(runs)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def brief(run: Row, folder: str) -> str:
    """Write README.md's part: a row for each case, the forward pass, and the plot."""

    def cells(r: Row) -> list[str]:
        against = ", ".join(f"{name} {times(x)}" for name, x in r["times"].items())
        return [r["op"], r["shape"], ms(_median(r)), _rate(r), _of_limit(r), against]

    head = ("op", "shape", "ours", "rate", "of the limit", "times faster than")
    commit = run["environment"].get("commit") or "unknown"
    lines = [f"{plot.machine(run['environment'])}; commit {commit}.", ""]
    lines += table(head, map(cells, run["ops"]))
    if found := run.get("end_to_end"):
        lines += ["", f"{found['what']}; tokens a second:", "", *forward(found["rows"])]
    if "speed-ups" in plot.planned(run):
        lines += ["", f"![how many times faster](bench/results/{folder}/bench.svg)"]
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

    def picture(plotted: str) -> list[str]:
        file = plot.named(Path(f"../bench/results/{name}/{stem}.svg"), plotted)
        return [f"\n![{plotted}]({file})\n"] if plotted in plot.planned(run) else []

    if run["ops"] or run.get("end_to_end"):
        lines += [_summary(run), *picture("speed-ups")]
    if run["ops"]:
        lines += [*ops(run["ops"]), *picture("roofline")]
    if run.get("end_to_end"):
        lines += [*end_to_end(run["end_to_end"]), *picture("context")]
    if run.get("scaling", {}).get("curves"):
        lines += [*growth(run["scaling"]), *picture("scaling")]
    if found := run.get("whole"):
        lines.append(
            "\n**The whole 8B preset**, 32 layers, FP8, random weights: prefill "
            f"{found['prefill_tokens_per_s']:.1f} tokens/s, decode "
            f"{found['decode_tokens_per_s']:.2f} tokens/s, peak memory {found['peak_gib']:.1f} GiB."
        )
    return "\n".join(lines)


def _environment(runs: Runs) -> str:
    run = next(iter(runs.values()))
    known = {**run["environment"], **{f"peer {n}": v for n, v in run.get("peers", {}).items()}}
    return ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in known.items() if v is not None)


def _summary(run: Row) -> str:
    met = [m for r in files.rows(run) for m in r["met"].values()]
    wrong = [files.name(r) for r in run["ops"] if r["wrong"]]
    text = f"Targets met: {sum(met)} of {len(met)}." if met else "No targets at these shapes."
    return text + (f" WRONG: {', '.join(wrong)}." if wrong else "")


# ---- cells ----


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def times(x: float) -> str:
    return f"{x:.1f}x" if x >= 0.95 else f"{x:.2f}x"


def _median(r: Row, name: str = "ours") -> float:
    return float(r["seconds"][name]["median"])


def _rate(r: Row) -> str:
    return f"{r['rate']:.3g} {r['unit']}"


def _of_limit(r: Row) -> str:
    return f"{r['of_limit']:.0%} of {r['limit']}"


def _targets(r: Row) -> str:
    return "<br>".join(
        f"{name} {wanted:g}: {'met' if r['met'][name] else '**missed**'}"
        for name, wanted in r["targets"].items()
        if name in r["met"]
    )


# ---- tables ----


def ops(rows: list[Row]) -> list[str]:
    groups = [g for g in GROUPS if any(_group(n) == g for r in rows for n in r["times"])]
    head = ("op", "shape", "ours", *groups, "rate", "of the limit", "error (eager's)", "targets")

    def other(r: Row, group: str) -> Iterator[str]:
        for name, x in r["times"].items():
            if _group(name) == group:
                error = r.get("errors", {}).get(name) if group == "peers" else None
                text = f"{ms(_median(r, name))}, {times(x)}"
                text += "" if error is None else f", error {error:.1e}"  # in another format
                yield text if name in GROUPS else f"{name}: {text}"

    def cells(r: Row) -> Iterator[str]:
        yield from (r["op"], r["shape"], ms(_median(r)))
        yield from ("<br>".join(other(r, group)) for group in groups)
        yield from (_rate(r), _of_limit(r))
        yield f"{r['error']:.1e} ({r['eager_error']:.1e})" + " **WRONG**" * r["wrong"]
        yield _targets(r)

    return table(head, map(cells, rows))


def _group(name: str) -> str:
    """Return an implementation's column: "eager fp32, 1/2 of it" is in eager's."""
    base = re.sub(r"( fp32)?(, 1/\d+ of it)?$", "", name)
    if base in GROUPS:
        return base
    return "PyTorch's own" if name.startswith(PYTORCH) else "peers"


def forward(rows: list[Row], full: bool = False) -> list[str]:
    """Write a row for each job and kind of weights: every implementation's tokens a second."""
    ours = {files.own(r) for r in rows}
    others = list(dict.fromkeys(n for r in rows for n in r["times"] if n not in ours))
    more = ("of the limit", "all layers, extrapolated", "targets") if full else ()

    def cells(r: Row) -> Iterator[str]:
        yield from (r["op"], files.own(r), f"{r['tokens_per_s']:.1f}")
        for x in map(r["times"].get, others):
            yield f"{r['tokens_per_s'] / x:.1f} ({times(x)})" if x else ""
        if full:
            yield from (_of_limit(r), f"{r['all_layers_tokens_per_s']:.2f}", _targets(r))

    return table(("job", "our weights", "ours", *others, *more), map(cells, rows))


def end_to_end(found: Row) -> list[str]:
    memory, errors = found.get("memory", {}), found.get("logits", {})

    def cells(name: str) -> Iterator[str]:
        yield name
        for what in ("weights_gib", "prompt_gib"):
            yield f"{memory[name][what]:.2f} GiB" if name in memory else ""
        yield f"{errors[name]:.1e}" if name in errors else ""

    names, head = {**memory, **errors}, ("", "weights", "a prompt beside them", "logit error")
    text = "\nMemory, and the largest error of a logit against fp32:\n"
    return [
        f"\n**Forward pass.** {found['what']}. Tokens a second, and in brackets how many times "
        "faster ours is. pp: a prompt at once; tg: tokens one by one; @ d: after so many tokens. "
        '"All layers" is what the whole 8B would do by its bytes or operations: not run.\n',
        *forward(found["rows"], full=True),
        *([text, *table(head, map(cells, names))] if names else []),
    ]


def growth(found: Row) -> list[str]:
    def exponent(line: Row, what: str) -> str:
        fit = line.get(what)
        return f"{fit['exponent']:.2f} +- {fit['error']:.2f}" if fit else ""

    def rows() -> Iterator[list[str]]:
        for curve in found["curves"]:
            axis = curve["axis"]
            for name, line in curve["lines"].items():
                if line["points"]:
                    last = line["points"][-1]
                    largest, memory = f"{last['size']} {axis}", f"{last['bytes'] / 2**20:.1f} MiB"
                    fits = [exponent(line, "seconds_fit"), exponent(line, "bytes_fit")]
                    fits[1] *= axis == "tokens"
                    seconds = ms(last["seconds"])
                    yield [curve["name"], name, largest, seconds, fits[0], memory, fits[1]]

    head = ("curve", "implementation", "largest", "time", "time ~ n^", "memory", "memory ~ n^")
    return [
        "\n**Growth.** Exponents fitted from an eighth of each curve's largest size on, with one "
        "standard error; memory is the peak beyond the inputs, outputs included.\n",
        *table(head, rows()),
        *(
            f"\n{curve['name']}: {scaling.verdict(curve['linear_memory'])}"
            for curve in found["curves"]
            if "linear_memory" in curve
        ),
    ]


def slower(run: Row) -> Iterator[tuple[str, str, float, bool]]:
    """Yield each case where another implementation is faster: the case, the implementation, the
    ratio (below 1), and whether it exceeds the noise."""
    ours = {files.own(r) for r in run.get("end_to_end", {}).get("rows", [])}
    for r in files.rows(run):
        for name, x in r["times"].items():
            if x < 1 and name not in ours:
                ratio = r["seconds"].get(name, {}).get("ratio")
                sure = not ratio or -ratio["log"] > 2 * ratio["error"]
                yield files.name(r), name, x, sure


def _behind(runs: Runs) -> list[str]:
    rows = [
        (f"{stem}.json", case, name, f"{1 / x - 1:.0%}{'' if sure else ', within the noise'}")
        for stem, run in runs.items()
        for case, name, x, sure in slower(run)
    ]
    return table(("run", "case", "what is faster", "by"), rows) if rows else ["In no case."]
