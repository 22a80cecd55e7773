"""What happens to an accelerated model afterwards: weights replaced, cast, trained in part."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llama_fast as lf

from .conftest import close, pair, prompt, tiny


def other() -> Any:
    torch.manual_seed(7)
    model = tiny()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_layers_take_any_strides(quantize: str | None) -> None:
    layer = lf.accelerate(tiny(), quantize).model.layers[0]
    x = torch.randn(2, layer.self_attn.q_proj.in_features, 3).transpose(1, 2)
    with torch.no_grad():
        for module in (layer.self_attn.q_proj, layer.mlp):
            assert torch.equal(module(x), module(x.contiguous()))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(prompt()).logits
    return out


@pytest.mark.parametrize("case", ["training", "assign", "data"])
def test_training_keeps_weights_that_were_replaced(case: str) -> None:
    """The first recorded pass returns weights to the plain order: the new ones."""
    _, fast = pair()
    new = other()
    if case == "data":
        for p, q in zip(fast.parameters(), new.parameters(), strict=True):
            p.data = q.data.clone()
    else:
        fast.train(case == "training")
        fast.load_state_dict(new.state_dict(), assign=case == "assign")
    close(fast(prompt()).logits.detach(), logits(new))
    fast.eval()
    close(logits(fast), logits(new))


def test_a_loaded_fp8_state_brings_its_scales() -> None:
    fast, new = lf.accelerate(tiny(), "fp8"), other()
    for p in new.parameters():
        p.data *= 3
    lf.accelerate(new, "fp8")
    fast.load_state_dict(new.state_dict())
    assert torch.equal(logits(fast), logits(new))


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_biases_alone_are_trained(quantize: str | None) -> None:
    _, fast = pair("qwen2")
    fast.requires_grad_(False)
    lf.accelerate(fast, quantize)
    biases = [p.requires_grad_() for n, p in fast.named_parameters() if n.endswith("bias")]
    fast(prompt()).logits.square().sum().backward()
    assert biases and all(b.grad is not None for b in biases)


def test_a_replaced_bias_counts() -> None:
    plain, fast = pair("qwen2")
    for model in (plain, fast):
        bias = model.model.layers[0].self_attn.q_proj.bias
        bias.data = torch.full_like(bias, 0.5)
    close(logits(fast), logits(plain))


def test_fp64_runs_in_transformers() -> None:
    plain, fast = pair()
    close(logits(fast.double()), logits(plain.double()))


def test_known_parts_of_an_unknown_layer(recwarn: Any) -> None:
    class Layer(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
        pass

    plain = tiny()
    for layer in plain.model.layers:
        layer.__class__ = Layer
    fast = lf.accelerate(copy.deepcopy(plain))
    assert not [w for w in recwarn if "nothing to accelerate" in str(w.message)]
    close(logits(fast), logits(plain))


def test_restore_ties_the_head_and_keeps_requires_grad(tmp_path: Path) -> None:
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model.requires_grad_(False)
    lf.restore(lf.accelerate(model, "fp8_all"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.requires_grad for p in model.parameters())


def test_rotations_rebuilt_of_their_elements() -> None:
    """FSDP applies a function to each tensor in a layer's arguments, and calls the tuple's type."""
    plain, fast = pair()
    for layer in fast.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (
                args,
                {k: type(v)(iter(v)) if isinstance(v, tuple) else v for k, v in kwargs.items()},
            ),
            with_kwargs=True,
        )
    close(logits(fast), logits(plain))
