"""python -m bench: every op at Llama 3.1's shapes, then the forward pass, against eager PyTorch and
every peer that is installed, on the device at hand."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch

import llama_fast as lf

from . import arguments, compare, csv_file, model_rows, plot, publish, report, scaling, whole
from .memory import keep_freed
from .session import Session, say

RAN, WRONG, USAGE, SLOWER, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes


def main(argv: list[str] | None = None) -> int:
    args = arguments.parser(__doc__).parse_args(argv)
    if args.publish:
        return publish.main()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    try:
        try:
            arguments.check(args)
            # Peak memory is --scaling's and --whole's own business.
            if args.scaling or args.whole or not (args.allocator == "keep" and keep_freed()):
                args.allocator = "system"
            torch.set_num_threads(args.threads or before)
            session = Session(args)
            old = compare.load(args.compare) if args.compare else None
            if old is not None:
                compare.check(old, session.results)
        except ValueError as error:
            print(f"bench: {error}", file=sys.stderr)
            return USAGE
        if args.list:
            print("\n".join(f"{name:<24}{shape}" for name, shape in session.listed()))
            return RAN
        with lf.use_backend(args.backend) if args.backend else contextlib.nullcontext():
            return _run(session, old)
    finally:
        torch.set_num_threads(before)


def _run(session: Session, old: dict[str, Any] | None) -> int:
    torch.manual_seed(0)
    args, results = session.args, session.results
    print(report.heading(results))
    status = RAN
    try:
        if args.whole:
            results["whole"] = whole.run(say, device=session.device)
        elif args.scaling:
            scaling.run(session.device, args.level, say, session.keep_scaling)
        else:
            with torch.inference_mode():
                if session.plans:
                    session.run_ops()
                if session.wants_end_to_end():
                    found = session.end_to_end(session.keep_end_to_end)
                    if found:
                        results["end_to_end"] = found
                        say(model_rows.table(found))
                if old is not None:
                    session.write()
                    status = SLOWER if session.compare(old) else RAN
        results["complete"] = True
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        status = INTERRUPTED
    session.write()
    written = [args.json]
    if results["ops"] or "end_to_end" in results:
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
