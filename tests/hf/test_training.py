"""Gradients of an accelerated model, and what trains it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llama_fast as lf
from llama_fast.hf import linears

from .conftest import CLASSES, close, pair, prompt, tiny


def loss(model: Any, **inputs: Any) -> Tensor:
    out: Tensor = model(prompt(), labels=prompt(), **inputs).loss
    return out


def compare_gradients(plain: Any, fast: Any, **inputs: Any) -> None:
    for model in (plain, fast):
        model.zero_grad()
        loss(model, **inputs).backward()
    want = dict(plain.named_parameters())
    for name, p in fast.named_parameters():
        assert (p.grad is None) == (want[name].grad is None), name
        if p.grad is not None:
            assert p.grad.shape == p.shape == want[name].shape
            close(p.grad, want[name].grad, 1e-4)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("family", CLASSES)
def test_gradients(family: str, train: bool) -> None:
    """In evaluation mode too, where weights were packed."""
    plain, fast = pair(family)
    plain.train(train), fast.train(train)
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    for inputs in ({}, {"attention_mask": mask}):
        compare_gradients(plain, fast, **inputs)


def test_says_that_weights_return_to_the_plain_order() -> None:
    linears._say_once.cache_clear()
    _, fast = pair()
    with pytest.warns(UserWarning, match="infer under torch.no_grad"):
        fast(prompt())
    assert all(p.dim() < 3 for p in fast.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(prompt())


def test_a_frozen_model_stays_packed() -> None:
    """And the input's gradient flows through it."""
    plain, fast = pair()
    grads = []
    for model in (plain, fast):
        model.requires_grad_(False)
        x = model.get_input_embeddings()(prompt()).requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        grads.append(x.grad)
    close(grads[1], grads[0], 1e-4)
    assert fast.model.layers[0].mlp.down_proj.weight.dim() == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain, fast = pair()
    plain.train(), fast.train()
    options = {"use_reentrant": reentrant}
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    fast.enable_input_require_grads()
    compare_gradients(plain, fast)


def test_50_steps(tmp_path: Any) -> None:
    """With the Trainer; evaluation between the steps does not disturb it."""
    torch.manual_seed(2)
    rows = [{"input_ids": t, "labels": t} for t in torch.randint(3, 60, (64, 12))]
    histories = []
    for fast in (False, True):
        model = tiny(num_hidden_layers=2)
        if fast:
            lf.accelerate(model)
        options = transformers.TrainingArguments(
            tmp_path,
            max_steps=50,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=25,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        log = trainer.state.log_history
        histories.append([entry["loss"] for entry in log if "loss" in entry])
    plain, ours = map(torch.tensor, histories)
    assert len(ours) == 50 and plain[-1] < 0.9 * plain[0]
    assert (ours - plain).abs().max() < 1e-3


def test_trained_then_restored() -> None:
    """Updates go to the Parameters, fused or not."""
    plain, fast = pair()
    for model in (plain, fast):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model.train()).backward()
            optimizer.step()
        model.eval()
    with torch.no_grad():
        want = plain(prompt()).logits
        close(fast(prompt()).logits, want, 1e-3)
        close(lf.accelerate(fast)(prompt()).logits, want, 1e-3)
        close(lf.restore(fast)(prompt()).logits, want, 1e-3)


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_lora(quantize: str | None) -> None:
    """Adapters on an accelerated model: their gradients, with the base frozen."""
    peft = pytest.importorskip("peft")
    plain = tiny()
    fast = lf.accelerate(copy.deepcopy(plain), quantize)
    if quantize:
        for name, module in fast.named_modules():
            if isinstance(module, lf.nn.FP8Linear):
                plain.get_submodule(name).weight.data = module.dequantize()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]
    )
    models = []
    for model in (plain, fast):
        torch.manual_seed(4)
        models.append(peft.get_peft_model(model, config))
        for name, p in models[-1].named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.02)
    compare_gradients(*models)
    with torch.no_grad():
        close(models[1](prompt()).logits, models[0](prompt()).logits, 1e-4)
