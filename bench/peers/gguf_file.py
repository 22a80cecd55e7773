"""Write a transformers Llama as a GGUF file, which llama.cpp loads.

llama.cpp's rotary embedding pairs neighboring dimensions; transformers pairs each dimension of a
head's first half with one of the second. So the rows of the query and key projections are
reordered, which leaves every dot product of a query with a key the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fast import LlamaConfig
from llama_fast.ops.rope import inv_freq
from llama_fast.rope_scaling import RopeScaling


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder [heads * D, K]: rows i and i + D/2 of each head move to 2i and 2i + 1."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def tensors(hf_model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's tensors with their names."""
    import gguf

    config = LlamaConfig.from_hf(hf_model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, t in hf_model.state_dict().items():
        count = heads.get(name.split(".")[-2])
        yield names.get_name(name, (".weight",)), interleaved(t, count) if count else t
    if isinstance(config.rope_scaling, RopeScaling):
        # From the configuration, since .bfloat16() rounds a model's own frequencies.
        plain, scaled = (
            inv_freq(config.rope_theta, config.head_dim, s) for s in (None, config.rope_scaling)
        )
        yield "rope_freqs.weight", plain / scaled  # a divisor of the frequencies


def write(path: Path, hf_model: Any, kind: str) -> int:
    """Write path with the matrices in `kind`, "BF16" or "Q8_0", the vectors in fp32, and the size
    of the vocabulary instead of its entries.

    Returns the bytes of the matrices that every token reads, all except the embedding. Raises
    ValueError if rows do not divide into the kind's blocks.
    """
    import gguf

    config = LlamaConfig.from_hf(hf_model.config)
    matrix = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[matrix]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    streamed = 0
    for name, t in tensors(hf_model):
        t = t.detach().cpu()
        if t.dim() == 1:
            writer.add_tensor(name, t.float().numpy())
            continue
        if t.shape[1] % block:
            raise ValueError(f"{name}: rows of {t.shape[1]} do not divide into blocks of {block}")
        data = q8_0(t) if kind == "Q8_0" else t.bfloat16().contiguous().view(torch.uint8)
        writer.add_tensor(name, data.numpy(), raw_dtype=matrix)
        streamed += data.nbytes if name != "token_embd.weight" else 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return streamed


def q8_0(t: Tensor) -> Tensor:
    """Quantize [N, K] to Q8_0, uint8 [N, K / 32 * 34]: an fp16 scale, then 32 int8, for each 32 of
    a row. The bytes equal those of gguf.quants.quantize, which runs numpy on one thread."""
    blocks = t.float().view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    rounded = (scaled.abs() + 0.5).floor().copysign(scaled)  # halves away from zero
    parts = scale.half().view(torch.uint8), rounded.to(torch.int8).view(torch.uint8)
    return torch.cat(parts, 1).view(t.shape[0], -1)
