"""Tests of norm and SwiGLU that quantize for the model's next FP8 GEMM: when, and their bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import llama_fast as lf
from llama_fast import Llama

from ..support.generation import CONFIG

pytestmark = pytest.mark.usefixtures("one_thread")


def unpacked(model: Llama) -> Llama:
    """Return the same weights as [N, K], as on a GPU."""

    def plain(linear: Any) -> Any:
        return dataclasses.replace(linear, weight=lf.reference.unpack_weight(linear.weight))

    layers = [
        dataclasses.replace(
            layer,
            **{name: plain(getattr(layer, name)) for name in ("qkv", "output", "gate_up", "down")},
        )
        for layer in model.weights.layers
    ]
    weights = dataclasses.replace(model.weights, layers=layers, head=plain(model.weights.head))
    return Llama(model.config, weights)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("quantize", ["fp8", "fp8_ffn"])
def test_fused_quantization_changes_no_bit(
    quantize: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare norm and SwiGLU that quantize with the separate ops that they replace, at an
    activation bound low enough to take effect."""
    from llama_fast.checkpoint import weights
    from llama_fast.ops import activation, linear, rms_norm
    from llama_fast.ops import quantize as quantizing

    monkeypatch.setattr(weights, "ACTIVATION_BOUND", 1.5)
    config = dataclasses.replace(CONFIG, num_hidden_layers=3)
    model = unpacked(Llama.from_config(config, quantize=quantize))
    tokens = torch.randint(320, (2, 9))
    called: list[str] = []
    for family, name in (
        (rms_norm, "rms_norm_fp8"),
        (activation, "silu_and_mul_fp8"),
        (linear, "fp8_gemm"),
        (quantizing, "quantize_fp8"),
    ):
        real = getattr(family, name)
        monkeypatch.setattr(
            family, name, lambda *a, _n=name, _f=real, **k: (called.append(_n), _f(*a, **k))[1]
        )
    with lf.use_backend(backend):
        plain = model(tokens)
        assert called == []
        real_linear = linear.fp8_linear
        forced = lambda *a, **k: real_linear(*a, **{"quantize_activation": True} | k)  # noqa: E731
        monkeypatch.setattr(linear, "fp8_linear", forced)
        expected = model(tokens)
        assert called == [] and not torch.equal(expected, plain)
        monkeypatch.setattr(linear, "prefers_fp8_activations", lambda weight: True)
        assert torch.equal(model(tokens), expected)
        norms, ffns = {"fp8": (6, 3), "fp8_ffn": (1, 1)}[quantize]
        assert called.count("rms_norm_fp8") == norms and called.count("silu_and_mul_fp8") == ffns
        assert called.count("fp8_gemm") == norms + ffns
        bounded = [
            dataclasses.replace(
                layer,
                gate_up=dataclasses.replace(layer.gate_up, scale_ub=None),
                down=dataclasses.replace(layer.down, scale_ub=None),
            )
            for layer in model.weights.layers
        ]
        unbounded = Llama(config, dataclasses.replace(model.weights, layers=bounded))
        assert torch.equal(unbounded(tokens), expected) == (quantize == "fp8")
        assert model(tokens[:, :0]).shape == (2, 0, 320)


def test_weights_in_blocks_are_left_to_fp8_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_fast.checkpoint.weights import Linear
    from llama_fast.ops import linear

    monkeypatch.setattr(linear, "prefers_fp8_activations", lambda weight: True)
    weight = torch.zeros(256, 256).to(torch.float8_e4m3fn)
    assert Linear(weight, torch.ones(256, 1)).wants_fp8 and Linear(weight, torch.ones(1)).wants_fp8
    assert not Linear(weight, torch.ones(2, 2)).wants_fp8
    assert not Linear(weight.view(4, 128, 64, 2), torch.ones(256, 1)).wants_fp8
    assert not Linear(torch.zeros(256, 256)).wants_fp8
