"""Measure cases: choose the implementations, find their errors, then their times."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..peers import Peer, Unsupported
from ..results.files import Record
from ..timing import Part, Run, Timing, figures, joined, measure, part
from ..timing.memory import free_memory, trim
from .case import PARTS, Case, Plan, relative_error

BUDGETS = {"quick": 0.3, "default": 1.5, "full": 3.0}  # seconds per case
COMPILE_SECONDS = 30.0  # after so much torch.compile leave it out, except in a full run
# Relative error from which a baseline's result is wrong and its time means nothing. The coarsest
# right one so far has 0.05; a kernel that left out half of the elements had 0.8 or NaN.
SOMETHING_ELSE = 0.25
WRONG = 2.0**-7  # added to twice eager's error: an ulp of bf16, for cases where eager is exact
# Raised where a version, a shape or a chip does not support a baseline.
REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError)


@dataclass
class Measured:
    """A case's errors and timings so far."""

    errors: dict[str, float] = field(default_factory=dict)
    passes: list[dict[str, Timing]] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)  # baseline -> n: it runs an nth


@dataclass
class Measurer:
    """Measure cases as a command line asks, pass by pass."""

    args: argparse.Namespace
    peers: Sequence[Peer]
    passes: int  # of all cases, see timing/clock.py
    record: Record
    compiling: float = 0.0  # seconds so far

    @property
    def device(self) -> torch.device:
        return torch.device(self.args.device)

    @property
    def columns(self) -> list[str]:
        """Return our backends after the first one."""
        return (self.args.backend or [])[1:]

    def measure(self, plan: Plan, so_far: Measured) -> dict[str, Any] | None:
        """Measure one more pass and return the row; None if the case does not fit into memory."""
        if plan.memory > free_memory(self.device):
            trim()  # give kept memory back
        if plan.memory > free_memory(self.device):
            if not so_far.passes:
                why = f"needs about {plan.memory / 2**30:.3g} GiB of memory"
                self.record.skip(plan.name, why)
            return None
        case = plan.make()
        runs = self._runs(plan, case, so_far)
        if not so_far.errors:
            so_far.errors = self._errors(plan, case, runs, so_far)
        budget = BUDGETS[self.args.level] / (1 if self.device.type == "cpu" else 4)
        runs["limit"] = case.limit.run
        options: dict[str, Any] = {"copies": case.copies, "waits": case.waits}
        so_far.passes.append(measure(runs, budget, self.device, passes=self.passes, **options))
        columns = [name for name in self.columns if name in so_far.errors]
        return row(plan, case, joined(so_far.passes), so_far.errors, columns)

    def _runs(self, plan: Plan, case: Case, so_far: Measured) -> dict[str, Run]:
        """Return ours and every other implementation of a case; later passes run those of the first
        one. Columns other than PyTorch's are tried once, and one that fails is left out."""
        runs: dict[str, Run] = {"ours": case.ours}
        for name, run in case.baselines.items():
            if not so_far.passes and self.wants(name):
                so_far.parts[name] = self._part(case, name)
            n = so_far.parts.get(name, 1)
            label, run = part(name, case.parts[name](n) if n > 1 else run, n)
            if label in so_far.passes[0] if so_far.passes else name in so_far.parts:
                runs[label] = run
        others = {name: case.on(name) for name in self.columns}
        others |= {name: case.user(f) for op, name, f in self.args.kernel if op == case.op}
        for peer in self.peers if case.inputs else ():
            try:
                others |= peer.ops(case.op, case.inputs)
            except Exception as why:
                self._refused(plan, peer.name, why)
        for label, run in others.items():
            try:
                run(0)
                runs[label] = run
            except Exception as why:
                self._refused(plan, label, why)
        return runs

    def _refused(self, plan: Plan, name: str, why: Exception) -> None:
        refused = isinstance(why, Unsupported | NotImplementedError)
        text = ("" if refused else f"{type(why).__name__}: ") + first_line(why)
        self.record.skip(f"{plan.name}: {name}", text)
        if name in self.columns and not refused:
            self.record.fail(f"{plan.name} on {name}", text)

    def wants(self, baseline: str) -> bool:
        if self.args.baseline is not None:
            return baseline in self.args.baseline
        if baseline != "torch.compile" or self.args.level == "full":
            return True
        return self.args.level != "quick" and self.compiling < COMPILE_SECONDS

    def _part(self, case: Case, name: str) -> int:
        """Return n so that a call of an nth of the work takes at most a case's budget."""
        if name not in case.parts or not case.divides or self.device.type != "cpu":
            return 1
        least = case.parts[name](PARTS)
        start = time.perf_counter()
        try:
            least(0)
        except REFUSALS:  # _errors reports it
            return 1
        took, n = time.perf_counter() - start, PARTS
        while n > 1 and 2 * took <= BUDGETS[self.args.level]:
            took, n = 2 * took, n // 2
        return n

    def _errors(
        self, plan: Plan, case: Case, runs: dict[str, Run], so_far: Measured
    ) -> dict[str, float]:
        """Return each implementation's error, before anything is timed, and the yardstick's even if
        it is not timed: the eager twin if it fits in memory, else PyTorch's own. A run that raises
        or is wrong is removed from runs. A run of a part, or with a result of another form, has no
        error."""
        exact, errors = case.exact(), {}
        yardstick = "eager" if "eager" in case.baselines else next(iter(case.baselines))
        first = {yardstick: case.baselines[yardstick]}
        if so_far.parts.get(yardstick, 1) > 1:
            first = {}
        for name, run in {**first, **runs}.items():
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
                runs.pop(name, None)
                self.record.skip(f"{plan.name}: {name}", first_line(why))
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
                runs.pop(name, None)
                wrong = f"its result is wrong: relative error {errors.pop(name):.1e}"
                self.record.skip(f"{plan.name}: {name}", wrong)
        return errors


def row(
    plan: Plan,
    case: Case,
    timings: dict[str, Timing],
    errors: dict[str, float],
    backends: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a case's figures. "times": how many times faster ours is than each implementation;
    "errors": the error of each against fp64. backends: our other backends, which must meet the same
    bound."""
    mine, work = timings["ours"].median, plan.work(case.limit)
    limit_rate = case.limit.work / timings["limit"].median
    times = {n: t.median / mine for n, t in timings.items() if n not in ("ours", "limit")}
    reached = {"limit": work / mine / limit_rate, **times}
    targets = {name: wanted for name, wanted in case.targets.items() if name in reached}
    not_twins = ("ours", *backends)
    twin = next((n for n in ("eager", *errors) if n in errors and n not in not_twins), None)
    eager_error = errors[twin] if twin else 0.0
    bound = 2 * eager_error + WRONG
    wrong = [n for n in not_twins if n in errors and not errors[n] <= bound]  # NaN is wrong too
    scale = 1e12 if case.limit.computes else 1e9
    return {
        "op": plan.op,
        "shape": plan.shape,
        "axes": plan.axes,
        "unit": "TFLOP/s" if case.limit.computes else "GB/s",
        "work": work,
        "bytes": plan.bytes,
        "flops": plan.flops,
        "rate": work / mine / scale,
        "limit": case.limit.name,
        "limit_rate": limit_rate / scale,
        "of_limit": reached["limit"],
        "times": times,
        "targets": targets,
        "met": {name: reached[name] >= wanted for name, wanted in targets.items()},
        "error": errors["ours"],
        "eager_error": eager_error,
        "errors": errors,
        "wrong": bool(wrong),
        "seconds": figures(timings, "ours"),
        **({"wrong_backends": wrong} if wrong and backends else {}),
    }


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
