"""Fine-tune LoRA adapters (peft) on a model whose own weights stay in FP8."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_fast.hf import LlamaFastFP8Config
from llama_fast.hf.lora import mergeable

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a folder or hub id, of 16-bit weights or of an FP8 checkpoint")
parser.add_argument("--text", default="The llama is a pack animal of the Andes, and it hums.")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", help="where to save the merged model, in FP8")
args = parser.parse_args()

torch.manual_seed(0)
inputs = AutoTokenizer.from_pretrained(args.model)(args.text, return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(
    args.model, quantization_config=LlamaFastFP8Config(), dtype=torch.bfloat16
)
# Training works with any LoraConfig; mergeable() is for merge_and_unload().
model = get_peft_model(model, mergeable(LoraConfig(r=8, target_modules="all-linear")))
adapters = [p for p in model.parameters() if p.requires_grad]  # fp32; all else is frozen
optimizer = torch.optim.AdamW(adapters, lr=1e-3)


def loss() -> torch.Tensor:
    return model(**inputs, labels=inputs["input_ids"]).loss


for step in range(args.steps):
    current = loss()
    current.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step}: loss {current.item():.3f}")

with torch.no_grad():
    trained = loss()
    model = model.merge_and_unload()
    print(f"trained {trained.item():.3f}, merged into FP8 {loss().item():.3f}")
if args.output:
    model.save_pretrained(args.output)
