"""RMSNorm, SwiGLU and rotary embedding in vLLM: its IR ops and CustomOps."""

from typing import Any

from torch import Tensor
from vllm import ir
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.platforms import current_platform

from ..ops import activation, rms_norm, rope
from ..ops.checks import ACTIVATIONS

PROVIDER = "llama_fast"


def _serves_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        weight is not None
        and variance_size is None
        and x.dtype in ACTIVATIONS
        and weight.dtype == x.dtype
        and x.stride(-1) == 1
    )


def _norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    assert weight is not None
    return rms_norm.rms_norm(x, weight, epsilon)


def _serves_add_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    same = x_residual.dtype == x.dtype and x_residual.stride(-1) == 1
    return same and _serves_norm(x, weight, epsilon, variance_size)


def _add_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    assert weight is not None
    return rms_norm.add_rms_norm(x, x_residual, weight, epsilon)


class FastSiluAndMul(SiluAndMul):
    """SiluAndMul. Under torch.compile vLLM calls forward_native, otherwise forward_cpu."""

    @staticmethod
    def forward_native(x: Tensor) -> Tensor:
        if x.dtype not in ACTIVATIONS or x.stride(-1) != 1:
            return SiluAndMul.forward_native(x)
        return activation.silu_and_mul(x)

    def forward_cpu(self, x: Tensor) -> Tensor:
        return self.forward_native(x)


class _FastRotary(RotaryEmbedding):
    """Rotary embedding with a table in fp32, where vLLM's is in the model's dtype."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        table = self._compute_cos_sin_cache().float()
        self.register_buffer("table", table, persistent=False)

    def forward_native(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if key is None or not self._serves(query, key):
            return super().forward_native(positions, query, key)
        heads = (-1, self.head_size)
        q, k = rope.apply_rope(
            query.unflatten(-1, heads).flatten(0, -3),
            key.unflatten(-1, heads).flatten(0, -3),
            positions.flatten(),
            self.table,
            interleaved=not self.is_neox_style,
        )
        return q.view(query.shape), k.view(key.shape)

    def forward_cpu(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if key is None or not self._serves(query, key):
            return super().forward_cpu(positions, query, key)
        return self.forward_native(positions, query, key)

    def _serves(self, query: Tensor, key: Tensor) -> bool:
        return (
            self.rotary_dim == self.head_size
            and query.dim() == 2
            and key.dim() == 2
            and query.dtype in ACTIVATIONS
            and key.dtype == query.dtype
            and query.stride(-1) == 1
            and key.stride(-1) == 1
        )


class FastRotaryEmbedding(_FastRotary):
    """The default rope type."""


class FastLlama3RotaryEmbedding(_FastRotary, Llama3RotaryEmbedding):
    """Llama 3.1's rope type."""


def register() -> None:
    """Register the ops, and put them first in the priority list of vLLM's CPU platform."""
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_serves_norm)(_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_serves_add_norm)(_add_norm)
    platform = type(current_platform)
    defaults = platform.get_default_ir_op_priority

    def with_ours(cls: type, vllm_config: Any) -> Any:
        priority = defaults(vllm_config)
        priority.rms_norm.insert(0, PROVIDER)
        priority.fused_add_rms_norm.insert(0, PROVIDER)
        return priority

    platform.get_default_ir_op_priority = classmethod(with_ours)
    for name, layer in (
        ("SiluAndMul", FastSiluAndMul),
        ("RotaryEmbedding", FastRotaryEmbedding),
        ("Llama3RotaryEmbedding", FastLlama3RotaryEmbedding),
    ):
        if name not in op_registry_oot:  # another plugin's replacement stays
            CustomOp.register_oot(layer, name=name)
