"""One run of the suite: what was asked for, and what was found so far."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import cases, compare, end_to_end, gpu_model, gpu_timing, machine, peers, report
from .arguments import DTYPES, FORWARD, FORWARD_SHAPES
from .baselines import REFUSALS, Baselines, first_line
from .case import Case, Plan, free_memory, relative_error
from .linear_cases import kept
from .memory import trim
from .timing import PARTS, Part, Run, Timing, joined, measure, part

BUDGETS = {"quick": 0.3, "default": 1.5, "full": 3.0}  # seconds a case
PASSES = {"quick": 2, "default": 3, "full": 2}  # through all cases, see timing.py
# Seconds within which another pass is begun only if it can be ended: a run has 5 minutes in all.
OPS_SECONDS = {"quick": 60.0, "default": 95.0, "full": float("inf")}
# Relative error from which a baseline has computed something else, and its time says nothing. The
# coarsest right one so far has 0.05; a kernel that left half of the elements out, 0.8 or NaN.
SOMETHING_ELSE = 0.25
COMPILE_SECONDS = 30.0  # of torch.compile, after which it is left out, but for a full run


@dataclass
class Measured:
    """Of one case, so far."""

    errors: dict[str, float] = field(default_factory=dict)
    passes: list[dict[str, Timing]] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)  # baseline -> n, where an nth is run


class Session:
    """results is what becomes the JSON file; it is written after each case."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        on_cpu = args.device == "cpu" and args.model != "tiny"
        self.speed = machine.measure() if on_cpu else machine.UNBOUND
        dtype = DTYPES[args.dtype]
        self.spec = cases.spec(args.model, dtype, self.device, args.level, args.tp, self.speed)
        self.compiling = 0.0  # seconds
        named = args.peers and [name for name in args.peers if name != "none"]
        self.peers, absent = peers.wanted(named, args.device)
        self.plans = cases.plan(self.spec, args.op)
        # Nobody else runs on a GPU meanwhile.
        self.passes = PASSES[args.level] if args.device == "cpu" else 1
        self._again: dict[int, dict[str, dict[str, Any]]] = {}
        options = ("model", "tp", "dtype", "backend", "device", "level", "baseline", "allocator")
        self.results: dict[str, Any] = {
            "schema": compare.SCHEMA,
            "environment": report.environment(self.device),
            "speed": asdict(self.speed) if on_cpu else None,
            "options": {name: getattr(args, name) for name in options},
            "peers": {peer.name: peer.version() for peer in self.peers},
            "complete": False,
            "skipped": absent,
            "ops": [],
        }

    def listed(self) -> list[tuple[str, str]]:
        """What would be run: an op and its shape, then the forward pass's jobs."""
        jobs = [job.name for job in end_to_end.plan(self.args.level, self.speed).jobs]
        if self.device.type != "cpu":
            jobs = ["prefill and decode"]
        names = jobs if self.wants_end_to_end() else []
        return [(p.op, p.shape) for p in self.plans] + [(FORWARD, name) for name in names]

    def write(self) -> None:
        report.write(self.args.json, self.results)

    def keep_scaling(self, found: dict[str, Any]) -> None:
        self.results["scaling"] = found
        self.write()

    def skip(self, what: str, why: str) -> None:
        self.results["skipped"][what] = why

    def run_ops(self) -> None:
        """In passes; the rows are printed in the last, or when somebody interrupts."""
        found: dict[str, Measured] = {plan.name: Measured() for plan in self.plans}
        rows: dict[str, dict[str, Any] | None] = {}
        shown: set[str] = set()
        begun, longest = time.perf_counter(), 0.0
        print(report.HEADER, flush=True)
        try:
            for number in range(1, self.passes + 1):
                start = time.perf_counter()
                left = OPS_SECONDS[self.args.level] - (start - begun)
                if number > 1 and longest > left:
                    break
                last = number == self.passes or 2 * longest > left
                for i, plan in enumerate(self.plans):
                    what = f"pass {number} of {self.passes}, {i + 1} of {len(self.plans)}"
                    with _status(f"{what}: {plan.name}"):
                        row = self.measure(plan, found[plan.name])
                    if row is not None or plan.name not in rows:
                        rows[plan.name] = row
                    self.results["ops"] = [row for row in rows.values() if row is not None]
                    self.write()
                    if last:
                        self._show(plan, rows[plan.name])
                        shown.add(plan.name)
                kept.fresh()
                longest = max(longest, time.perf_counter() - start)
                if last:
                    break
        finally:
            for plan in self.plans:
                if plan.name in rows and plan.name not in shown:
                    self._show(plan, rows[plan.name])
        print(report.LEGEND)

    def _show(self, plan: Plan, row: dict[str, Any] | None) -> None:
        skipped = f"{plan.name}: skipped, {self.results['skipped'].get(plan.name)}"
        print(report.line(row) if row else skipped, flush=True)

    def measure(self, plan: Plan, so_far: Measured) -> dict[str, Any] | None:
        """One more pass. None where the case does not fit into memory."""
        if plan.memory > free_memory(self.device):
            trim()  # of what was freed and kept
        if plan.memory > free_memory(self.device):
            if not so_far.passes:
                self.skip(plan.name, f"needs about {plan.memory / 2**30:.3g} GiB of memory")
            return None
        self.results["skipped"].pop(plan.name, None)
        case = cases.on(self.spec, plan.make())
        found = self._implementations(case, so_far)
        if not so_far.errors:
            so_far.errors = self._errors(case, found, so_far.parts)
        runs = {**found.runs, "limit": case.limit}
        for name, why in found.skipped.items():
            self.skip(f"{plan.name}: {name}", why)
        so_far.passes.append(self._times(runs, case))
        return report.row(case, joined(so_far.passes), so_far.errors)

    def _implementations(self, case: Case, so_far: Measured) -> Baselines:
        """Ours and every baseline of this case; later passes run those of the first."""
        found = Baselines(case.ours)
        for name, run in case.baselines.items():
            if not so_far.passes and self._wants(name):
                so_far.parts[name] = self._part(case, name)
            n = so_far.parts.get(name, 1)
            label, run = part(name, case.parts[name](n) if n > 1 else run, n)
            if label in so_far.passes[0] if so_far.passes else name in so_far.parts:
                found.add(label, run)
        for op, name, function in self.args.kernel:
            if op == case.op:
                _add(found, name, {name: case.user(function)}.copy)
        for peer in self.peers:
            _add(found, peer.name, functools.partial(peer.ops, case.op, case.inputs))
        return found

    def _wants(self, baseline: str) -> bool:
        if self.args.baseline is not None:
            return baseline in self.args.baseline
        if baseline != "torch.compile" or self.args.level == "full":
            return True
        return self.args.level != "quick" and self.compiling < COMPILE_SECONDS

    def _part(self, case: Case, name: str) -> int:
        """n, where a call of an nth of the work takes no longer than a case's budget."""
        if name not in case.parts or self.device.type != "cpu":
            return 1
        least = case.parts[name](PARTS)
        start = time.perf_counter()
        try:
            least(0)
        except REFUSALS:  # which is told when all of it is tried
            return 1
        took, n = time.perf_counter() - start, PARTS
        while n > 1 and 2 * took <= BUDGETS[self.args.level]:
            took, n = 2 * took, n // 2
        return n

    def _errors(self, case: Case, found: Baselines, parts: Mapping[str, int]) -> dict[str, float]:
        """Of each implementation, before anything is timed. What is refused is left out; what has
        another form than the op's result has no error, nor has a part of it."""
        exact, errors = case.exact(), {}
        yardstick = {n: run for n, run in _yardstick(case).items() if parts.get(n, 1) == 1}
        for name, run in {**yardstick, **found.runs}.items():
            if isinstance(run, Part):
                continue
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():  # SDPA explains each of its refusals
                    warnings.simplefilter("ignore")
                    result = run(0)
            except REFUSALS as why:
                if name == "ours":
                    raise
                found.runs.pop(name, None)
                found.skipped[name] = first_line(why)
                continue
            if name == "torch.compile":
                self.compiling += time.perf_counter() - start
            try:
                errors[name] = relative_error(case.value(result), exact)
            except (TypeError, RuntimeError, IndexError, AttributeError):
                if name == "ours":
                    raise
                continue
            if name in case.baselines and not errors[name] <= SOMETHING_ELSE:  # NaN as well
                found.runs.pop(name, None)
                found.skipped[name] = f"its result is wrong: relative error {errors.pop(name):.1e}"
        return errors

    def _times(self, runs: dict[str, Run], case: Case) -> dict[str, Timing]:
        budget = BUDGETS[self.args.level]
        if self.device.type == "cpu":
            return measure(runs, budget, case.move, self.passes)
        return gpu_timing.measure(runs, budget / 4, copies=8, uncapturable=case.uncapturable)

    def again(self, name: str, time: int) -> dict[str, Any] | None:
        """A case measured in one more pass, on other buffers; the forward pass's jobs together,
        once for each `time` that anybody asks again."""
        kept.fresh()
        for plan in self.plans:
            if plan.name == name:
                return self.measure(plan, Measured())
        if "end_to_end" in self.results and time not in self._again:
            self._again[time] = compare.rows({"ops": [], "end_to_end": self.end_to_end(times=1)})
        return self._again.get(time, {}).get(name)

    def wants_end_to_end(self) -> bool:
        """Where it is asked for by name, or everything is, at 8B."""
        a = self.args
        if a.op:
            return FORWARD in a.op
        return a.level != "quick" and (a.model, a.tp, a.dtype) == FORWARD_SHAPES

    def keep_end_to_end(self, found: dict[str, Any]) -> None:
        self.results["end_to_end"] = found
        self.write()

    def end_to_end(
        self,
        keep: Callable[[dict[str, Any]], None] = lambda found: None,
        times: int | None = None,
    ) -> dict[str, Any] | None:
        """times: of all passes; None: all of them."""
        if importlib.util.find_spec("transformers") is None:
            why = "transformers is not installed (extra: bench)"
            self.skip("end to end", why)
            say(f"without the forward pass: {why}")
            return None
        level = self.args.level
        if self.device.type == "cpu":
            options = (self.peers, self._wants, self.skip, keep, self.passes, times)
            return end_to_end.run(level, say, *options, speed=self.speed)
        return gpu_model.run(self.device, 4 * BUDGETS[level], say)

    def compare(self, old: dict[str, Any]) -> bool:
        """Whether anything has become slower."""
        changes = compare.compare(old, self.results, self.again, say)
        self.results["compared"] = {
            "with": old["environment"].get("commit"),
            "changes": [
                {"name": c.name, "log": c.slowdown, "noise": c.noise, "verdict": c.verdict}
                for c in changes
            ],
        }
        print(compare.summary(changes, old, self.results))
        return any(c.verdict == "slower" for c in changes)


def _add(to: Baselines, who: str, runs: Callable[[], dict[str, Run]]) -> None:
    """Somebody else's runs, each tried once: what fails costs its own columns only."""
    try:
        found = runs()
        for run in found.values():
            run(0)
    except Exception as why:
        kind = "" if isinstance(why, peers.Unsupported) else f"{type(why).__name__}: "
        to.skipped[who] = f"{kind}{why}"
    else:
        to.runs.update(found)


def say(text: str) -> None:
    print(text, flush=True)


def _yardstick(case: Case) -> dict[str, Run]:
    """Whose error ours is held against, whether or not it is timed: the eager twin where it fits,
    else PyTorch's own."""
    name = "eager" if "eager" in case.baselines else next(iter(case.baselines))
    return {name: case.baselines[name]}


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """What is being measured, on a terminal, while it is."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
