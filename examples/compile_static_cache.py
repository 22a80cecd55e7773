"""Compile an accelerated model for decoding: python examples/compile_static_cache.py DIR

A static cache has a fixed size, so every token runs the same graph: it is compiled once.
"""

import argparse

import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_fast as lf

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--prompt", default="The sea is")
parser.add_argument("--max-new-tokens", type=int, default=32)
parser.add_argument("--backend", default="inductor")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = lf.accelerate(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))
forward = model.forward
compiled = torch.compile(forward, fullgraph=True, backend=args.backend)


def step(input_ids: torch.Tensor, **options: object) -> object:
    """Read the prompt eagerly, since its length changes from call to call."""
    return (compiled if input_ids.shape[1] == 1 else forward)(input_ids, **options)


model.forward = step
before = counters["stats"]["unique_graphs"]
out = model.generate(
    **tokenizer(args.prompt, return_tensors="pt"),
    max_new_tokens=args.max_new_tokens,
    do_sample=False,
    cache_implementation="static",
)
print(tokenizer.decode(out[0], skip_special_tokens=True))
print(f"compiled graphs: {counters['stats']['unique_graphs'] - before}")
