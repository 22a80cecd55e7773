"""Check the compilers' code for the kernels: python -m bench.static cuda | triton."""

from __future__ import annotations

import sys


def main(argv: list[str]) -> int:
    match argv[:1]:
        case ["cuda"]:
            from . import cuda

            return cuda.main(argv[1:])
        case ["triton"]:
            from . import triton

            return triton.main(argv[1:])
    print(f"{__doc__}\nusage: python -m bench.static cuda|triton [--help]", file=sys.stderr)
    return 0 if argv[:1] in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
