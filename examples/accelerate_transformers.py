"""Run a transformers model on the kernels: python examples/accelerate_transformers.py DIR

One line puts them in, and one takes them out again. In fp32 the tokens are the same.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_fast as lf

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--prompt", default="The sea is")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--max-new-tokens", type=int, default=32)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
inputs = tokenizer(args.prompt, return_tensors="pt")


def run(name: str) -> str:
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(f"{name}: {time.perf_counter() - start:.2f} s")
    return tokenizer.decode(out[0])


plain = run("transformers")
lf.accelerate(model)  # in place, without a second copy of the weights
print(lf.report(model))  # what runs where, and why anything was left
fast = run("accelerated")
lf.restore(model)  # bit for bit
print(fast)
print("the same text" if fast == plain else f"another text; transformers: {plain}")
