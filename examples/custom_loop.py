"""A generation loop of your own: the model, the KV cache, and any rule for the next token.

Here two prompts of different lengths run as one batch, and tokens that were used before become less
likely: python examples/custom_loop.py DIR "Once upon a time" "The sea"
"""

import argparse

import torch

import llama_fast as lf
from llama_fast.chat import encode_prompt, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("prompts", nargs="+")
parser.add_argument("--new-tokens", type=int, default=32)
parser.add_argument("--penalty", type=float, default=1.0)
args = parser.parse_args()

tokenizer = load_tokenizer(args.model)
model = lf.Llama.from_pretrained(args.model)
prompts = [encode_prompt(tokenizer, prompt) for prompt in args.prompts]

# One pool of blocks, from which each sequence takes those that its length needs.
cache = lf.KVCache(model.config, [len(p) + args.new_tokens for p in prompts], dtype=model.dtype)
used = torch.zeros(len(prompts), model.config.vocab_size)


def choose(logits: torch.Tensor) -> torch.Tensor:
    """Return the next tokens [B, 1] for logits [B, vocab]."""
    tokens = (logits - args.penalty * used).argmax(-1, keepdim=True)
    used.scatter_(1, tokens, 1.0)
    return tokens


# Prompts differ in length, so each is read alone; select() is a view of one sequence.
last = torch.cat(
    [model(torch.tensor([p]), cache=cache.select([i]))[:, -1] for i, p in enumerate(prompts)]
)
tokens = choose(last)
generated = [tokens]
for _ in range(args.new_tokens - 1):
    tokens = choose(model(tokens, cache=cache)[:, -1])
    generated.append(tokens)

for prompt, ids in zip(args.prompts, torch.cat(generated, 1).tolist(), strict=True):
    print(prompt + tokenizer.decode(ids, skip_special_tokens=True))
