"""Stream the answer to a question: python examples/generate_text.py DIR "Why is the sky blue?"

DIR is an instruct checkpoint in Hugging Face's format. Needs pip install 'llama_fast[hf]'.
"""

import argparse

import llama_fast as lf
from llama_fast.chat import encode, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("question")
parser.add_argument("--max-new-tokens", type=int, default=200)
args = parser.parse_args()

tokenizer = load_tokenizer(args.model)
model = lf.Llama.from_pretrained(args.model, quantize="fp8")

# encode keeps control tokens in the user's text as plain text.
prompt = encode(tokenizer, [{"role": "user", "content": args.question}])
streamer = lf.TextStreamer(
    tokenizer, lambda text: print(text, end="", flush=True), skip_special_tokens=True
)
model.generate(
    [prompt], max_new_tokens=args.max_new_tokens, on_token=lambda _, token: streamer.put(token)
)
streamer.end()
print()
