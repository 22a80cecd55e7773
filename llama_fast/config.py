"""A Llama's configuration as a frozen dataclass, and its translation from Hugging Face's config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_HEAD_DIM = 256  # the attention kernels keep a head in registers


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(name: str, value: Any) -> None:
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name}: got {value!r}, want a positive integer")


def _positive(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: got {value!r}, want a positive number")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary wavelengths beyond the original context length."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _positive(f"rope_scaling.{name}", getattr(self, name))
        _count(
            "rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor: got {self.high_freq_factor}, "
                f"want more than low_freq_factor, {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Fields are named as in Hugging Face's config. dataclasses.replace validates them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 131072
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 128000
    eos_token_id: tuple[int, ...] = ()  # generation stops on any of them

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            _count(name, getattr(self, name))
        _positive("rope_theta", self.rope_theta)
        _positive("rms_norm_eps", self.rms_norm_eps)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}, want a divisor of "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.head_dim % 8 or self.head_dim > _MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim: got {self.head_dim}, want a multiple of 8 up to {_MAX_HEAD_DIM}"
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            got = type(self.rope_scaling).__name__
            raise ValueError(f"rope_scaling: got {got}, want a RopeScaling or None")
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_id),
        ):
            if not isinstance(ids, tuple):
                raise ValueError(f"{name}: got {type(ids).__name__}, want a tuple of token ids")
            for token in ids:
                if token is not None and (not _is_int(token) or token < 0):
                    raise ValueError(f"{name}: got {token!r}, want a token id")

    @classmethod
    def llama_3_1_8b(cls) -> LlamaConfig:
        return cls(**_llama_3_1(4096, 14336, 32, 32))

    @classmethod
    def llama_3_1_70b(cls) -> LlamaConfig:
        return cls(**_llama_3_1(8192, 28672, 80, 64))

    @classmethod
    def llama_3_1_405b(cls) -> LlamaConfig:
        return cls(**_llama_3_1(16384, 53248, 126, 128))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> LlamaConfig:
        """Read path/config.json, and the stop ids of path/generation_config.json if it exists."""
        fields = read_json(Path(path) / "config.json")
        generation = Path(path) / "generation_config.json"
        if generation.exists():
            eos = read_json(generation).get("eos_token_id")
            if eos is not None:
                fields["eos_token_id"] = eos
        return cls.from_hf(fields)

    @classmethod
    def from_hf(cls, config: Any) -> LlamaConfig:
        """Convert a transformers config, or a dict like its config.json.

        Raises ValueError for a setting that would compute something other than Llama 3.1 does.
        """
        hf: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        for name, wanted in _REQUIRED.items():
            if hf.get(name, wanted) != wanted:
                raise ValueError(f"{name}: got {hf[name]!r}, want {wanted!r}")
        for name in ("vocab_size", "hidden_size", "num_attention_heads"):
            if name not in hf:
                raise ValueError(f"{name}: missing from the model's config")
            _count(name, hf[name])
        heads = hf["num_attention_heads"]
        theta, scaling = _rope(hf)
        eos = _or(hf.get("eos_token_id"), ())
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf.get("intermediate_size", 11008),
            num_hidden_layers=hf.get("num_hidden_layers", 32),
            num_attention_heads=heads,
            num_key_value_heads=_or(hf.get("num_key_value_heads"), heads),
            head_dim=_or(hf.get("head_dim"), hf["hidden_size"] // heads),
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        )


# Fields that change the computation, with the only value that this model supports.
_REQUIRED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}


def _llama_3_1(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_scaling": RopeScaling(),
        "eos_token_id": (128001, 128008, 128009),
    }


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling. transformers 5 writes rope_parameters, which contains theta; 4.x
    writes rope_theta and rope_scaling."""
    rope = _or(hf.get("rope_parameters"), _or(hf.get("rope_scaling"), {}))
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters: got {type(rope).__name__}, want an object")
    theta = rope.get("rope_theta", _or(hf.get("rope_theta"), 10000.0))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        got = rope["partial_rotary_factor"]
        raise ValueError(f"rope_parameters.partial_rotary_factor: got {got!r}, want 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_parameters.rope_type: got {kind!r}, want 'llama3' or 'default'")
    fields = tuple(RopeScaling.__dataclass_fields__)
    missing = [name for name in fields if name not in rope]
    if missing:
        raise ValueError(f"rope_parameters.{missing[0]}: missing from the model's config")
    return theta, RopeScaling(**{name: rope[name] for name in fields})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises OSError or ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; want a folder in Hugging Face's format"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, want an object")
    return value


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
