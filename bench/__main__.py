"""python -m bench: the suite; with --gpu-report everything there is to know about a GPU."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.split("=")[0] == "--gpu-report" for argument in argv):
        from . import gpu_report  # builds llama_fast: nothing before it may import that

        return gpu_report.main(argv)
    from . import suite

    return suite.main(argv)


if __name__ == "__main__":
    sys.exit(main())
