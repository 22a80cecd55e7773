"""Tests of LoRA adapters (peft) on FP8 weights: gradients, the frozen base, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_fast import reference
from llama_fast.hf import LlamaFastFP8Config
from llama_fast.nn import FP8Linear

from ..support.checkpoints import hf_logits, hf_model, relative_error, save, tensors

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.arange(3, 41).view(2, 19)
# fp32: of the largest gradient of a tensor. Sums of another order in 3 layers, as LOGITS elsewhere.
GRADIENTS = 5e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(hf_model(), tmp_path_factory.mktemp("plain"))


def load(folder: Path, **options: Any) -> Any:
    config = LlamaFastFP8Config(**options)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )


def dequantized(model: Any, folder: Path) -> Any:
    held = tensors(folder)
    for name, module in model.named_modules():
        if isinstance(module, FP8Linear):
            held[f"{name}.weight"] = module.dequantize()
    plain = hf_model()
    plain.load_state_dict(held)
    return plain


def adapted(model: Any, mergeable: bool = False, **options: Any) -> Any:
    """Return the model with random adapters, the same for each model."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    if mergeable:
        from llama_fast.hf.lora import mergeable as registered

        config = registered(config)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("granularity", ["row", "block"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_are_those_of_the_dequantized_model(
    folder: Path, granularity: str, checkpointing: bool
) -> None:
    base = load(folder, granularity=granularity)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    plain = dequantized(base, folder)
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    model = adapted(base)
    got, expected = gradients(model), gradients(adapted(plain))
    assert got.keys() == expected.keys() and len(got) == 42 and all("lora" in n for n in got)
    for name, grad in got.items():
        assert grad.dtype == torch.float32, name
        assert relative_error(grad, expected[name]) < GRADIENTS, name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    for name, t in before.items():
        assert torch.equal(t.view(torch.uint8), after[name].view(torch.uint8)), name


def test_an_adapter_is_not_rounded_to_fp8(folder: Path) -> None:
    """peft makes adapters in the weight's dtype before it widens them to fp32."""
    for p in adapted(load(folder)).parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32
            assert not torch.equal(p, p.to(torch.float8_e4m3fn).float())


def test_merging_rounds_again_and_unmerging_is_exact(folder: Path) -> None:
    model = adapted(load(folder), mergeable=True).eval()
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    weight, scale = layer.base_layer.weight, layer.base_layer.weight_scale
    meant = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    logits = hf_logits(model, TOKENS)
    model.merge_adapter()
    expected = reference.dequantize_fp8(*reference.quantize_fp8(meant))
    assert torch.equal(layer.base_layer.dequantize(), expected)
    merged = hf_logits(model, TOKENS)
    assert not torch.equal(merged, logits)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(layer.base_layer.weight_scale, scale)
    assert torch.equal(hf_logits(model, TOKENS), logits)
    plain = model.merge_and_unload()
    assert isinstance(plain.model.layers[1].mlp.up_proj, FP8Linear)
    assert torch.equal(hf_logits(plain, TOKENS), merged)


def test_variants_are_errors(folder: Path) -> None:
    """DoRA needs the weight's norm when it is made; a bias of the adapter has no place to go."""
    with pytest.raises(RuntimeError, match="Float8"):
        adapted(load(folder), use_dora=True)
    model = adapted(load(folder), mergeable=True, lora_bias=True)
    with pytest.raises(NotImplementedError, match="only plain LoRA without lora_bias"):
        model.merge_adapter()


def test_merging_without_mergeable_changes_nothing(folder: Path) -> None:
    model = adapted(load(folder))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.view(torch.uint8).clone()
    with pytest.raises(RuntimeError):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight.view(torch.uint8), before)
