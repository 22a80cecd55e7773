"""Run the benchmark suite, or with --gpu-report a GPU's build, tests and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Run a command line and return its exit code (see arguments.EPILOG). prog: the command's name
    in the help text."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(argument.split("=")[0] == "--gpu-report" for argument in argv):
        from .gpu import report  # builds llama_fast, so nothing before it may import that

        return report.main(argv, prog)
    from . import suite

    return suite.main(argv, prog)


if __name__ == "__main__":
    sys.exit(main())
