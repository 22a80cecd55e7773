"""kernel_mapping(): our layers through Hugging Face's `kernels`, without the hub."""

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

import llama_fast as lf
from llama_fast.hf import kernelize
from llama_fast.nn import SwiGLU

from .conftest import close, prompt, tiny

kernels = pytest.importorskip("kernels")
if not hasattr(kernels, "kernelize"):
    pytest.skip("the package kernels is not installed", allow_module_level=True)
if Version(importlib.metadata.version("kernels")) < Version("0.11"):
    pytest.skip("kernels before 0.11 knows no CPU", allow_module_level=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record which of our layers' ops run."""
    seen: list[str] = []
    for name in ("rms_norm", "silu_and_mul", "apply_rope"):
        op = getattr(kernelize, name)

        def run(*args: Any, name: str = name, op: Any = op) -> Any:
            seen.append(name)
            return op(*args)

        monkeypatch.setattr(kernelize, name, run)
    return seen


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
def test_a_model_of_transformers(
    calls: list[str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers names its layers only beside one version of `kernels`; here it is any."""
    plain = tiny()
    norm = type(plain.model.norm)
    monkeypatch.setattr(norm, "kernel_layer_name", "RMSNorm", raising=False)
    model = copy.deepcopy(plain)
    with lf.hf.kernel_mapping():
        kernels.kernelize(model, mode=kernels.Mode[mode], device="cpu", use_fallback=True)
    with torch.no_grad():
        close(model(prompt()).logits, plain(prompt()).logits)
        assert calls.count("rms_norm") == 7
        calls.clear()
        plain(prompt())
    assert calls == []  # the mapping ends with the block, and others are untouched


def test_a_layer_named_mlp(calls: list[str]) -> None:
    class Feed(SwiGLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    layer = kernels.use_kernel_forward_from_hub("MLP")(Feed)(64, 128)
    x = torch.randn(3, 64)
    want = layer(x)
    with lf.hf.kernel_mapping():
        kernels.kernelize(layer, mode=kernels.Mode.TRAINING, device="cpu")
    got = layer(x)
    close(got, want, 1e-5)
    assert calls == ["silu_and_mul"]
    got.sum().backward()
    assert layer.gate_proj.weight.grad is not None


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rotary(unsqueeze_dim: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny()
    cos, sin = model.model.rotary_emb(torch.zeros(2, 7, 128), torch.arange(3, 10)[None])
    q, k = torch.randn(2, 8, 7, 16), torch.randn(2, 4, 7, 16)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    want = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    got = kernelize.RotaryPosEmb()(q, k, cos, sin, unsqueeze_dim)
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-6)
