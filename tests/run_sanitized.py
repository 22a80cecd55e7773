"""pytest on the sanitized extension: `make sanitize` runs this from the folder that holds it.

The extension is loaded and shown before pytest starts, so no path that pytest adds to sys.path can
put the ordinary one in its place unseen.
"""

import sys
from pathlib import Path

sys.path[0] = ""  # the working folder's llama_fast, not one beside this script

import pytest

import llama_fast
from llama_fast import _cpu

loaded = Path(_cpu.__file__).resolve()
if not loaded.is_relative_to(Path.cwd()):
    sys.exit(f"error: {loaded} was loaded; it is not under {Path.cwd()}")
if b"__asan_init" not in loaded.read_bytes():
    sys.exit(f"error: {loaded} is not instrumented")
print(f"sanitized extension: {loaded}\npackage: {llama_fast.__path__[0]}", flush=True)

root = Path(__file__).resolve().parents[1]
sys.exit(pytest.main([f"--rootdir={root}", f"--config-file={root / 'pyproject.toml'}", *sys.argv[1:]]))
