"""Run pytest on the sanitized extension; `make sanitize` runs this with its folder in PYTHONPATH.

It loads and prints the extension before pytest starts. A path that pytest adds to sys.path then
cannot replace it by the ordinary one unnoticed.
"""

import os
import sys
from pathlib import Path

import pytest

from llama_fast import _cpu

root = Path(__file__).resolve().parents[1]
loaded = Path(_cpu.__file__).resolve()
if not loaded.is_relative_to(Path(os.environ["PYTHONPATH"]).resolve()):
    sys.exit(f"error: {loaded} was loaded, which is not in PYTHONPATH")
if b"__asan_init" not in loaded.read_bytes():
    sys.exit(f"error: {loaded} is not instrumented")
print(f"sanitized extension: {loaded}", flush=True)
sys.exit(pytest.main(["-c", str(root / "pyproject.toml"), f"--rootdir={root}", *sys.argv[1:]]))
