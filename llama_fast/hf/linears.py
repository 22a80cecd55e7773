"""Linear layers of an accelerated model: packed weights, and several layers fused into one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.weights import packable, packed
from ..nn import FP8Linear
from ..nn.linear import dense
from ..ops.checks import ACTIVATIONS
from ..ops.linear import fp8_linear, linear
from ..reference import unpack_weight


def trained(weight: Tensor) -> bool:
    """Return whether autograd records operations on a weight."""
    return torch.is_grad_enabled() and weight.requires_grad


class PackedLinear(nn.Linear):
    """An nn.Linear whose weight is in the order that a CPU reads fastest.

    Made of an nn.Linear by `pack`: the same module and the same Parameter. state_dict() returns the
    plain order, and load_state_dict() takes it. Where autograd records operations on the Parameter,
    and in training mode, it returns to the plain order and stays there: gradients and optimizers
    see [N, K]. A frozen one stays packed, and gradients flow through it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if trained(self.weight):
            self.unpack()
        elif x.dtype == self.weight.dtype and x.dtype in ACTIVATIONS:
            return linear(dense(x), self.weight, self.bias)
        return F.linear(x, unpack_weight(self.weight), self.bias)

    def unpack(self) -> None:
        if self.weight.dim() == 4 and not torch.compiler.is_compiling():
            _say_once()
            self.weight.data = unpack_weight(self.weight.data)

    def train(self, mode: bool = True) -> PackedLinear:
        if mode and self.weight.requires_grad and self.weight.dim() == 4:
            self.weight.data = unpack_weight(self.weight.data)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        if self.weight.dim() == 4 and self.weight.device.type not in ("cpu", "meta"):
            self.weight.data = unpack_weight(self.weight.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.dim() == 4:
            destination[f"{prefix}weight"] = unpack_weight(destination[f"{prefix}weight"])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        name = f"{prefix}weight"
        weight = state_dict.get(name)
        if self.weight.dim() == 4 and isinstance(weight, Tensor) and weight.dim() == 2:
            state_dict[name] = packed(weight.to(self.weight).contiguous())
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def pack(module: nn.Linear, allowed: bool = True) -> None:
    """Make an nn.Linear a PackedLinear, and pack its weight if allowed, unless it is trained."""
    module.__class__ = PackedLinear
    if not allowed or (module.training and module.weight.requires_grad):
        return
    if module.weight.dim() == 2:
        module.weight.data = packed(module.weight.data.contiguous())


def packable_together(parts: list[nn.Module]) -> bool:
    """Return whether all can be packed, so that they can be fused."""
    return all(
        isinstance(p, nn.Linear) and packable(p.out_features, p.in_features, p.weight.device)
        for p in parts
    )


def unpack(module: nn.Linear) -> None:
    """Undo `pack`."""
    # A copy even of a plain weight: it may be a view of a fused one.
    plain = module.weight.data
    module.weight.data = unpack_weight(plain) if plain.dim() == 4 else plain.clone()
    if module.bias is not None:
        module.bias.data = module.bias.data.clone()
    module.__class__ = nn.Linear


class Fused:
    """Linears of one input, computed as one product. Their weights become views of one tensor, so
    there is no second copy, and changing one in place changes the fused weight."""

    def __init__(self, parts: dict[str, Any]) -> None:
        """Fuse parts, for which `why_not` gives no reason."""
        modules: list[Any] = list(parts.values())
        first = modules[0]
        # Parameters, because torch.compile takes their shapes as constants.
        self.weight: Tensor = _constant(_joined([p.weight for p in modules]))
        self.bias: Tensor | None = None
        self.scale: Tensor | None = None
        self.scale_ub = self.quantize_activation = None
        if first.bias is not None:
            self.bias = _constant(_joined([p.bias for p in modules]))
        if isinstance(first, FP8Linear):
            # Views too: load_state_dict copies into a scale in place.
            self.scale = _constant(_joined([p.weight_scale for p in modules]))
            self.scale_ub, self.quantize_activation = first.scale_ub, first.quantize_activation
        self._parts = [(name, part, _pointers(part)) for name, part in parts.items()]
        self.out_features = [p.out_features for p in modules]

    @staticmethod
    def why_not(parts: dict[str, Any]) -> str | None:
        """Return why modules cannot be fused, or None."""
        first = next(iter(parts.values()))
        for name, part in parts.items():
            if type(part) not in (PackedLinear, FP8Linear):
                return f"{name} is {type(part).__name__}"
            if type(part) is not type(first):
                return f"{name} is {type(part).__name__}, and others are not"
            if hooked(part):
                return f"{name} has hooks"
            same = (part.weight.dtype, part.weight.device, part.weight.dim(), part.bias is None)
            if same != (
                first.weight.dtype,
                first.weight.device,
                first.weight.dim(),
                first.bias is None,
            ):
                return f"{name} has another dtype, device, layout or bias"
            if part.weight.is_meta:
                return f"{name} is on the meta device"
            if isinstance(part, FP8Linear) and (
                part.granularity != "row"
                or (part.scale_ub, part.quantize_activation)
                != (first.scale_ub, first.quantize_activation)
            ):
                return f"{name} is not quantized by row"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        x = dense(x)
        if self.scale is None:
            return linear(x, self.weight, self.bias)
        return fp8_linear(
            x,
            self.weight,
            self.scale,
            self.bias,
            quantize_activation=self.quantize_activation,
            scale_ub=self.scale_ub,
        )

    def ready(self, owner: nn.Module, x: Tensor) -> bool:
        """Return whether the product stands for the owner's linears on x now: none is replaced or
        hooked, their weights and biases are still views, and none of them is trained."""
        modules: Any = owner._modules
        tracing = torch.compiler.is_compiling()
        for name, part, pointers in self._parts:
            if modules[name] is not part or hooked(part):
                return False
            if not tracing and _pointers(part) != pointers:
                return False
            weight, bias = part._parameters["weight"], part._parameters["bias"]
            if trained(weight) or (bias is not None and trained(bias)):
                return False
        if self.scale is not None:
            return True
        return x.dtype == self.weight.dtype and x.dtype in ACTIVATIONS

    def unpack(self) -> None:
        """Return the weights to the plain order, for training, as views of one tensor again."""
        if self.scale is not None or self.weight.dim() == 2:
            return
        _say_once()
        # From the parts' own weights, which may have been replaced since they were joined.
        for _, part, _ in self._parts:
            if part.weight.dim() == 4:
                part.weight.data = unpack_weight(part.weight.data)
        if self.why_not({name: part for name, part, _ in self._parts}) is not None:
            return
        self.weight = _constant(_joined([part.weight for _, part, _ in self._parts]))
        self._parts = [(name, part, _pointers(part)) for name, part, _ in self._parts]


def _pointers(linear: nn.Module) -> tuple[int, int | None]:
    weight: Any = linear._parameters["weight"]
    bias = linear._parameters["bias"]
    return weight.data_ptr(), None if bias is None else bias.data_ptr()


def _constant(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenate along dimension 0, and make each tensor a view of the result."""
    sizes = [t.shape[0] for t in tensors]
    whole = tensors[0].data.new_empty((sum(sizes), *tensors[0].shape[1:]))
    for t, part in zip(tensors, whole.split(sizes), strict=True):
        part.copy_(t.data)
        t.data = part
    return whole


def hooked(module: nn.Module) -> bool:
    """Return whether something runs with or in place of the module's forward."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@functools.cache
def _say_once() -> None:
    warnings.warn(
        "llama_fast: autograd records, so weights return to the plain order for good; infer under "
        "torch.no_grad() or torch.inference_mode(), or call requires_grad_(False)",
        stacklevel=4,
    )
