"""A Llama in a GGUF file: its config, and its tensors by Hugging Face's names, dequantized to fp32
one at a time by the gguf package.

llama.cpp rotates neighboring dimensions, so its converter reorders the rows of q and k; read()
undoes that. Source: docs/gguf.md of ggml, and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..ops.rope import inv_freq
from ..rope_scaling import positive
from .gguf_header import Header, TensorInfo

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_PLAIN = ("F32", "F16", "BF16")
_STOPS = ("eos", "eot", "eom")
_FREQS = "rope_freqs.weight"
# The file stores the divisor of each frequency instead. All Llama 3 models share these values.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class GGUF:
    def __init__(self, path: Path) -> None:
        """Read the header. Raises ImportError without gguf, ValueError for a broken file."""
        header = Header(path)
        held = {_hf_name(name): t for name, t in header.tensors.items() if name != _FREQS}
        self._path, self._tensors = path, held
        self.shapes = {name: t.shape for name, t in held.items()}
        kinds = ((name, t.kind.name) for name, t in held.items())
        self.dtypes = {name: kind if kind in _PLAIN else "BF16" for name, kind in kinds}
        heads = header.values("llama.attention.head_count", "llama.attention.head_count_kv")
        self._heads = dict(zip(("q_proj", "k_proj"), heads, strict=True))

    def read(self, name: str) -> Tensor:
        """Return a tensor in fp32, with rows in Hugging Face's order."""
        out = _dequantized(self._path, name, self._tensors[name])
        heads = self._heads.get(name.removesuffix(".weight").rpartition(".")[2])
        if heads is None:
            return out
        n, k = out.shape
        if not isinstance(heads, int) or heads < 1 or n % (2 * heads):
            raise ValueError(f"{self._path}: {name}: {n} rows for {heads!r} heads")
        return out.view(heads, n // heads // 2, 2, k).transpose(1, 2).reshape(n, k)


def read_config(path: Path) -> dict[str, Any]:
    """Return the metadata as the fields of Hugging Face's config."""
    header = Header(path)
    tensors, values = header.tensors, header.values
    (architecture,) = values("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: general.architecture: got {architecture!r}, want 'llama'")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: has no token_embd.weight")
    held = values(*(f"llama.{key}" for key in _FIELDS.values()))
    hf = {name: value for name, value in zip(_FIELDS, held, strict=True) if value is not None}
    hf["vocab_size"] = tensors["token_embd.weight"].shape[0]
    hf["tie_word_embeddings"] = "output.weight" not in tensors
    ids = values(*(f"tokenizer.ggml.{x}_token_id" for x in ("bos", *_STOPS)))
    stops = [i for i in ids[1:] if i is not None]
    theta, kind, factor, original = values(
        "llama.rope.freq_base",
        *(f"llama.rope.scaling.{x}" for x in ("type", "factor", "original_context_length")),
    )
    theta = 10000.0 if theta is None else theta
    rope = {"rope_theta": theta, "rope_type": "default" if kind in (None, "none") else kind}
    rope |= {} if factor is None else {"factor": factor}
    rope |= {} if original is None else {"original_max_position_embeddings": original}
    if _FREQS in tensors:
        positive(f"{path}: llama.rope.freq_base", theta)
        rope = _llama3(path, theta, _dequantized(path, _FREQS, tensors[_FREQS]))
    return {
        "model_type": "llama",
        "bos_token_id": ids[0],
        "eos_token_id": [i for at, i in enumerate(stops) if i not in stops[:at]],
        "rope_parameters": rope,
        **hf,
    }


def _llama3(path: Path, theta: float, divisors: Tensor) -> dict[str, Any]:
    """Return the rope_parameters that give these divisors of the frequencies [D / 2]."""
    if divisors.dim() != 1 or not len(divisors):
        raise ValueError(f"{path}: {_FREQS}: got shape {list(divisors.shape)}, want [D / 2]")
    fields = {"factor": float(divisors.max()), **_LLAMA3}
    plain, scaled = (
        inv_freq(theta, 2 * len(divisors), s) for s in (None, SimpleNamespace(**fields))
    )
    if not torch.allclose(plain / scaled, divisors, rtol=1e-4):
        raise ValueError(f"{path}: {_FREQS}: not a scaling of Llama 3's kind")
    return {"rope_type": "llama3", "rope_theta": theta, **fields}


def _dequantized(path: Path, name: str, tensor: TensorInfo) -> Tensor:
    import gguf

    try:
        values = gguf.dequantize(tensor.data, tensor.kind)
    except NotImplementedError:
        raise ValueError(
            f"{path}: {name}: of type {tensor.kind.name}, which gguf only names"
        ) from None
    if not values.flags.writeable:  # fp32: the file itself
        values = values.copy()
    return torch.from_numpy(values).view(tensor.shape)


def _hf_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in _NAMES:
        return f"model.layers.{layer[1]}.{_NAMES[layer[2]]}.weight"
    module = name.removesuffix(".weight")
    return f"{_NAMES[module]}.weight" if module in _NAMES else name
