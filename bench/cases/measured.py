"""Measure cases: choose the implementations, find their errors, then their times."""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from ..peers import Peer, Unsupported
from ..results import report
from ..timing import Part, Run, Timing, joined, measure, part
from ..timing.memory import free_memory, trim
from .case import PARTS, Case, Plan, relative_error

BUDGETS = {"quick": 0.3, "default": 1.5, "full": 3.0}  # seconds per case
COMPILE_SECONDS = 30.0  # after so much torch.compile leave it out, except in a full run
# Relative error from which a baseline's result is wrong and its time means nothing. The coarsest
# right one so far has 0.05; a kernel that left out half of the elements had 0.8 or NaN.
SOMETHING_ELSE = 0.25
# Raised where a version, a shape or a chip does not support a baseline.
REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError)


@dataclass
class Measured:
    """What is known of a case so far."""

    errors: dict[str, float] = field(default_factory=dict)
    passes: list[dict[str, Timing]] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)  # baseline -> n: it runs an nth


@dataclass
class Measurer:
    """Measure cases as a command line asks, pass by pass."""

    args: argparse.Namespace
    peers: Sequence[Peer]
    passes: int  # of all cases, see timing/clock.py
    skip: Callable[[str, str], None]  # name of what is left out, reason
    fail: Callable[[str, str], None]  # name of ours that failed, reason
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
                self.skip(plan.name, f"needs about {plan.memory / 2**30:.3g} GiB of memory")
            return None
        case = plan.make()
        runs = self._runs(plan, case, so_far)
        if not so_far.errors:
            so_far.errors = self._errors(plan, case, runs, so_far)
        budget = BUDGETS[self.args.level] / (1 if self.device.type == "cpu" else 4)
        so_far.passes.append(
            measure(
                {**runs, "limit": case.limit.run},
                budget,
                self.device,
                passes=self.passes,
                copies=case.copies,
                waits=case.waits,
            )
        )
        columns = [name for name in self.columns if name in so_far.errors]
        return report.row(case, joined(so_far.passes), so_far.errors, columns)

    def _runs(self, plan: Plan, case: Case, so_far: Measured) -> dict[str, Run]:
        """Return ours and every other implementation of a case; later passes run those of the first
        one. Columns other than PyTorch's are tried once, and one that fails is left out."""
        runs = {"ours": case.ours}
        for name, run in case.baselines.items():
            if not so_far.passes and self.wants(name):
                so_far.parts[name] = self._part(case, name)
            n = so_far.parts.get(name, 1)
            label, run = part(name, case.parts[name](n) if n > 1 else run, n)
            if label in so_far.passes[0] if so_far.passes else name in so_far.parts:
                runs[label] = run
        others: dict[str, Callable[[], dict[str, Run]]] = {
            name: {name: case.on(name)}.copy for name in self.columns
        }
        for op, name, function in self.args.kernel:
            if op == case.op:
                others[name] = {name: case.user(function)}.copy
        for peer in self.peers if case.inputs else ():
            others[peer.name] = functools.partial(peer.ops, case.op, case.inputs)
        for name, make in others.items():
            try:
                found = make()
            except Exception as why:
                found = {name: functools.partial(_raise, why)}
            for label, run in found.items():
                try:
                    run(0)
                    runs[label] = run
                except Exception as why:
                    self._refused(plan, label, why)
        return runs

    def _refused(self, plan: Plan, name: str, why: Exception) -> None:
        refused = isinstance(why, Unsupported | NotImplementedError)
        text = ("" if refused else f"{type(why).__name__}: ") + first_line(why)
        self.skip(f"{plan.name}: {name}", text)
        if name in self.columns and not refused:
            self.fail(f"{plan.name} on {name}", text)

    def wants(self, baseline: str) -> bool:
        if self.args.baseline is not None:
            return baseline in self.args.baseline
        if baseline != "torch.compile" or self.args.level == "full":
            return True
        return self.args.level != "quick" and self.compiling < COMPILE_SECONDS

    def _part(self, case: Case, name: str) -> int:
        """Return n such that a call of an nth of the work takes at most a case's budget."""
        if name not in case.parts or self.device.type != "cpu":
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
        """Return each implementation's error, before anything is timed, and the yardstick's, even
        if it is not timed: the eager twin if it fits, else PyTorch's own. A run that raises or is
        wrong is removed from runs. A part of the work has no error, nor has a result of another
        form."""
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
                self.skip(f"{plan.name}: {name}", first_line(why))
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
                self.skip(f"{plan.name}: {name}", wrong)
        return errors


def _raise(error: Exception, _: int) -> NoReturn:
    raise error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
