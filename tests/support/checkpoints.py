"""Make small checkpoints: transformers saves them, and tests edit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_fast import reference

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_model(**changes: Any) -> transformers.LlamaForCausalLM:
    """Return a model whose random weights let attention and rotation affect the logits."""
    fields = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 131072,
        "initializer_range": 0.15,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    if transformers.__version__.startswith("4."):
        rope = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
        fields |= {"rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": rope}
    else:
        fields |= {"rope_parameters": LLAMA3_ROPE}
    fields |= changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()


def save(model: transformers.LlamaForCausalLM, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, held: dict[str, Tensor]) -> None:
    contiguous = {name: t.contiguous() for name, t in held.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def write_fp8(
    folder: Path, granularity: str, suffix: str, chosen: Callable[[str], bool], **config: Any
) -> dict[str, Tensor]:
    """Rewrite the chosen linears in FP8. Return the checkpoint's new weights in fp32."""
    held, meant = tensors(folder), {}
    for name, weight in list(held.items()):
        meant[name] = weight
        if name.endswith(".weight") and name.split(".")[-2] in LINEARS and chosen(name):
            held[name], scale = reference.quantize_fp8(weight, granularity)
            held[name.removesuffix("weight") + suffix] = scale
            meant[name] = reference.dequantize_fp8(held[name], scale)
    write(folder, held)
    edit_json(folder / "config.json", quantization_config=config)
    return meant


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def hf_logits(
    model: transformers.LlamaForCausalLM, tokens: Tensor, positions: Tensor | None = None
) -> Tensor:
    with torch.no_grad():
        if positions is not None:
            positions = positions.expand(tokens.shape)
        return model(tokens, position_ids=positions).logits
