"""Measure tokens a second with and without speculation: python examples/speculate.py DIR

The prompt asks for text that repeats parts of it, such as an edit of a file. Both ways give the
same tokens. They alternate, and the medians are printed.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import llama_fast as lf
from llama_fast.chat import encode, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--prompt", type=Path, default=Path(__file__), help="default: this file")
parser.add_argument("--ask", default="Repeat this text, with a short comment above each line:")
parser.add_argument("--quantize", help="fp8, fp8_all or fp8_ffn")
parser.add_argument("--temperature", type=float, default=0.0)
parser.add_argument("--max-new-tokens", type=int, default=256)
parser.add_argument("--rounds", type=int, default=5)
args = parser.parse_args()

model = lf.Llama.from_pretrained(args.model, quantize=args.quantize)
question = f"{args.ask}\n\n{args.prompt.read_text()}"
prompt = encode(load_tokenizer(args.model), [{"role": "user", "content": question}])


def run(speculate: str | None) -> tuple[list[int], float]:
    """Return the new tokens, and the tokens a second after the first one."""
    times: list[float] = []
    (ids,) = model.generate(
        [prompt],
        args.max_new_tokens,
        temperature=args.temperature,
        seed=0,
        speculate=speculate,
        on_token=lambda *_: times.append(time.perf_counter()),
    )
    return ids, (len(ids) - 1) / (times[-1] - times[0])


rounds = [(run(None), run("lookup")) for _ in range(args.rounds)]
if any(plain[0] != lookup[0] for plain, lookup in rounds):
    sys.exit("not the same tokens")
plain, lookup = (median(round[i][1] for round in rounds) for i in (0, 1))
ratio = median(b[1] / a[1] for a, b in rounds)
print(
    f"{len(rounds[0][0][0])} tokens; a second: plain {plain:.1f}, lookup {lookup:.1f}, {ratio:.2f}x"
)
