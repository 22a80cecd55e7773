"""Run the suite: measure what the command line asks for, and print and store what was found."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

import llama_fast as lf

from . import arguments, cases, peers
from .arguments import DTYPES, FORWARD, FORWARD_SHAPES
from .cases.case import Plan
from .cases.linear import kept
from .cases.measured import Measured, Measurer, first_line
from .model import forward, scaling, whole
from .results import compare, plot, publish, report
from .results.files import write
from .timing import machine
from .timing.memory import keep_freed

RAN, WRONG, USAGE, SLOWER, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes
PASSES = {"quick": 2, "default": 3, "full": 2}  # through all cases, see timing/clock.py
# Another pass starts only if it can end within these seconds: a whole run takes 5 minutes.
OPS_SECONDS = {"quick": 60.0, "default": 95.0, "full": float("inf")}


def main(argv: Sequence[str], prog: str) -> int:
    args = arguments.parser(prog).parse_args(argv)
    if args.publish:
        return publish.main()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    try:
        try:
            arguments.check(args)
            # --scaling and --whole measure peak memory, which kept memory would hide.
            if args.scaling or args.whole or not (args.allocator == "keep" and keep_freed()):
                args.allocator = "system"
            torch.set_num_threads(args.threads or before)
            session = Session(args)
            old = compare.load(args.compare) if args.compare else None
            if old is not None:
                compare.check(old, session.results)
        except ValueError as error:
            if args.debug:
                raise
            print(f"bench: {error}", file=sys.stderr)
            return USAGE
        if args.list:
            print("\n".join(f"{name:<24}{shape}" for name, shape in session.listed()))
            return RAN
        backend = lf.use_backend(args.backend[0]) if args.backend else contextlib.nullcontext()
        with backend:
            return session.run(old)
    finally:
        torch.set_num_threads(before)


def say(text: str) -> None:
    print(text, flush=True)


class Session:
    """A run. results is the content of the JSON file, which is written after each case."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        on_cpu = args.device == "cpu" and args.model != "tiny"
        self.speed = machine.measure() if on_cpu else machine.UNBOUND
        dtype = DTYPES[args.dtype]
        self.spec = cases.spec(args.model, dtype, self.device, args.level, args.tp, self.speed)
        wanted = args.peers and [name for name in args.peers if name != "none"]
        self.peers, absent = peers.wanted(wanted, args.device)
        plans = cases.plan(self.spec, args.op, every=args.level == "full")
        self.plans = [plan for plan in plans if args.case in plan.name]
        # A GPU is not shared, so one pass is enough.
        self.passes = PASSES[args.level] if args.device == "cpu" else 1
        self.measurer = Measurer(args, self.peers, self.passes, self.skip, self.fail)
        self._forward_again: dict[str, Any] | None = None
        names = ("model", "tp", "dtype", "device", "level", "baseline", "allocator")
        options = {name: getattr(args, name) for name in names}
        self.results: dict[str, Any] = {
            "schema": compare.SCHEMA,
            "environment": report.environment(self.device),
            "speed": asdict(self.speed) if on_cpu else None,
            "options": {**options, "backend": ",".join(args.backend) if args.backend else None},
            "peers": {peer.name: peer.version() for peer in self.peers},
            "complete": False,
            "skipped": absent,
            "failed": {},
            "ops": [],
        }

    def run(self, old: dict[str, Any] | None) -> int:
        torch.manual_seed(0)
        args, results = self.args, self.results
        print(report.heading(results))
        status = RAN
        try:
            if args.whole:
                results["whole"] = whole.run(say, device=self.device)
            elif args.scaling:
                scaling.run(self.device, args.level, say, functools.partial(self.keep, "scaling"))
            else:
                with torch.inference_mode():
                    if self.plans:
                        self.run_ops()
                    if self.wants_forward():
                        self.forward()
                        if "end_to_end" in results:
                            say(report.forward(results["end_to_end"], args.targets))
                    if old is not None and self.compare(old):
                        status = SLOWER
            results["complete"] = True
        except KeyboardInterrupt:
            print("interrupted; the figures measured so far are kept", file=sys.stderr)
            status = INTERRUPTED
        write(args.json, results)
        written = [args.json]
        if results["ops"] or results["failed"] or "end_to_end" in results:
            print(report.summary(results, args.targets))
        if not args.no_plot:
            try:
                written += plot.all_of(results, args.plot or args.json)
            except ImportError as error:
                print(f"no plot: {error}; pip install 'llama_fast[bench]'", file=sys.stderr)
        print("written: " + "  ".join(str(path) for path in written))
        wrong = any(r["wrong"] for r in results["ops"]) or results.get("scaling", {}).get("wrong")
        return WRONG if (wrong or results["failed"]) and status == RAN else status

    def keep(self, what: str, found: Any) -> None:
        self.results[what] = found
        write(self.args.json, self.results)

    def skip(self, what: str, why: str) -> None:
        self.results["skipped"][what] = why

    def fail(self, what: str, why: str) -> None:
        self.results["failed"][what] = why

    def listed(self) -> list[tuple[str, str]]:
        """List what a run measures: ops and shapes, then the forward pass's jobs."""
        names = [job.name for job in self._asked().sizes().jobs] if self.wants_forward() else []
        return [(p.op, p.shape) for p in self.plans] + [(FORWARD, name) for name in names]

    # ---- the ops ----

    def run_ops(self) -> None:
        """Measure the ops in passes; print the rows in the last one, or at an interrupt."""
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
                    if plan.name in self.results["failed"]:
                        continue
                    what = f"pass {number} of {self.passes}, {i + 1} of {len(self.plans)}"
                    with _status(f"{what}: {plan.name}"):
                        row = self._try(plan, found[plan.name])
                    if row is not None or plan.name not in rows:
                        rows[plan.name] = row
                    self.keep("ops", [row for row in rows.values() if row is not None])
                    if last:
                        self._show(plan, rows[plan.name])
                        shown.add(plan.name)
                kept.clear()
                longest = max(longest, time.perf_counter() - start)
                if last:
                    break
        finally:
            for plan in self.plans:
                if plan.name in rows and plan.name not in shown:
                    self._show(plan, rows[plan.name])
        print(report.LEGEND)

    def _show(self, plan: Plan, row: dict[str, Any] | None) -> None:
        why = self.results["skipped"].get(plan.name) or self.results["failed"].get(plan.name)
        say(report.line(row, self.args.targets) if row else f"{plan.name}: skipped, {why}")

    def _try(self, plan: Plan, so_far: Measured) -> dict[str, Any] | None:
        """Measure a case once more. A kernel that fails loses its own case only, unless it breaks
        the GPU's context."""
        try:
            row = self.measurer.measure(plan, so_far)
            if row is not None:
                self.results["skipped"].pop(plan.name, None)
            return row
        except NotImplementedError as why:
            self.skip(plan.name, first_line(why))
            return None
        except Exception as error:
            if self.args.debug:
                raise
            self.fail(plan.name, f"{type(error).__name__}: {first_line(error)}")
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the context is broken
            return None

    # ---- the forward pass ----

    def wants_forward(self) -> bool:
        """Return whether the forward pass is asked for: by name, or with everything at 8B."""
        a = self.args
        if a.op:
            return FORWARD in a.op
        whole = a.level != "quick" and not a.case
        return whole and (a.model, a.tp, a.dtype) == FORWARD_SHAPES

    def _asked(self) -> forward.Asked:
        return forward.Asked(
            self.args.level,
            self.device,
            self.speed,
            self.peers,
            self.passes,
            self.measurer.wants,
            self.skip,
            say,
            functools.partial(self.keep, "end_to_end"),
        )

    def forward(self) -> None:
        if importlib.util.find_spec("transformers") is None:
            why = "transformers is not installed (extra: bench)"
            self.skip("end to end", why)
            say(f"without the forward pass: {why}")
            return
        self.keep("end_to_end", forward.run(self._asked()))

    # ---- comparing ----

    def again(self, name: str) -> dict[str, Any] | None:
        """Measure a case in one more pass, on other buffers; the forward pass's jobs together."""
        kept.clear()
        for plan in self.plans:
            if plan.name == name:
                return self.measurer.measure(plan, Measured())
        if self._forward_again is None:
            asked = self._asked()
            asked.keep = lambda found: None
            found = forward.run(asked, times=1)
            self._forward_again = compare.named({"ops": [], "end_to_end": found})
        return self._forward_again.get(name)

    def compare(self, old: dict[str, Any]) -> bool:
        """Compare with an older run; return whether anything has become slower."""
        write(self.args.json, self.results)
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


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """Show on a terminal what is being measured."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
