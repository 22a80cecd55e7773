"""What the GPU report's figures stand on, without a GPU: baselines, predictions, the read probe,
the machine's description, the layers that fit."""

from __future__ import annotations

import argparse
import functools
import operator
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llama_fast import reference
from llama_fast.bench import baselines, case, gpu_model, read_probe, report

from .test_gpu_build_and_test import tool

pytestmark = pytest.mark.usefixtures("one_thread")


def test_grouped_heads_are_repeated_for_who_knows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention

    def knows_no_groups(*args: Any, enable_gqa: bool, **options: Any) -> torch.Tensor:
        if enable_gqa:
            raise RuntimeError("No available kernel. Aborting execution.")
        return right(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", knows_no_groups)
    q, kv = torch.randn(1, 8, 4, 16), torch.randn(2, 1, 8, 2, 16)
    to = baselines.Baselines(lambda i: None)
    baselines.offer_sdpa(to, lambda _: (q, *kv.unbind()), True)
    out = to.runs["SDPA flash, K/V repeated"](0)
    torch.testing.assert_close(out.transpose(1, 2), reference.attention(q, *kv.unbind()))
    assert to.skipped["SDPA flash"].startswith("No available kernel")


def test_compiling_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    compiler = baselines.Compiler(1e-9)
    for skipped in (False, True):
        to = baselines.Baselines(lambda i: None)
        compiler.offer(to, torch.neg, lambda i: (torch.ones(2),))
        assert ("torch.compile" in to.skipped) == skipped != ("torch.compile" in to.runs)


@pytest.mark.parametrize("words", [1, 4095, 65536, 70001])
def test_read_probe_reads_every_word(words: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=device)
    sums = read_probe.checksums(data)
    assert functools.reduce(operator.xor, sums.tolist()) == functools.reduce(
        operator.xor, data.tolist()
    )
    assert sums.numel() == -(-words // (read_probe.BLOCK * read_probe.STEPS))


def test_gpu_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool(tmp_path, "nvidia-smi", "echo '580.65, 1980, 1980, 3201, 700.00, 121.4, 31, Disabled'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda *_: argparse.Namespace(total_memory=141 << 30, L2_cache_size=50 << 20),
    )
    found = report.environment(torch.device("cuda"))
    assert found["sm"] == "sm_90" and found["driver"] == "580.65" and found["sm_mhz"] == "1980"
    assert found["gpu_memory_gib"] == 141.0 and found["triton"]
    assert "driver" not in report.environment()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert report.gpu_state() == {}
    assert case.cache_bytes(torch.device("cuda")) == 200 << 20


def test_as_many_layers_as_fit() -> None:
    config = gpu_model.lf.LlamaConfig.llama_3_1_8b()
    layers = [gpu_model.fitting(config, n << 30).num_hidden_layers for n in (1, 20, 68, 130)]
    assert layers[0] == 1 < layers[1] < layers[2] == layers[3] == 32
