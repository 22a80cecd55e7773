"""python -m bench: every op at Llama 3.1's shapes, then the forward pass, against eager PyTorch and
every peer that is installed, on the device at hand."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import llama_fast as lf
from llama_fast.backends import BACKENDS

from . import (
    cases,
    compare,
    csv_file,
    end_to_end,
    gpu_model,
    gpu_timing,
    peers,
    plot,
    publish,
    report,
    scaling,
)
from .baselines import Baselines
from .case import Case, Plan, free_memory, relative_error
from .linear_cases import kept
from .shapes import MODELS
from .timing import Run, Timing, measure

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BUDGETS = {"quick": 0.3, "default": 1.5, "full": 3.0}  # seconds a case
RAN, WRONG, USAGE, SLOWER, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes
EPILOG = """examples:
  python -m bench                          every op, then prefill and decode (under 5 minutes)
  python -m bench --op attention,linear    these only
  python -m bench --quick                  fewer rounds, no torch.compile, no end to end
  python -m bench --full                   every size: M to 16384, contexts to 128k (40 minutes)
  python -m bench --model 405b --tp 8      the shapes of one rank of eight
  python -m bench --compare OLD.json       fails where something has become slower since
  python -m bench --kernel rms_norm=my_package.norms:fast_norm
                                           one more column: your function, called as lf.rms_norm is
  python -m bench --scaling                time and memory to 131,072 tokens, exponents fitted
  python -m bench --whole                  the whole 8B preset in FP8: tokens/s and peak memory
  python -m bench --gpu-report DIR         all about a GPU in 9 minutes (--gpu-report DIR --help)
  python -m bench --publish                README.md and docs/results.md from bench/results

exit status: 0; 1 a kernel's result was wrong; 2 bad arguments; 3 slower than in --compare's run;
130 interrupted (what was measured is kept)
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what is run")
    names = {"action": "extend", "type": _names, "metavar": "NAME"}
    what.add_argument("--op", help="only these ops (repeatable, or joined by commas)", **names)
    what.add_argument("--model", choices=MODELS, default="8b", help="whose shapes")
    what.add_argument("--tp", type=int, default=1, metavar="N", help="one rank's part of N")
    what.add_argument("--dtype", choices=DTYPES, default="bf16")
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    what.add_argument("--threads", type=int, metavar="N", help="default: torch's choice")
    level = what.add_mutually_exclusive_group()
    for name, text in (("quick", "a rough answer in a minute"), ("full", "every size")):
        level.add_argument(
            f"--{name}",
            dest="level",
            action="store_const",
            const=name,
            help=text,
            default="default",
        )
    what.add_argument("--list", action="store_true", help="print the cases and leave")
    what.add_argument("--scaling", action="store_true", help="only the cost's growth with length")
    what.add_argument("--whole", action="store_true", help="only the whole 8B preset, in FP8")

    who = p.add_argument_group("who is run")
    who.add_argument("--backend", choices=BACKENDS, help="ours; default: see lf.backends()")
    who.add_argument("--baseline", help="only these of PyTorch's own; 'none'", **names)
    who.add_argument(
        "--peers", help=f"only these of {', '.join(peers.PEERS)}; 'none'; default: all", **names
    )
    who.add_argument(
        "--kernel", action="append", type=_kernel, default=[], metavar="OP=MODULE:FUNCTION"
    )

    out = p.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, default=Path("bench/out/bench.json"), metavar="FILE")
    out.add_argument("--csv", type=Path, metavar="FILE", help="a row per case and implementation")
    out.add_argument("--plot", type=Path, metavar="FILE", help="default: beside the JSON file")
    out.add_argument("--no-plot", action="store_true")
    out.add_argument("--compare", type=Path, metavar="OLD.json")
    out.add_argument(
        "--publish", action="store_true", help="write the pages cut from bench/results"
    )
    return p


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _kernel(text: str) -> tuple[str, str, Callable[..., object]]:
    """OP=MODULE:FUNCTION -> the op, the function's name, the function."""
    op, _, where = text.partition("=")
    module, _, function = where.partition(":")
    if not (op and module and function):
        raise argparse.ArgumentTypeError(f"got {text!r}, want OP=MODULE:FUNCTION")
    if op not in cases.OPS:
        raise argparse.ArgumentTypeError(f"got op {op!r}, want one of {', '.join(cases.OPS)}")
    if function in ("ours", "limit", *cases.BASELINES):
        raise argparse.ArgumentTypeError(
            f"got a function called {function!r}: a column's name here"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return op, function, found


class Session:
    """One run: what was asked for, and what was found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.spec = cases.spec(args.model, DTYPES[args.dtype], self.device, args.level, args.tp)
        named = args.peers and [name for name in args.peers if name != "none"]
        self.peers, absent = peers.wanted(named, args.device)
        self.plans = cases.plan(self.spec, args.op)
        options = ("model", "tp", "dtype", "backend", "device", "level", "baseline")
        self.results: dict[str, Any] = {
            "schema": compare.SCHEMA,
            "environment": report.environment(self.device),
            "options": {name: getattr(args, name) for name in options},
            "peers": {peer.name: peer.version() for peer in self.peers},
            "complete": False,
            "skipped": absent,
            "ops": [],
        }

    def write(self) -> None:
        report.write(self.args.json, self.results)

    def keep_scaling(self, found: dict[str, Any]) -> None:
        self.results["scaling"] = found
        self.write()

    def skip(self, what: str, why: str) -> None:
        self.results["skipped"][what] = why

    def run_ops(self) -> None:
        print(report.HEADER, flush=True)
        for i, plan in enumerate(self.plans):
            with _status(f"{i + 1} of {len(self.plans)}: {plan.name}"):
                row = self.measure(plan)
            if row is None:
                print(f"{plan.name}: skipped, {self.results['skipped'][plan.name]}", flush=True)
                continue
            self.results["ops"].append(row)
            print(report.line(row), flush=True)
            self.write()
        kept.fresh()
        print(report.LEGEND)

    def measure(self, plan: Plan) -> dict[str, Any] | None:
        """None where the case does not fit into memory."""
        if plan.memory > free_memory(self.device):
            self.skip(plan.name, f"needs about {plan.memory / 2**30:.3g} GiB of memory")
            return None
        case = cases.on(self.spec, plan.make())
        found = self._implementations(case)
        yardstick = {n: r for n, r in _yardstick(case).items() if n not in found.skipped}
        errors = _errors(case, {**yardstick, **found.runs})
        runs = {**found.runs, "limit": case.limit}
        for name, why in found.skipped.items():
            self.skip(f"{plan.name}: {name}", why)
        return report.row(case, self._times(runs, case), errors)

    def _implementations(self, case: Case) -> Baselines:
        """Ours, and whoever else can be had for this case."""
        found = Baselines(case.ours)
        for name, run in case.baselines.items():
            if self._wants(name):
                found.offer(name, run)
        for op, name, function in self.args.kernel:
            if op == case.op:
                _add(found, name, {name: case.user(function)}.copy)
        for peer in self.peers:
            _add(found, peer.name, functools.partial(peer.ops, case.op, case.inputs))
        return found

    def _wants(self, baseline: str) -> bool:
        if self.args.baseline is not None:
            return baseline in self.args.baseline
        return baseline != "torch.compile" or self.args.level != "quick"

    def _times(self, runs: dict[str, Run], case: Case) -> dict[str, Timing]:
        budget = BUDGETS[self.args.level]
        if self.device.type == "cpu":
            return measure(runs, budget)
        return gpu_timing.measure(runs, budget / 4, copies=8, uncapturable=case.uncapturable)

    def again(self, name: str) -> dict[str, Any] | None:
        """A case measured anew, on other buffers."""
        kept.fresh()
        for plan in self.plans:
            if plan.name == name:
                return self.measure(plan)
        found = self.end_to_end() if "end_to_end" in self.results else None
        rows = {f"{r['op']} {r['shape']}": r for r in (found or {"rows": ()})["rows"]}
        return rows.get(name)

    def wants_end_to_end(self) -> bool:
        """The forward pass comes along where it is what is asked for: everything, at 8B."""
        a = self.args
        return a.level != "quick" and not a.op and (a.model, a.tp, a.dtype) == ("8b", 1, "bf16")

    def keep_end_to_end(self, found: dict[str, Any]) -> None:
        self.results["end_to_end"] = found
        self.write()

    def end_to_end(
        self, keep: Callable[[dict[str, Any]], None] = lambda found: None
    ) -> dict[str, Any] | None:
        if importlib.util.find_spec("transformers") is None:
            self.skip("end to end", "transformers is not installed (extra: bench)")
            return None
        say = _say
        if self.device.type == "cpu":
            return end_to_end.run(self.args.level, say, self.peers, self._wants, self.skip, keep)
        return gpu_model.run(self.device, 4 * BUDGETS[self.args.level], say)

    def compare(self, old: dict[str, Any]) -> int:
        changes = compare.compare(old, self.results, self.again, _say)
        self.results["compared"] = {
            "with": old["environment"].get("commit"),
            "changes": [
                {"name": c.name, "log": c.slowdown, "noise": c.noise, "verdict": c.verdict}
                for c in changes
            ],
        }
        print(compare.summary(changes, old, self.results))
        return SLOWER if any(c.verdict == "slower" for c in changes) else RAN


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


def _say(text: str) -> None:
    print(text, flush=True)


def _yardstick(case: Case) -> dict[str, Run]:
    """Whose error ours is held against, whether or not it is timed: the eager twin where it fits,
    else PyTorch's own."""
    name = "eager" if "eager" in case.baselines else next(iter(case.baselines))
    return {name: case.baselines[name]}


def _errors(case: Case, runs: dict[str, Run]) -> dict[str, float]:
    """Of each implementation, before anything is timed. One whose result has another form than
    the op's has none."""
    exact = case.exact()
    found = {}
    for name, run in runs.items():
        result = run(0)
        try:
            found[name] = relative_error(case.value(result), exact)
        except (TypeError, RuntimeError, IndexError, AttributeError):
            if name == "ours":
                raise
    return found


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


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.publish:
        return publish.main()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    try:
        try:
            _check(args)
            torch.set_num_threads(args.threads or before)
            session = Session(args)
            old = compare.load(args.compare) if args.compare else None
            if old is not None:
                compare.check(old, session.results)
        except ValueError as error:
            print(f"bench: {error}", file=sys.stderr)
            return USAGE
        if args.list:
            print("\n".join(f"{plan.op:<24}{plan.shape}" for plan in session.plans))
            return RAN
        with lf.use_backend(args.backend) if args.backend else contextlib.nullcontext():
            return _run(session, old)
    finally:
        torch.set_num_threads(before)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError naming the argument that cannot be."""
    unknown = [op for op in args.op or () if op not in cases.OPS]
    if unknown:
        raise ValueError(f"--op: got {', '.join(unknown)}, want any of {', '.join(cases.OPS)}")
    if args.baseline:
        unknown = [name for name in args.baseline if name not in (*cases.BASELINES, "none")]
        if unknown:
            names = ", ".join(cases.BASELINES)
            raise ValueError(f"--baseline: got {', '.join(unknown)}, want any of {names}, or none")
    for name in ("json", "csv", "plot"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise ValueError(f"--{name}: got a folder, {path}, want a file")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: got {args.threads}, want at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, and torch sees no GPU")
    if args.backend:
        try:
            with lf.use_backend(args.backend):
                pass
        except NotImplementedError as error:
            raise ValueError(f"--backend: {error}") from None


def _run(session: Session, old: dict[str, Any] | None) -> int:
    torch.manual_seed(0)
    args, results = session.args, session.results
    print(report.heading(results))
    status = RAN
    try:
        if args.whole:
            results["whole"] = end_to_end.whole(_say, device=session.device)
        elif args.scaling:
            scaling.run(session.device, args.level, _say, session.keep_scaling)
        else:
            with torch.inference_mode():
                session.run_ops()
                if session.wants_end_to_end():
                    found = session.end_to_end(session.keep_end_to_end)
                    if found:
                        results["end_to_end"] = found
                        _say(end_to_end.table(found))
                if old is not None:
                    session.write()
                    status = session.compare(old)
        results["complete"] = True
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        status = INTERRUPTED
    session.write()
    written = [args.json]
    if results["ops"]:
        print(report.summary(results))
        if args.csv:
            csv_file.write(args.csv, results)
            written.append(args.csv)
    if not args.no_plot:
        try:
            written += plot.all_of(results, args.plot or args.json)
        except ImportError as error:
            print(f"no plot: {error}; pip install 'llama_fast[bench]'", file=sys.stderr)
    print("written: " + "  ".join(str(path) for path in written))
    wrong = any(r["wrong"] for r in results["ops"]) or results.get("scaling", {}).get("wrong")
    return WRONG if wrong and status == RAN else status
