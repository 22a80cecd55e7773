"""Quantize a transformers model to FP8 in one line: python examples/fp8_transformers.py DIR OUT

The saved folder is in compressed-tensors' format, which vLLM loads too.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import llama_fast as lf

source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
before = model.get_memory_footprint()

lf.accelerate(model, quantize="fp8")

print(f"{before / 2**20:.1f} MiB -> {model.get_memory_footprint() / 2**20:.1f} MiB")
model.save_pretrained(target)
again = lf.accelerate(AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16))
tokens = torch.arange(3, 11)[None]
with torch.no_grad():
    print("the same logits:", torch.equal(again(tokens).logits, model(tokens).logits))
