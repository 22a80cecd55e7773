"""FP8Linear, nn.Linear with FP8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.weights import packed
from ..ops.linear import fp8_linear
from ..ops.quantize import quantize_fp8
from ..reference import FP8_BLOCK, FP8_DTYPE, dequantize_fp8, unpack_weight

_GRANULARITIES = ("tensor", "row", "block")
_INTEGER = {1: torch.uint8, 4: torch.int32}  # itemsize -> a dtype that no cast of a module touches


def dense(x: Tensor) -> Tensor:
    """Return x, or a copy whose last dimension is contiguous: nn.Linear takes any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def moving(fn: Callable[[Tensor], Tensor], *kept: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return a form of fn, nn.Module._apply's argument, that moves the kept tensors to another
    device and never casts them: model.to(bfloat16) must leave e4m3 and fp32 scales as they are."""
    ids = {id(t) for t in kept}

    def apply(t: Tensor) -> Tensor:
        if id(t) not in ids:
            return fn(t)
        moved = fn(t.detach().view(_INTEGER[t.itemsize]))
        # .type(dtype) casts integers too.
        return t.to(moved.device) if moved.is_floating_point() else moved.view(t.dtype)

    return apply


class FP8Linear(nn.Linear):
    """fp8_linear with its weight, e4m3 and frozen: the gradient is the input's and the bias's.

    State dict: weight e4m3 [out_features, in_features]; weight_scale fp32, [out_features, 1] for
    granularity "row", [1] for "tensor", one per 128 x 128 block for "block"; bias. On a CPU, weight
    is in pack_weight's order where the shape allows; state_dict() returns a copy in the plain
    order, and load_state_dict() takes that. Moving or casting the module keeps e4m3 and the fp32
    scale. dtype is the bias's. quantize_activation and scale_ub: as for
    fp8_linear. A subclass of nn.Linear because peft adapts only those.
    """

    weight_scale: Tensor
    compute_dtype = torch.float32  # peft makes adapters in it; in e4m3 they would lose precision

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: str = "row",
        quantize_activation: bool | None = None,
        scale_ub: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own allocates a weight of 16 or 32 bits
        if granularity not in _GRANULARITIES:
            raise ValueError(f"granularity: got {granularity!r}, want one of {_GRANULARITIES}")
        self.in_features, self.out_features = in_features, out_features
        self.granularity = granularity
        self.quantize_activation, self.scale_ub = quantize_activation, scale_ub
        weight = torch.zeros(out_features, in_features, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed(weight.view(FP8_DTYPE)), requires_grad=False)
        self.register_buffer("weight_scale", self.new_scale(device))
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        granularity: str = "row",
        *,
        quantize_activation: bool | None = None,
        scale_ub: float | None = None,
    ) -> FP8Linear:
        """Quantize an nn.Linear of 16 or 32 bits, which stays as it is.

        Raises ValueError if the weight holds NaN or infinity, which have no FP8 form.
        """
        out = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            granularity=granularity,
            quantize_activation=quantize_activation,
            scale_ub=scale_ub,
            device="meta",
        )
        out.quantize(linear.weight.detach())
        if linear.bias is not None:
            bias = linear.bias.detach().clone()
            out.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
        return out.train(linear.training)

    def new_scale(self, device: torch.device | str | None = None) -> Tensor:
        """Return ones in the shape of the granularity's scale."""
        n, k = self.out_features, self.in_features
        blocks = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
        shape = {"row": (n, 1), "tensor": (1,), "block": blocks}[self.granularity]
        return torch.ones(shape, dtype=torch.float32, device=device)

    def reset_parameters(self) -> None:
        """Do nothing: an FP8 weight comes from a checkpoint or from from_linear."""

    def quantize(self, weight: Tensor) -> None:
        """Replace the weight by one of 16 or 32 bits [N, K], quantized."""
        by = "block_2d" if self.granularity == "block" else self.granularity
        self.set_weight(*quantize_fp8(weight.contiguous(), by))

    def set_weight(self, weight: Tensor, weight_scale: Tensor) -> None:
        """Replace the weight, e4m3 [N, K] or packed, and its scale; the module then has their
        device. For granularity "row" the scale may also be [N], or one number for all rows.

        Raises TypeError or ValueError for another dtype or shape, and ValueError for a scale that
        is not finite: it comes from a broken file, or from a weight that holds NaN or infinity.
        """
        if weight.dtype != FP8_DTYPE:
            raise TypeError(f"weight: got dtype {weight.dtype}, want {FP8_DTYPE}")
        if weight.dim() == 2 and tuple(weight.shape) != (self.out_features, self.in_features):
            want = [self.out_features, self.in_features]
            raise ValueError(f"weight: got shape {list(weight.shape)}, want {want}")
        scale = self._fitted(weight_scale)
        if not scale.is_meta and not scale.isfinite().all():
            raise ValueError("weight_scale: holds NaN or infinity")
        weight = packed(weight.contiguous()) if weight.dim() == 2 else weight
        self.weight, self.weight_scale = nn.Parameter(weight, requires_grad=False), scale

    def _fitted(self, scale: Tensor) -> Tensor:
        """Return a scale in this module's shape, from another shape of the same meaning."""
        want, got = self.weight_scale.shape, tuple(scale.shape)
        one = scale.numel() == 1 and self.granularity != "block"
        if got != want and not one and (self.granularity, got) != ("row", (self.out_features,)):
            raise ValueError(f"weight_scale: got shape {list(got)}, want {list(want)}")
        flat = scale.detach().to(torch.float32).reshape(-1)
        return flat.expand(want.numel()).reshape(want).contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return weight * weight_scale, [out_features, in_features]."""
        return dequantize_fp8(unpack_weight(self.weight.detach()), self.weight_scale, dtype)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Return the nn.Linear with the dequantized weight."""
        n, k = self.out_features, self.in_features
        out = nn.Linear(k, n, self.bias is not None, device="meta", dtype=dtype)
        out.weight = nn.Parameter(self.dequantize(dtype))
        if self.bias is not None:
            out.bias = nn.Parameter(self.bias.detach().to(dtype))
        return out.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ (weight * weight_scale)^T + bias: [..., in_features] -> [..., out_features].

        x is bf16, fp16 or fp32; bias has its dtype.
        """
        return fp8_linear(
            dense(x),
            self.weight,
            self.weight_scale,
            self.bias,
            quantize_activation=self.quantize_activation,
            scale_ub=self.scale_ub,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        super()._apply(moving(fn, self.weight, self.weight_scale), recurse)
        self._arrange()
        return self

    def _arrange(self) -> None:
        """Give the weight the order that its device reads fastest."""
        if self.weight.dim() == 4 and not self.weight.is_cpu:
            self.weight.data = unpack_weight(self.weight.data)
        elif self.weight.dim() == 2:
            self.weight.data = packed(self.weight.data)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the weight as bytes: pickle.loads fails for e4m3 in torch 2.13."""
        weight = self.weight.detach().view(torch.uint8)
        parameters = self._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
        return self.__dict__ | {"_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight = self.weight.detach().view(FP8_DTYPE)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._arrange()  # torch.load may have mapped the tensors to another device

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = unpack_weight(destination[f"{prefix}weight"])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, scale_name = f"{prefix}weight", f"{prefix}weight_scale"
        weight, scale = state_dict.get(name), state_dict.get(scale_name)
        if isinstance(weight, Tensor) and weight.dtype != FP8_DTYPE:
            # Copied, it would be rounded to e4m3 without a scale.
            error_msgs.append(
                f"{name}: got dtype {weight.dtype}, want {FP8_DTYPE} with {scale_name}; "
                "quantize with FP8Linear.from_linear"
            )
            return
        shape = (self.out_features, self.in_features)
        if isinstance(weight, Tensor) and weight.shape == shape and self.weight.dim() == 4:
            state_dict[name] = packed(weight.to("cpu").contiguous())
        if isinstance(scale, Tensor):
            try:
                state_dict[scale_name] = self._fitted(scale)
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}")
                return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if not self.weight.is_meta:  # assign=True takes the tensor as it is, and its requires_grad
            self.weight.requires_grad_(False)
            self._arrange()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self.granularity!r}"
