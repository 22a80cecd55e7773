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
from typing import Any, NamedTuple

import torch

import llama_fast as lf

from ..cases import Spec, attention, relative_error
from ..cases.measured import WRONG
from ..cases.shapes import Sweep, layer_shapes
from ..results.files import Record
from ..timing import Run, measure
from ..timing.memory import peak_memory
from . import models
from .fit import described, fit, linear_memory

PREFILL_CHUNK = 512  # tokens of a prompt at once, as in generate on a CPU
ONCE = 1.0  # seconds: a run that takes longer is timed once
ROUNDS = 0.4  # seconds of rounds per point
MEMORY = 3 << 30  # bytes that a point may take
STEPS = 4  # tokens decoded one by one at each context


class Level(NamedTuple):
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


class Curve(NamedTuple):
    name: str
    what: str
    axis: str  # what the sizes count
    linear: bool = False  # whether memory has to be linear in the sizes


class Point(NamedTuple):
    """The runs at one size. check: result -> its error."""

    size: int
    runs: dict[str, Run]
    check: Callable[[Any], float] | None = None
    steps: int = 1  # in a run; the time of one is reported


def run(device: torch.device, level: str, record: Record) -> dict[str, Any]:
    """Measure and fit every curve. "wrong" lists problems."""
    sizes = LEVELS[level]
    found: dict[str, Any] = {"curves": [], "wrong": []}
    with torch.inference_mode():
        for curve, points in _curves(device, sizes):
            measured = _measured(curve, points, sizes, device, record.say)
            found["curves"].append(measured)
            for line in _problems(measured):
                found["wrong"].append(line)
                record.say(f"WRONG: {line}")
            record.keep(scaling=found)
    return found


def _doubling(first: int, last: int) -> tuple[int, ...]:
    first = min(first, last)
    return tuple(first << i for i in range((last // first).bit_length()))


def _curves(device: torch.device, sizes: Level) -> Iterator[tuple[Curve, Iterator[Point]]]:
    tp = 8 if device.type == "cpu" else 1
    lengths, contexts = (
        _doubling(first, last)
        for first, last in ((FIRST_TOKENS, sizes.tokens), (FIRST_CONTEXT, sizes.context))
    )
    fixed = contexts[0] * (1 if device.type == "cpu" else 4)
    some, all_heads = (
        f"{m.heads}/{m.kv_heads} x {m.head_dim}" for m in (layer_shapes("8b", n) for n in (tp, 1))
    )
    yield (
        Curve("prefill attention", f"{some}, causal", "tokens", linear=True),
        _cases(device, tp, "tokens", prompts=lengths),
    )
    yield (
        Curve("decode attention, context", f"{all_heads}, 1 query", "context"),
        _cases(device, 1, "context", caches=tuple((1, n) for n in contexts)),
    )
    yield (
        Curve("decode attention, batch", f"{all_heads}, 1 query, {fixed} keys each", "batch"),
        _cases(device, 1, "batch", caches=tuple((n, fixed) for n in _doubling(1, sizes.batch))),
    )
    layer = _Layer(device)
    prompts = _doubling(FIRST_PROMPT, sizes.prompt)
    what = f"one 8B layer and a head of {layer.model.config.vocab_size}, FP8"
    chunks = f"{what}, cache included, chunks of {PREFILL_CHUNK}"
    yield Curve("prefill", chunks, "tokens", linear=True), map(layer.prefill, prompts)
    yield Curve("decode", f"{what}, a token", "context"), map(layer.decode, prompts)


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
        others = {n: r for n, r in case.baselines.items() if n in ("eager", "SDPA")}

        def check(result: Any) -> float:
            return relative_error(case.value(result), case.exact())  # noqa: B023

        yield Point(plan.axes[axis], {"ours": case.ours, **others}, check)


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
        for name in point.runs:
            limit = sizes.ours if name == "ours" else sizes.others
            if why := _too_much(lines.get(name, []), point.size, limit):
                out.setdefault(name, f"{curve.axis} {point.size} on: {why}")
        if "ours" in out:
            break
        runs = {name: run for name, run in point.runs.items() if name not in out}
        figures = _figures(point, runs, device)
        for name, found in figures.items():
            lines.setdefault(name, []).append(found)
        shown = (
            f"{name} {1e3 * p['seconds']:.3f} ms, {p['bytes'] / 2**20:.1f} MiB"
            for name, p in figures.items()
        )
        say(f"  {curve.axis} {point.size:>6}   " + "   ".join(shown))
    for name, why in out.items():
        say(f"  without {name} from {why}")
    curve_found: dict[str, Any] = {
        "name": curve.name,
        "what": curve.what,
        "axis": curve.axis,
        "lines": {name: {"points": points} for name, points in lines.items()},
        "left_out": out,
    }
    for line in curve_found["lines"].values():
        for what in ("seconds", "bytes"):
            if power := fit([(p["size"], p[what]) for p in line["points"]]):
                line[f"{what}_fit"] = power
    memory = linear_memory([(p["size"], p["bytes"]) for p in lines["ours"]])
    if curve.linear and memory:
        curve_found["linear_memory"] = memory
    for line in fitted(curve_found):
        say(f"  {line}")
    return curve_found


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


def fitted(curve: dict[str, Any]) -> list[str]:
    """Describe a curve's exponents and its verdict, one per line."""
    lines = []
    for name, line in curve["lines"].items():
        for key, what in (("seconds_fit", "time"), ("bytes_fit", "memory")):
            if key in line and (what == "time" or curve["axis"] == "tokens"):
                lines.append(f"{what}, {name}: {described(line[key])}")
    return lines + [verdict(found) for key, found in curve.items() if key == "linear_memory"]


def verdict(found: dict[str, Any]) -> str:
    first, last = (f"{b / 1024:.2f}" for b in found["bytes_per_token"])
    return (
        f"linear memory to {found['to']} tokens: {'yes' if found['linear'] else 'NO'} "
        f"({first} KiB a token at {found['from']}, {last} at {found['to']})"
    )


def _problems(curve: dict[str, Any]) -> Iterator[str]:
    memory = curve.get("linear_memory", {"linear": True})
    if not memory["linear"]:
        yield f"{curve['name']}: memory is not linear to {memory['to']} tokens"
    errors = {
        name: {p["size"]: p["error"] for p in line["points"] if "error" in p}
        for name, line in curve["lines"].items()
    }
    for size, error in errors.pop("ours").items():
        other = next((e[size] for e in list(errors.values())[::-1] if size in e), 0.0)
        if not error <= 2 * other + WRONG:
            yield f"{curve['name']}, {curve['axis']} {size}: error {error:.1e}"
