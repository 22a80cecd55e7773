"""Rope types: how a model stretches its rotary frequencies beyond its first context length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MAX_INT = 2**63 - 1  # of a tensor's dimension
_FP32 = (2.0**-126, 2.0**128)  # its normal numbers: a smaller one may become 0, a greater infinity


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Return a value for a message, cut to a line: a config may hold megabytes. Python refuses to
    print very large integers."""
    try:
        text = repr(value)
    except ValueError:
        bits = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        text = f"<{type(value).__name__}{bits}>"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def count(name: str, value: Any) -> None:
    if not is_int(value) or not 0 < value <= _MAX_INT:
        raise ValueError(f"{name}: got {shown(value)}, want a positive integer of at most 63 bits")


def positive(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not _FP32[0] <= value < _FP32[1]:
        raise ValueError(f"{name}: got {shown(value)}, want a positive number in fp32's range")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {shown(value)}, want true or false")


def at_least_1(name: str, value: Any) -> None:
    positive(name, value)
    if value < 1:
        raise ValueError(f"{name}: got {value!r}, want at least 1")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary wavelengths beyond the original context length."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        at_least_1("rope_scaling.factor", self.factor)
        for name in ("low_freq_factor", "high_freq_factor"):
            positive(f"rope_scaling.{name}", getattr(self, name))
        count(
            "rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor: got {self.high_freq_factor}, "
                f"want more than low_freq_factor, {self.low_freq_factor}"
            )


# What the functions of transformers' ROPE_INIT_FUNCTIONS read from rope_parameters.
_ROPE_FIELDS = {
    "factor": at_least_1,
    "original_max_position_embeddings": count,
    "attention_factor": positive,
    "beta_fast": positive,
    "beta_slow": positive,
    "mscale": positive,
    "mscale_all_dim": positive,
    "truncate": flag,
}


@dataclass(frozen=True)
class RopeFunction:
    """The frequencies of one of transformers' ROPE_INIT_FUNCTIONS: "linear", "yarn" or "dynamic".

    "dynamic" depends on the length of the text once that exceeds max_position_embeddings; a table
    of that many positions or fewer has plain frequencies, as in transformers. With a KV cache, keys
    stay as they were rotated when the text was shorter, also as there.
    """

    rope_type: str
    parameters: tuple[tuple[str, Any], ...]  # those of rope_parameters
    max_position_embeddings: int  # of the checkpoint; LlamaConfig's is larger for "dynamic"

    TYPES = ("linear", "dynamic", "yarn")

    def __post_init__(self) -> None:
        if self.rope_type not in self.TYPES:
            raise ValueError(f"rope_type: got {shown(self.rope_type)}, want one of {self.TYPES}")
        held = {"factor": None, **dict(self.parameters)}
        for name, check in _ROPE_FIELDS.items():
            if name in held:
                check(f"rope_parameters.{name}", held[name])

    @property
    def longest_text(self) -> int:
        """Return the positions that the frequencies can serve: "dynamic" stretches them by factor,
        while other types' factors are already in max_position_embeddings."""
        factor = dict(self.parameters)["factor"] if self.rope_type == "dynamic" else 1
        return max(int(self.max_position_embeddings * factor), self.max_position_embeddings)

    def frequencies(self, theta: float, head_dim: int, positions: Any) -> tuple[Any, float]:
        """Return frequencies in radians per token, fp32 [head_dim / 2] on the host, for texts of up
        to that many positions, and the factor of cosines and sines. positions may also be int64
        [n, 1]: the lengths of n texts, for frequencies [n, head_dim / 2]. Needs transformers."""
        import torch

        try:
            from transformers import LlamaConfig as HFConfig
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        except ImportError:
            raise ImportError(
                f"rope type {self.rope_type!r} needs transformers: pip install 'llama_fast[hf]'"
            ) from None
        hf = HFConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=theta,
        )
        parameters = {"rope_type": self.rope_type, **dict(self.parameters)}
        parameters.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        if hasattr(hf, "rope_parameters"):  # transformers 5
            hf.rope_parameters = {**parameters, "rope_theta": theta}
        else:
            hf.rope_scaling = parameters
        with torch.device("cpu"):
            return ROPE_INIT_FUNCTIONS[self.rope_type](hf, torch.device("cpu"), seq_len=positions)


def read_scaling(
    hf: Mapping[str, Any], positions: int
) -> tuple[float, RopeScaling | RopeFunction | None]:
    """Return theta and scaling. transformers 5 writes rope_parameters, which contains theta; 4.x
    writes rope_theta and rope_scaling."""
    given = [hf[n] for n in ("rope_parameters", "rope_scaling") if hf.get(n) not in (None, {})]
    rope = given[0] if given else {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters: got {type(rope).__name__}, want an object")
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        got = rope["partial_rotary_factor"]
        raise ValueError(f"rope_parameters.partial_rotary_factor: got {shown(got)}, want 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind in RopeFunction.TYPES:
        held = tuple((name, rope[name]) for name in _ROPE_FIELDS if rope.get(name) is not None)
        return theta, RopeFunction(kind, held, positions)
    if kind != "llama3":
        wanted = ("default", "llama3", *RopeFunction.TYPES)
        raise ValueError(f"rope_parameters.rope_type: got {shown(kind)}, want one of {wanted}")
    fields = tuple(RopeScaling.__dataclass_fields__)
    missing = [name for name in fields if name not in rope]
    if missing:
        raise ValueError(f"rope_parameters.{missing[0]}: missing from the model's config")
    return theta, RopeScaling(**{name: rope[name] for name in fields})
