"""Run OpenVINO on the CPU: a traced forward pass with hf_model's weights and the cache inside.

Weights are bf16, or int8 by NNCF (symmetric, one scale per row). `_Forward` computes what
transformers does, with the cache as plain tensors, in the pattern that OpenVINO fuses: the cache is
gathered by a beam index, then joined with the new rows, then attention. Everything else is the
default of OpenVINO's latency mode, including a u8 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast import LlamaConfig
from llama_fast.ops.rope import inv_freq
from llama_fast.rope_scaling import RopeFunction

from ..timing import Run
from . import CHUNK, ModelPeer, Ops

OPS: Ops = {}


def models(hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
    for int8 in (True, False):
        yield _Model(hf_model, int8)


class _Model(ModelPeer):
    def __init__(self, hf_model: Any, int8: bool) -> None:
        import nncf
        import openvino

        self.label = f"openvino {'int8' if int8 else 'bf16'}"
        shapes = [m.weight.shape for m in hf_model.modules() if isinstance(m, nn.Linear)]
        # A scale is fp16.
        self._weight_bytes = sum(n * k + 2 * n if int8 else 2 * n * k for n, k in shapes)
        model = _convert(hf_model)
        if int8:
            nncf.set_log_level("ERROR")
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._contexts: dict[tuple[int, ...], _Context] = {}
        self._compiled: Any = openvino.Core().compile_model(model, "CPU", options)

    def logits(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        return _step(self._compiled.create_infer_request(), tokens, 0, np.arange(length)).clone()

    def after(self, context: Tensor, tokens: Tensor, times: int) -> Run:
        key = tuple(context.flatten().tolist())
        if key not in self._contexts:
            self._contexts[key] = _Context(self._compiled.create_infer_request(), context)
        kept = self._contexts[key]
        length, size, last = context.shape[1], tokens.shape[1], np.array([tokens.shape[1] - 1])

        def run(_: int) -> Tensor:
            kept.rewind()
            kept.ahead = True
            for i in range(times):
                logits = _step(kept.request, tokens, length + i * size, last)
            return logits[:, -1]

        run.prepare = kept.rewind  # type: ignore[attr-defined]
        return run

    def weight_bytes(self) -> int:
        return self._weight_bytes

    def close(self) -> None:
        self._contexts.clear()
        self._compiled = None


class _Context:
    """A request whose cache holds some tokens. rewind restores it from a copy, untimed, since other
    implementations rewind at no cost."""

    def __init__(self, request: Any, tokens: Tensor) -> None:
        import openvino

        self.request, self.ahead = request, False
        for i in range(0, tokens.shape[1], CHUNK):
            _step(request, tokens[:, i : i + CHUNK], i, np.array([0]))
        self._copies: list[tuple[Any, Any]] = []
        for state in request.query_state() if tokens.shape[1] else ():
            # Not by numpy, which would read bf16 as fp16.
            copy = openvino.Tensor(state.state.element_type, state.state.shape)
            state.state.copy_to(copy)
            self._copies.append((state, copy))

    def rewind(self) -> None:
        if self.ahead and not self._copies:
            self.request.reset_state()
        elif self.ahead:
            for state, copy in self._copies:
                state.state = copy
        self.ahead = False


def _step(request: Any, tokens: Tensor, start: int, rows: np.ndarray) -> Tensor:
    """Return the logits [1, len(rows), vocab] of those rows of tokens, in the request's memory."""
    positions = np.arange(start, start + tokens.shape[1])
    request.infer([tokens.numpy(), positions, rows, np.zeros(1, np.int32)])
    return torch.from_numpy(request.get_output_tensor(0).data)


class _Forward(nn.Module):
    """Llama's forward pass with the cache as arguments: k and v [1, Hkv, P, D] of each layer."""

    frequencies: Tensor

    def __init__(self, hf_model: Any) -> None:
        super().__init__()
        self.config = LlamaConfig.from_hf(hf_model.config)
        self.model, self.head = hf_model.model, hf_model.lm_head
        c = self.config
        assert not isinstance(c.rope_scaling, RopeFunction)  # Llama 3.1's are a formula
        frequencies = inv_freq(c.rope_theta, c.head_dim, c.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, ids: Tensor, positions: Tensor, rows: Tensor, beam: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the logits of some rows, in fp32 (numpy has no bf16), and the caches with S more
        tokens. ids [1, S], positions [S], beam [1]: zero."""
        x = self.model.embed_tokens(ids)
        angles = positions.float()[:, None] * self.frequencies[None]
        angles = torch.cat((angles, angles), -1)[None, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        before = past[0].shape[2]
        query = torch.arange(ids.shape[1])[:, None] + before
        key = torch.arange(ids.shape[1] + before)[None]
        lowest = torch.finfo(x.dtype).min
        mask = torch.where(key <= query, 0.0, lowest).to(x.dtype)[None, None]
        caches: list[Tensor] = []
        for i, layer in enumerate(self.model.layers):
            normed = self._norm(x, layer.input_layernorm.weight)
            held = [cache.index_select(0, beam) for cache in past[2 * i : 2 * i + 2]]
            attended, *grown = self._attend(layer.self_attn, normed, (cos, sin), mask, held)
            caches += grown
            x = x + attended
            normed, mlp = self._norm(x, layer.post_attention_layernorm.weight), layer.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        x = self._norm(x.index_select(1, rows), self.model.norm.weight)
        return (self.head(x).float(), *caches)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        mean = wide.pow(2).mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean + self.config.rms_norm_eps)).to(x.dtype) * weight

    def _attend(
        self, layer: Any, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, held: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, length = self.config, x.shape[1]
        q, k, v = (
            project(x).view(1, length, -1, c.head_dim).transpose(1, 2)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = (t * turn[0] + _turned(t) * turn[1] for t in (q, k))
        k, v = (torch.cat((past, t), 2) for past, t in zip(held, (k, v), strict=True))
        group = c.num_attention_heads // c.num_key_value_heads
        wide = (1, c.num_key_value_heads, group, k.shape[2], c.head_dim)
        all_heads = (1, c.num_attention_heads, k.shape[2], c.head_dim)
        every_k, every_v = (t[:, :, None].expand(wide).reshape(all_heads) for t in (k, v))
        out = F.scaled_dot_product_attention(q, every_k, every_v, attn_mask=mask)
        return layer.o_proj(out.transpose(1, 2).reshape(1, length, -1)), k, v


def _turned(t: Tensor) -> Tensor:
    a, b = t.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _convert(hf_model: Any) -> Any:
    """Return an openvino.Model whose caches are its state, initially empty."""
    import openvino
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    module = _Forward(hf_model).eval()
    c = module.config
    cache = torch.zeros(1, c.num_key_value_heads, 3, c.head_dim, dtype=hf_model.dtype)
    example = (
        torch.zeros(1, 2, dtype=torch.int64),
        torch.arange(2),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        *[cache] * (2 * c.num_hidden_layers),
    )
    with torch.inference_mode():
        model = openvino.convert_model(module, example_input=example)
    caches = [1, c.num_key_value_heads, -1, c.head_dim]
    shapes = [[1, -1], [-1], [-1], [1], *[caches] * (2 * c.num_hidden_layers)]
    for port, shape in zip(model.inputs, shapes, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    pairs = {}
    for i, (port, out) in enumerate(zip(model.inputs[4:], model.outputs[1:], strict=True)):
        port.get_tensor().set_names({f"past.{i}"})
        out.get_tensor().set_names({f"present.{i}"})
        pairs[f"past.{i}"] = f"present.{i}"
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    empty = np.array([1, c.num_key_value_heads, 0, c.head_dim], dtype=np.int64)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":  # it needs an initial value
            zero = opset13.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([opset13.broadcast(zero, opset13.constant(empty))])
    model.validate_nodes_and_infer_types()
    return model
