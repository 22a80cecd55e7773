"""Run the fuzzers in turn, each in a process of its own, which a crash ends."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import MODULES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all modules together")
    parser.add_argument("--seed", type=int, default=None, help="default: a random one")
    parser.add_argument("--count", type=int, default=None, help="of cases of each module")
    parser.add_argument("--only", metavar="MODULE", action="append", help=", ".join(MODULES))
    parser.add_argument("--here", action="store_true", help="in this process, for a debugger")
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(3), "big") if arguments.seed is None else arguments.seed
    names = arguments.only or [m for m in MODULES if Path(__file__).with_name(f"{m}.py").exists()]
    seconds = arguments.seconds / len(names)
    if arguments.here:
        for name in names:
            module = importlib.import_module(name if "." in name else f"{__package__}.{name}")
            start = time.monotonic()
            calls = module.run(seconds, seed, arguments.count)
            print(f"{name}: {calls} calls in {time.monotonic() - start:.0f} s, clean", flush=True)
        return 0
    status = 0
    for name in names:
        print(f"{name}: seed {seed}", flush=True)
        options = ["--seconds", str(seconds), "--seed", str(seed), "--only", name, "--here"]
        if arguments.count is not None:
            options += ["--count", str(arguments.count)]
        with tempfile.NamedTemporaryFile() as note:
            code = subprocess.run(
                [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", *options],
                env={**os.environ, "LLAMA_FAST_FUZZ_CASE": note.name},
            ).returncode
            if code:
                status = 1
                last = Path(note.name).read_text()
                print(f"{name}: exit status {code}; the last case, {last}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
