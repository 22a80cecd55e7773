"""Run every script of examples/ on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from .support.checkpoints import hf_model, save
from .support.llama3 import byte_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = save(hf_model(), tmp_path_factory.mktemp("examples"))
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


# script -> its arguments (DIR: the checkpoint), and the start of its output
CASES = {
    "accelerate_transformers.py": (["DIR", "--max-new-tokens", "6"], "transformers: "),
    "compile_static_cache.py": (
        ["DIR", "--max-new-tokens", "6", "--backend", "aot_eager"],
        "The sea is",
    ),
    "fp8_transformers.py": (["DIR", "OUT"], "0.8 MiB -> "),
    "generate_text.py": (["DIR", "Why?", "--max-new-tokens", "6"], ""),
    "speculate.py": (
        ["DIR", "--max-new-tokens", "6", "--rounds", "1"],
        "6 tokens; a second: plain ",
    ),
    "custom_loop.py": (["DIR", "Once upon", "The sea", "--new-tokens", "6"], "Once upon"),
    "drop_in_kernels.py": (["--tokens", "24", "--hidden", "256"], "relative difference"),
    "lora_on_fp8.py": (["DIR", "--text", "It hums.", "--steps", "6", "--output", "OUT"], "step 0"),
    "fp8_linear.py": (["--features", "256", "512"], "0.2 MiB -> 0.1 MiB\nrelative difference 0.0"),
}


def test_every_script_has_a_case() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(CASES)


@pytest.mark.parametrize("script", CASES)
def test_runs(
    script: str,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    arguments, begins = CASES[script]
    argv = [{"DIR": checkpoint, "OUT": str(tmp_path)}.get(a, a) for a in arguments]
    monkeypatch.setattr(sys, "argv", [script, *argv])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    out = capsys.readouterr().out
    assert out.startswith(begins) and out.endswith("\n")
