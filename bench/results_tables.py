"""A run's JSON as Markdown tables: ops, the forward pass, growth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from . import scaling

Row = dict[str, Any]

PYTORCH = ("F.", "bf16 F.", "SDPA", "torch._")  # what names of PyTorch's own fused ops begin with
GROUPS = ("eager", "torch.compile", "PyTorch's own", "peers")


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

    def told(r: Row, name: str, x: float) -> str:
        text = f"{ms(r['seconds'][name]['median'])}, {times(x)}"
        error = r.get("errors", {}).get(name)
        if _group(name) == "peers" and error is not None:  # whose numbers may be others than ours
            text += f", error {error:.1e}"
        return text if name in GROUPS else f"{name}: {text}"

    def other(r: Row, group: str) -> str:
        names = (name for name in r["times"] if _group(name) == group)
        return "<br>".join(told(r, name, r["times"][name]) for name in names)

    return table(
        head,
        (
            (
                r["op"],
                r["shape"],
                ms(r["seconds"]["ours"]["median"]),
                *(other(r, g) for g in groups),
                f"{r['rate']:.3g} {r['unit']}",
                f"{r['of_limit']:.0%} of {r['limit']}",
                f"{r['error']:.1e} ({r['eager_error']:.1e})" + (" **WRONG**" if r["wrong"] else ""),
                _targets(r),
            )
            for r in rows
        ),
    )


def _group(name: str) -> str:
    """fp32 and parts of the work go with the whole in bf16: "eager fp32, 1/2 of it" with eager."""
    base = re.sub(r"( fp32)?(, 1/\d+ of it)?$", "", name)
    if base in ("eager", "torch.compile"):
        return base
    if name in GROUPS:
        return name
    return "PyTorch's own" if name.startswith(PYTORCH) else "peers"


def _targets(r: Row) -> str:
    return "<br>".join(
        f"{name} {wanted:g}: {'met' if r['met'][name] else '**missed**'}"
        for name, wanted in r["targets"].items()
        if name in r["met"]
    )


def forward(rows: list[Row], full: bool = False) -> list[str]:
    """A row a job and weights: tokens a second of ours and of everybody else."""
    own = {own_name(r) for r in rows}
    others = list(dict.fromkeys(n for r in rows for n in r["times"] if n not in own))
    head = ["job", "our weights", "ours", *others]
    if full:
        head += ["of the limit", "all layers, extrapolated", "targets"]

    def cells(r: Row) -> Iterator[str]:
        yield from (r["op"], own_name(r), f"{r['tokens_per_s']:.1f}")
        for name in others:
            x = r["times"].get(name)
            yield f"{r['tokens_per_s'] / x:.1f} ({times(x)})" if x else ""
        if full:
            whole = r.get("all_layers_tokens_per_s")
            yield f"{r['of_limit']:.0%} of {r['limit']}"
            yield f"{whole:.2f}" if whole else ""
            yield _targets(r)

    return table(head, (list(cells(r)) for r in rows))


def own_name(r: Row) -> str:
    return str(r.get("ours", r["shape"]))


def end_to_end(found: Row) -> list[str]:
    lines = [
        f"\n**Forward pass.** {found['what']}. Tokens a second, and in brackets how many times "
        "faster ours is. pp: a prompt at once; tg: tokens one by one; @ d: after so many tokens. "
        '"All layers" is what the whole 8B would do by its bytes or operations: not run.\n',
        *forward(found["rows"], full=True),
    ]
    memory, errors = found.get("memory", {}), found.get("logits", {})
    names = list(dict.fromkeys([*memory, *errors]))
    if names:
        lines += ["", "Memory, and the largest error of a logit against fp32:\n"]
        lines += table(
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


def whole(found: Row) -> str:
    return (
        "\n**The whole 8B preset**, 32 layers, FP8, random weights: prefill "
        f"{found['prefill_tokens_per_s']:.1f} tokens/s, decode {found['decode_tokens_per_s']:.2f} "
        f"tokens/s, peak memory {found['peak_gib']:.1f} GiB."
    )


def growth(found: Row) -> list[str]:
    lines = [
        "\n**Growth.** Exponents fitted from an eighth of each curve's largest size on, with one "
    ]
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
                    ms(last["seconds"]),
                    exponents[0],
                    f"{last['bytes'] / 2**20:.1f} MiB",
                    exponents[1],
                )
            )
    head = ("curve", "who", "largest", "time", "time ~ n^", "memory", "memory ~ n^")
    lines += table(head, rows)
    for curve in found["curves"]:
        if "linear_memory" in curve:
            lines.append(f"\n{curve['name']}: {scaling.verdict(curve['linear_memory'])}")
    return lines
