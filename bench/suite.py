"""python -m bench: every op at Llama shapes, then the forward pass, against eager PyTorch, on the
device at hand."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import cases, end_to_end, gpu_model, gpu_timing, plot, report
from .timing import Run, Timing, measure

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPILOG = """examples:
  python -m bench                          every op, then prefill and decode (under 5 minutes)
  python -m bench --op attention --op linear
  python -m bench --quick                  fewer rounds, no torch.compile, no end to end
  python -m bench --whole                  the whole 8B preset in FP8: tokens/s and peak memory
  python -m bench --gpu-report DIR         all about a GPU in 9 minutes (--gpu-report DIR --help)
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--op", action="append", metavar="NAME", help="only this op (repeatable)")
    p.add_argument("--list", action="store_true", help="print the ops and leave")
    p.add_argument("--model", choices=cases.SHAPES, default="8b", help="whose shapes")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--threads", type=int, metavar="N", help="default: torch's choice")
    p.add_argument("--quick", action="store_true", help="a rough answer in under a minute")
    p.add_argument("--full", action="store_true", help="four times the rounds")
    p.add_argument("--whole", action="store_true", help="only the whole 8B preset, in FP8")
    p.add_argument("--json", type=Path, default=Path("bench/out/bench.json"), metavar="FILE")
    p.add_argument("--plot", type=Path, metavar="FILE", help="default: beside the JSON file")
    p.add_argument("--no-plot", action="store_true")
    p.add_argument("--readme", type=Path, metavar="FILE", help="put the table of --json into FILE")
    return p


def run_ops(args: argparse.Namespace, results: dict[str, Any]) -> None:
    wanted = set(args.op or cases.OPS)
    budget = 0.3 if args.quick else 8.0 if args.full else 2.0
    device = torch.device(args.device)
    print(report.HEADER, flush=True)
    for name in cases.GROUPS:
        if not wanted & {op for op, g in cases.OPS.items() if g == name}:
            continue
        compiled = not args.quick
        for case in cases.on(device, name, args.model, DTYPES[args.dtype], compiled):
            if case.op not in wanted:
                continue
            runs = {"ours": case.ours, **case.baselines, "limit": case.limit}
            results["ops"].append(report.row(case, _times(runs, budget, case), case.error()))
            print(report.line(results["ops"][-1]), flush=True)
            report.write(args.json, results)


def _times(runs: dict[str, Run], budget: float, case: cases.Case) -> dict[str, Timing]:
    if case.device.type == "cpu":
        return measure(runs, budget)
    return gpu_timing.measure(runs, budget / 4, copies=8, uncapturable=case.uncapturable)


def run_end_to_end(args: argparse.Namespace, results: dict[str, Any]) -> None:
    if importlib.util.find_spec("transformers") is None:
        print("end to end: skipped, transformers is not installed (extra: bench)")
        return
    budget = 12.0 if args.full else 5.0
    if args.device == "cpu":
        found = end_to_end.run(budget, lambda text: print(text, flush=True))
    else:
        found = gpu_model.run(torch.device(args.device), budget, lambda t: print(t, flush=True))
    results["end_to_end"] = found
    print(found["what"])
    for r in found["rows"]:
        print(end_to_end.line(r))
    errors = ", ".join(f"{name} {value:.1e}" for name, value in found["logits"].items())
    print(f"largest logit error, of the largest logit, against fp32: {errors}")


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.list:
        print("\n".join(cases.OPS))
        return 0
    if args.readme:
        report.insert(args.readme, report.markdown(json.loads(args.json.read_text())))
        return 0
    unknown = [op for op in args.op or () if op not in cases.OPS]
    if unknown:
        return _refuse(f"--op: got {', '.join(unknown)}, want any of {', '.join(cases.OPS)}")
    if args.threads is not None and args.threads < 1:
        return _refuse(f"--threads: got {args.threads}, want at least 1")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device: got cuda, and torch sees no GPU")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        return _measure(args)
    finally:
        torch.set_num_threads(before)


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


def _measure(args: argparse.Namespace) -> int:
    """0; 1 when a kernel's result was wrong; 130 when interrupted."""
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "environment": report.environment(torch.device(args.device)),
        "complete": False,
        "ops": [],
    }
    print("  ".join(f"{k} {v}" for k, v in results["environment"].items() if v is not None))
    try:
        if args.whole:
            results["whole"] = end_to_end.whole(print, device=torch.device(args.device))
        else:
            with torch.inference_mode():
                run_ops(args, results)
            if not args.quick and not args.op and args.model == "8b" and args.dtype == "bf16":
                run_end_to_end(args, results)
        results["complete"] = True
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
    report.write(args.json, results)
    if results["ops"]:
        print(report.summary(results))
    written = [args.json]
    if results["ops"] and not args.no_plot:
        try:
            written += plot.speedups(results, args.plot or args.json)
        except ImportError as error:
            print(f"no plot: {error}; pip install 'llama_fast[bench]'", file=sys.stderr)
    print("written: " + "  ".join(str(path) for path in written))
    if not results["complete"]:
        return 130
    return 1 if any(r["wrong"] for r in results["ops"]) else 0
