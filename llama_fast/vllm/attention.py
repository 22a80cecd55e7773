"""Attention over vLLM's paged KV cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ..ops.checks import ACTIVATIONS
from ..ops.decode_attention import attention_with_kvcache
from ..ops.rope import apply_rope_and_append

logger = init_logger("vllm.llama_fast")


@dataclass
class Metadata(CPUAttentionMetadata):
    """vLLM's metadata, and the batch in parts of equal query length.

    parts: (first token, last token + 1, first sequence, last sequence + 1, queries a sequence).
    """

    parts: tuple[tuple[int, int, int, int, int], ...] = ()


class Backend(CPUAttentionBackend):
    """vLLM's CPU backend, with keys and values in the cache as they are."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class Builder(CPUAttentionMetadataBuilder):
    reorder_batch_threshold = 1  # sequences of one query first

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        # The metadata and the order of a cache's elements are the same for a whole group.
        self.served = all(layer.impl.served for layer in layers.values())
        for layer in layers.values():
            layer.impl.served = self.served
        if not self.served:
            logger.info_once("llama_fast: left to vLLM: attention with ALiBi, a soft cap or sinks")

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        if not self.served:
            return super().build(common_prefix_len, common, fast_build)
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=True,
            parts=_parts(starts.tolist()),
        )


def _parts(starts: list[int]) -> tuple[tuple[int, int, int, int, int], ...]:
    """Return the parts of a batch, in which neighbors of equal query length are one. Sequences
    without queries are in none."""
    parts: list[tuple[int, int, int, int, int]] = []
    for i in range(len(starts) - 1):
        queries = starts[i + 1] - starts[i]
        if queries and parts and parts[-1][4] == queries:
            first, _, sequence, _, _ = parts[-1]
            parts[-1] = (first, starts[i + 1], sequence, i + 1, queries)
        elif queries:
            parts.append((starts[i], starts[i + 1], i, i + 1, queries))
    return tuple(parts)


class Impl(CPUAttentionBackendImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.served = not (
            self.sliding_window != -1
            or self.alibi_slopes is not None
            or self.logits_soft_cap
            or self.sinks is not None
            or self.attn_type != AttentionType.DECODER
        )
        self.cache: Tensor | None = None

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attn_metadata, Metadata):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        keys, values = self._views(kv_cache)
        for first, last, sequence, end, queries in attn_metadata.parts:
            q = query[first:last]
            out = attention_with_kvcache(
                q.view(end - sequence, queries, *q.shape[1:]),
                keys,
                values,
                attn_metadata.seq_lens[sequence:end],
                block_table=attn_metadata.block_table[sequence:end],
                softmax_scale=self.scale,
            )
            output[first:last] = out.view(q.shape)
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        if not self.served:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        keys, values = self._views(kv_cache)
        tokens = slot_mapping.shape[0]
        key, value = key[:tokens], value[:tokens]
        # vLLM rotated the keys: angles of 0 leave them as they are.
        table = _angles_of_zero(key.shape[-1])
        positions = slot_mapping.new_zeros(tokens)
        apply_rope_and_append(key[:, :1], key, value, positions, table, keys, values, slot_mapping)

    def _views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [blocks, block_size, Hkv, D] of a cache [blocks, Hkv, block_size,
        2 * D], in which a head's keys precede its values. vLLM passes the same cache each time."""
        if kv_cache is not self.cache:
            blocks, heads, block_size, both = kv_cache.shape
            halves = kv_cache.view(blocks, heads, 2 * block_size, both // 2).chunk(2, dim=2)
            self.cache, self.views = (
                kv_cache,
                (halves[0].transpose(1, 2), halves[1].transpose(1, 2)),
            )
        return self.views


@functools.lru_cache
def _angles_of_zero(head_dim: int) -> Tensor:
    """Return a rope_table of one position, fp32 [1, head_dim]."""
    return torch.tensor([[1.0, 0.0]], dtype=torch.float32).repeat_interleave(head_dim // 2, 1)


def register() -> None:
    """Register the CUSTOM backend, and choose it where it fits and no other is asked for."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.Backend")
    platform = type(current_platform)
    choose = platform.get_attn_backend_cls

    def with_ours(
        cls: type, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        path = choose(selected_backend, attn_selector_config, *args, **kwargs)
        if selected_backend not in (None, AttentionBackendEnum.CUSTOM):
            return path
        if path != AttentionBackendEnum.CPU_ATTN.get_path():
            return path
        if not _serves(attn_selector_config):
            logger.info_once("llama_fast: left to vLLM: attention, %s", attn_selector_config)
            return path
        return AttentionBackendEnum.CUSTOM.get_path()

    platform.get_attn_backend_cls = classmethod(with_ours)


def _serves(config: Any) -> bool:
    return (
        config.attn_type == AttentionType.DECODER
        and config.dtype in ACTIVATIONS
        and config.kv_cache_dtype in (None, "auto")
        and not config.has_sliding_window
        and not config.has_sink
        and not config.use_non_causal
        and not config.use_kv_connector  # it moves blocks in vLLM's order
        and not config.use_pcp
        and not config.use_dcp
        and not config.use_rswa
    )
