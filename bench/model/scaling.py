"""Measure how time and memory grow with sequence length, context and batch, and fit exponents.

The attention curves run the suite's own cases. On a CPU prompts have one of 8B's key/value groups
(4/1 heads of 32/8), so that 131,072 tokens take a minute; the growth is the same. The last curves
are one whole 8B layer in FP8, fed in chunks as `generate` does.

A point that takes a second is run once, others in rounds. Memory is the peak beyond the inputs,
outputs included. An implementation leaves a curve where quadratic growth would make the next size
take too long or too much memory: nothing is extrapolated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import llama_fast as lf

from ..cases import Case, Spec, attention, relative_error
from ..cases.shapes import Sweep, layer_shapes
from ..results.report import WRONG
from ..timing import Run, measure
from ..timing.memory import peak_memory
from . import models
from .fit import described, fit, linear_memory

PREFILL_CHUNK = 512  # tokens of a prompt at once, as in generate on a CPU
ONCE = 1.0  # seconds: a run that takes longer is timed once
ROUNDS = 0.4  # seconds of rounds per point
MEMORY = 3 << 30  # bytes that a point may take
STEPS = 4  # tokens decoded one by one at each context


@dataclass(frozen=True)
class Level:
    """The largest sizes, which doubling reaches, and the seconds that a point of ours or of another
    implementation may take."""

    tokens: int
    context: int
    batch: int
    prompt: int  # of a whole layer
    ours: float
    others: float


LEVELS = {
    "quick": Level(16384, 32768, 16, 2048, 5.0, 1.0),
    "default": Level(131072, 131072, 64, 8192, 240.0, 4.0),
    "full": Level(131072, 131072, 64, 65536, 400.0, 40.0),
}
FIRST_TOKENS, FIRST_CONTEXT, FIRST_PROMPT = 128, 1024, 256


@dataclass(frozen=True)
class Curve:
    name: str
    what: str
    axis: str  # what the sizes count
    linear: bool = False  # whether memory has to be linear in the sizes


@dataclass(frozen=True)
class Point:
    """The runs at one size. check: result -> its error."""

    size: int
    runs: dict[str, Run]
    check: Callable[[Any], float] | None = None
    steps: int = 1  # in a run; the time of one is reported


def run(
    device: torch.device,
    level: str,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Measure and fit every curve. "wrong" lists problems. keep: receives the figures after each
    curve."""
    sizes = LEVELS[level]
    found: dict[str, Any] = {"curves": [], "wrong": []}
    with torch.inference_mode():
        for curve, points in _curves(device, sizes):
            measured = _measured(curve, points, sizes, device, say)
            found["curves"].append(measured)
            for line in _problems(measured):
                found["wrong"].append(line)
                say(f"WRONG: {line}")
            keep(found)
    return found


def _doubling(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << i for i in range((last // first).bit_length()) if first << i <= last)


def _curves(device: torch.device, sizes: Level) -> Iterator[tuple[Curve, Iterator[Point]]]:
    cpu = device.type == "cpu"
    lengths = _doubling(min(FIRST_TOKENS, sizes.tokens), sizes.tokens)
    contexts = _doubling(min(FIRST_CONTEXT, sizes.context), sizes.context)
    fixed, batches = contexts[0] * (1 if cpu else 4), _doubling(1, sizes.batch)
    yield (
        Curve("prefill attention", _heads(8 if cpu else 1) + ", causal", "tokens", linear=True),
        _cases(device, 8 if cpu else 1, "tokens", prompts=lengths),
    )
    yield (
        Curve("decode attention, context", _heads(1) + ", 1 query", "context"),
        _cases(device, 1, "context", caches=tuple((1, n) for n in contexts)),
    )
    yield (
        Curve("decode attention, batch", f"{_heads(1)}, 1 query, {fixed} keys each", "batch"),
        _cases(device, 1, "batch", caches=tuple((n, fixed) for n in batches)),
    )
    layer = _Layer(device)
    prompts = _doubling(min(FIRST_PROMPT, sizes.prompt), sizes.prompt)
    what = f"one 8B layer and a head of {layer.model.config.vocab_size}, FP8"
    chunks = f"{what}, cache included, chunks of {PREFILL_CHUNK}"
    yield (
        Curve("prefill", chunks, "tokens", linear=True),
        (layer.prefill(n) for n in prompts),
    )
    yield (Curve("decode", f"{what}, a token", "context"), (layer.decode(n) for n in prompts))


def _heads(tp: int) -> str:
    m = layer_shapes("8b", tp)
    return f"{m.heads}/{m.kv_heads} x {m.head_dim}"


def _cases(
    device: torch.device,
    tp: int,
    axis: str,
    prompts: tuple[int, ...] = (),
    caches: tuple[tuple[int, int], ...] = (),
) -> Iterator[Point]:
    """Yield the suite's attention cases at these sizes."""
    spec = Spec(layer_shapes("8b", tp), Sweep((), prompts, caches, (), ()), torch.bfloat16, device)
    for plan in attention.plans(spec):
        case = plan.make()
        runs = {"ours": case.ours, **{n: r for n, r in case.baselines.items() if n in _OTHERS}}
        yield Point(case.axes[axis], runs, _checker(case))


_OTHERS = ("eager", "SDPA")


def _checker(case: Case) -> Callable[[Any], float]:
    return lambda result: relative_error(case.value(result), case.exact())


class _Layer:
    """A model of one layer, with runs that read a prompt and that decode after it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = lf.Llama.from_config(models.shape(layers=1), quantize="fp8_all", device=device)
        self.prefill(FIRST_PROMPT).runs["ours"](0)  # first-call costs, such as the weights' pages

    def prefill(self, tokens: int) -> Point:
        prompt = models.prompt(self.model.config, tokens).to(self.device)

        def read(_: int) -> lf.KVCache:
            cache = self._cache(tokens)
            for part in prompt.split(PREFILL_CHUNK, dim=1):
                hidden = self.model.hidden(part, cache=cache, last=True)
            self.model.logits(hidden[:, -1])
            return cache

        return Point(tokens, {"ours": read})

    def decode(self, context: int) -> Point:
        """Decode after random keys and values: their values do not change the time, but pages that
        were never written would all be read from one page."""
        cache = self._cache(context + STEPS)
        cache.reserve([context + STEPS])
        cache.advance(context)
        for pool in (cache.k, cache.v):
            pool.normal_()
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)

        def go_on(_: int) -> None:
            cache.truncate([context])
            for _ in range(STEPS):
                self.model(token, cache=cache)

        return Point(context, {"ours": go_on}, steps=STEPS)

    def _cache(self, room: int) -> lf.KVCache:
        model = self.model
        return lf.KVCache(model.config, room, 1, dtype=model.dtype, device=self.device)


def _measured(
    curve: Curve,
    points: Iterator[Point],
    sizes: Level,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a curve; return each implementation's points and fits."""
    lines: dict[str, list[dict[str, Any]]] = {"ours": []}
    out: dict[str, str] = {}  # implementation -> why it left the curve
    say(f"{curve.name}: {curve.what}")
    for point in points:
        runs = {}
        for name, run in point.runs.items():
            limit = sizes.ours if name == "ours" else sizes.others
            why = _too_much(lines.get(name, []), point.size, limit)
            if why:
                out.setdefault(name, f"{curve.axis} {point.size} on: {why}")
            if name not in out:
                runs[name] = run
        if "ours" not in runs:
            break
        for name, found in _figures(point, runs, device).items():
            lines.setdefault(name, []).append(found)
        say("  " + _line(curve, point.size, lines))
    for name, why in out.items():
        say(f"  without {name} from {why}")
    found = {
        "name": curve.name,
        "what": curve.what,
        "axis": curve.axis,
        "lines": {n: {"points": p, **_fits(p)} for n, p in lines.items()},
        "left_out": out,
    }
    memory = linear_memory([(p["size"], p["bytes"]) for p in lines["ours"]])
    if curve.linear and memory:
        found["linear_memory"] = memory
    for line in fitted(found):
        say(f"  {line}")
    return found


def _too_much(points: list[dict[str, Any]], size: int, seconds: float) -> str:
    """Return why the next size would take too much if time and memory are quadratic, or ""."""
    if not points:
        return ""
    last = points[-1]
    growth = (size / last["size"]) ** 2
    if last["seconds"] * growth > seconds:
        return f"more than {seconds:g} s"
    return f"more than {MEMORY >> 30} GiB" if last["bytes"] * growth > MEMORY else ""


def _figures(point: Point, runs: dict[str, Run], device: torch.device) -> dict[str, dict[str, Any]]:
    """Return the seconds and bytes of each run, and the errors of results that can be checked."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        if device.type == "cuda":
            run(0)  # compiles and tunes
        with peak_memory(device) as peak:
            began = time.perf_counter()
            result = run(0)
            took = time.perf_counter() - began
        found[name] = {"size": point.size, "seconds": took, "rounds": 1, "bytes": peak.bytes}
        if point.check:
            found[name]["error"] = point.check(result)
        del result
    again = {n: r for n, r in runs.items() if found[n]["seconds"] <= ONCE or device.type == "cuda"}
    timings = measure(again, ROUNDS, device, copies=8, waits=tuple(again)) if again else {}
    for name, timing in timings.items():
        found[name] |= {"seconds": timing.median, "rounds": timing.rounds}
    for figures in found.values():
        figures["seconds"] /= point.steps
    return found


def _fits(points: list[dict[str, Any]]) -> dict[str, Any]:
    fits = {what: fit([(p["size"], p[what]) for p in points]) for what in ("seconds", "bytes")}
    return {f"{what}_fit": found for what, found in fits.items() if found}


def _line(curve: Curve, size: int, lines: dict[str, list[dict[str, Any]]]) -> str:
    last = {n: p[-1] for n, p in lines.items() if p and p[-1]["size"] == size}
    figures = (
        f"{name} {1e3 * p['seconds']:.3f} ms, {p['bytes'] / 2**20:.1f} MiB"
        for name, p in last.items()
    )
    return f"{curve.axis} {size:>6}   " + "   ".join(figures)


def fitted(curve: dict[str, Any]) -> list[str]:
    """Describe a curve's exponents and its verdict, one per line."""
    lines = []
    for name, line in curve["lines"].items():
        for key, what in (("seconds_fit", "time"), ("bytes_fit", "memory")):
            if key in line and (what == "time" or curve["axis"] == "tokens"):
                lines.append(f"{what}, {name}: {described(line[key])}")
    if "linear_memory" in curve:
        lines.append(verdict(curve["linear_memory"]))
    return lines


def verdict(found: dict[str, Any]) -> str:
    first, last = (f"{b / 1024:.2f}" for b in found["bytes_per_token"])
    return (
        f"linear memory to {found['to']} tokens: {'yes' if found['linear'] else 'NO'} "
        f"({first} KiB a token at {found['from']}, {last} at {found['to']})"
    )


def _problems(curve: dict[str, Any]) -> list[str]:
    memory = curve.get("linear_memory", {"linear": True})
    lines = []
    if not memory["linear"]:
        lines.append(f"{curve['name']}: memory is not linear to {memory['to']} tokens")
    ours, others = (
        {p["size"]: p["error"] for n in names for p in curve["lines"][n]["points"] if "error" in p}
        for names in (["ours"], [n for n in curve["lines"] if n != "ours"])
    )
    for size, error in ours.items():
        if not error <= 2 * others.get(size, 0.0) + WRONG:
            lines.append(f"{curve['name']}, {curve['axis']} {size}: error {error:.1e}")
    return lines
