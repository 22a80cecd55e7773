"""Run the suite: measure what the command line asks for, and print and store what was found."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch

import llama_fast as lf
from llama_fast.parallel import launched

from . import arguments, cases, peers
from .arguments import DTYPES, FORWARD, FORWARD_SHAPES
from .cases.case import Plan
from .cases.linear import kept
from .cases.measured import Measured, Measurer, first_line
from .cases.shapes import PRESETS
from .model import forward, ranks, scaling, whole
from .results import compare, files, plot, publish, report
from .timing import UNBOUND, clock, machine
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
            if launched():
                return ranks.main(args, DTYPES[args.dtype])
            session = Session(args)
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
            return session.run()
    finally:
        torch.set_num_threads(before)


class Session:
    """A run. results is the content of the JSON file, which is written after each case."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        on_cpu = args.device == "cpu" and args.model != "tiny"
        speed = machine.measure() if on_cpu else UNBOUND
        spec = cases.spec(args.model, DTYPES[args.dtype], self.device, args.level, args.tp, speed)
        wanted = args.peers and [name for name in args.peers if name != "none"]
        found, absent = peers.wanted(wanted, args.device)
        plans = cases.plan(spec, args.op, every=args.level == "full")
        self.plans = [plan for plan in plans if args.case in plan.name]
        passes = PASSES[args.level] if args.device == "cpu" else 1  # a GPU is not shared
        names = ("model", "tp", "dtype", "device", "level", "baseline", "allocator")
        options = {name: getattr(args, name) for name in names}
        self.record = files.Record(
            args.json,
            schema=compare.SCHEMA,
            environment=machine.environment(self.device, files.commit()),
            speed=asdict(speed) if on_cpu else None,
            options={**options, "backend": ",".join(args.backend) if args.backend else None},
            peers={peer.name: peer.version() for peer in found},
            complete=False,
            skipped=absent,
            ops=[],
        )
        self.results = self.record.results
        self.measurer = Measurer(args, found, passes, self.record)
        self.asked = forward.Asked(
            args.level, self.device, speed, found, passes, self.measurer.wants, self.record
        )
        self.old = compare.load(args.compare) if args.compare else None
        if self.old is not None:
            compare.check(self.old, self.results)
        self._forward_again: dict[str, Any] | None = None

    def run(self) -> int:
        torch.manual_seed(0)
        args, results = self.args, self.results
        print(report.heading(results))
        status = RAN
        try:
            if args.whole:
                self.whole()
            elif args.scaling:
                scaling.run(self.device, args.level, self.record)
            else:
                with torch.inference_mode():
                    if self.plans:
                        self.run_ops()
                    if self.wants_forward():
                        self.forward()
                    if self.old is not None and self.compare(self.old):
                        status = SLOWER
            results["complete"] = True
        except KeyboardInterrupt:
            print("interrupted; the figures measured so far are kept", file=sys.stderr)
            status = INTERRUPTED
        self.record.keep()
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

    def listed(self) -> list[tuple[str, str]]:
        """List what a run measures: ops and shapes, then the forward pass's jobs."""
        names = [job.name for job in self.asked.sizes().jobs] if self.wants_forward() else []
        return [(p.op, p.shape) for p in self.plans] + [(FORWARD, name) for name in names]

    def whole(self) -> None:
        """Run the whole 8B, or one layer of a larger model."""
        model, say, speed = self.args.model, self.record.say, self.asked.speed
        if model in ("70b", "405b"):
            self.results["layer"] = whole.layer(model, PRESETS[model](), say, speed, self.device)
        else:
            self.results["whole"] = whole.run(say, device=self.device)

    # ---- the ops ----

    def run_ops(self) -> None:
        """Measure the ops in passes; print the rows in the last one, or at an interrupt."""
        found = {plan.name: Measured() for plan in self.plans}
        rows: dict[str, dict[str, Any] | None] = {}
        unseen = {plan.name for plan in self.plans}
        print(report.HEADER, flush=True)
        try:
            for number, last in clock.passes(self.measurer.passes, OPS_SECONDS[self.args.level]):
                for i, plan in enumerate(self.plans):
                    name = plan.name
                    if name in self.results["failed"]:
                        continue
                    what = f"pass {number} of {self.measurer.passes}, {i + 1} of {len(self.plans)}"
                    with _status(f"{what}: {name}"):
                        row = self._try(plan, found[name])
                    if row is not None or name not in rows:
                        rows[name] = row
                    self.record.keep(ops=[row for row in rows.values() if row is not None])
                    if last:
                        unseen.discard(name)
                        self._show(name, rows[name])
                kept.clear()
        finally:
            for name in rows:
                if name in unseen:
                    self._show(name, rows[name])
        print(report.LEGEND)

    def _show(self, name: str, row: dict[str, Any] | None) -> None:
        why = self.results["skipped"].get(name) or self.results["failed"].get(name)
        self.record.say(report.line(row, self.args.targets) if row else f"{name}: skipped, {why}")

    def _try(self, plan: Plan, so_far: Measured) -> dict[str, Any] | None:
        """Measure a case once more. A kernel that fails loses its own case only, unless it breaks
        the GPU's context."""
        try:
            row = self.measurer.measure(plan, so_far)
            if row is not None:
                self.results["skipped"].pop(plan.name, None)
            return row
        except NotImplementedError as why:
            self.record.skip(plan.name, first_line(why))
        except Exception as error:
            if self.args.debug:
                raise
            self.record.fail(plan.name, f"{type(error).__name__}: {first_line(error)}")
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the context is broken
        return None

    # ---- the forward pass ----

    def wants_forward(self) -> bool:
        """Return whether the forward pass is asked for: by name, or with everything at 8B."""
        a = self.args
        if a.op:
            return FORWARD in a.op
        return a.level != "quick" and not a.case and (a.model, a.tp, a.dtype) == FORWARD_SHAPES

    def forward(self) -> None:
        if importlib.util.find_spec("transformers") is None:
            why = "transformers is not installed (extra: bench)"
            self.record.skip("end to end", why)
            self.record.say(f"without the forward pass: {why}")
            return
        self.record.keep(end_to_end=forward.run(self.asked))
        self.record.say(report.forward(self.results["end_to_end"], self.args.targets))

    # ---- comparing ----

    def again(self, name: str) -> dict[str, Any] | None:
        """Measure a case in one more pass, on other buffers; the forward pass's jobs together."""
        kept.clear()
        for plan in self.plans:
            if plan.name == name:
                return self.measurer.measure(plan, Measured())
        if self._forward_again is None:
            self.asked.record = files.Record()
            self._forward_again = compare.named({"end_to_end": forward.run(self.asked, times=1)})
        return self._forward_again.get(name)

    def compare(self, old: dict[str, Any]) -> bool:
        """Compare with an older run; return whether anything has become slower."""
        changes = compare.compare(old, self.results, self.again, self.record.say)
        self.record.keep(
            compared={
                "with": old["environment"].get("commit"),
                "changes": [
                    {"name": c.name, "log": c.slowdown, "noise": c.noise, "verdict": c.verdict}
                    for c in changes
                ],
            }
        )
        print(compare.summary(changes, old, self.results))
        return any(c.verdict == "slower" for c in changes)


def _status(text: str) -> AbstractContextManager[Any]:
    """Show on a terminal what is being measured."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else contextlib.nullcontext()
