"""Tests that the examples in README and docs run as they stand."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import _cpu

from .support.checkpoints import hf_model, save
from .support.llama3 import byte_tokenizer

ROOT = Path(__file__).parent.parent


def python(file: str) -> str:
    """Return the first Python example of a file's section on its use."""
    text = (ROOT / file).read_text()
    found = re.search(r"## (?:Use|A kernel file alone)\n.*?```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_readme_runs_as_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run it on a tiny checkpoint in the folder that `hf download` makes."""
    (folder,) = re.findall(r"--local-dir (\S+)", (ROOT / "README.md").read_text())
    save(hf_model(vocab_size=1280), tmp_path / folder)
    byte_tokenizer().save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(python("README.md"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Llama(3 layers, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_a_kernel_file_alone() -> None:
    code = python("docs/kernels.md").replace('"cuda"', '"cpu"').replace("512, 4096", "5, 96")
    found: dict[str, Any] = {}
    exec(compile(code, "kernels.md", "exec"), found)
    x, total, q, scale = (found[name] for name in ("x", "total", "q", "scale"))
    assert torch.equal(total, x + found["residual"])
    want = torch.nn.functional.rms_norm(x.float(), (96,), eps=1e-5)
    assert ((q.float() * scale - want).abs() <= 2**-3 * want.abs() + scale).all()


@pytest.mark.parametrize("family", _cpu.families)
def test_the_launchers_signatures(family: str) -> None:
    (row,) = re.findall(
        rf"^\| `{family}` \| `(.*)` \|$", (ROOT / "docs/kernels.md").read_text(), re.M
    )
    launcher = getattr(import_module(f"llama_fast.kernels.{family}"), family)
    names = [name for name in inspect.signature(launcher).parameters if name != "tma"]
    assert [part.split("=")[0] for part in row.split(", ")] == names


def test_a_kernel_without_a_gpu_says_so(run_python: Callable[..., Any]) -> None:
    code = """
import torch
from llama_fast.kernels.rms_norm import rms_norm
x = torch.randn(2, 8)
rms_norm(x, x, x[0], 1e-5)"""
    done = run_python(code, check=False, TRITON_INTERPRET="0")
    wanted = "ValueError: got a tensor on cpu, want one on a GPU: Triton's kernels run there"
    assert wanted in done.stderr.splitlines()[-1]
