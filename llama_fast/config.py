"""A Llama's configuration as a frozen dataclass, and its translation from Hugging Face's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_json
from .hub import resolve
from .rope_scaling import (
    RopeFunction,
    RopeScaling,
    count,
    flag,
    is_int,
    positive,
    read_scaling,
    shown,
)

RECIPES = ("fp8", "fp8_all", "fp8_ffn")  # of quantize; checkpoint.weights.is_quantized has each
_MAX_HEAD_DIM = 256  # the attention kernels keep a head in registers


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
    rope_scaling: RopeScaling | RopeFunction | None = None
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
            count(name, getattr(self, name))
        positive("rope_theta", self.rope_theta)
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta: got {self.rope_theta!r}, want more than 1")
        positive("rms_norm_eps", self.rms_norm_eps)
        flag("tie_word_embeddings", self.tie_word_embeddings)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}, want a divisor of "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.head_dim % 4 or not 8 <= self.head_dim <= _MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim: got {self.head_dim}, want a multiple of 4 from 8 to {_MAX_HEAD_DIM}"
            )
        if not isinstance(self.rope_scaling, (RopeScaling, RopeFunction, type(None))):
            got = type(self.rope_scaling).__name__
            raise ValueError(f"rope_scaling: got {got}, want a RopeScaling, RopeFunction or None")
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_id),
        ):
            if not isinstance(ids, tuple):
                raise ValueError(f"{name}: got {type(ids).__name__}, want a tuple of token ids")
            for token in ids:
                fits = is_int(token) and 0 <= int(token or 0) < 2**31
                if not fits and (token is not None or name == "eos_token_id"):
                    raise ValueError(f"{name}: got {shown(token)}, want a token id")

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
        """Read path/config.json, and the stop ids in path/generation_config.json if it exists. If
        path is a GGUF file, read its metadata. path may be an id of the Hub (hub.resolve)."""
        path = resolve(path)
        if is_gguf(path):
            from .checkpoint.gguf_file import read_config

            return cls._from_file(Path(path), read_config(Path(path)))
        check_folder(Path(path))
        file = Path(path) / "config.json"
        fields = read_json(file)
        generation = Path(path) / "generation_config.json"
        if generation.exists():
            eos = read_json(generation).get("eos_token_id")
            if eos is not None:
                fields["eos_token_id"] = eos
        return cls._from_file(file, fields)

    @classmethod
    def _from_file(cls, file: Path, fields: Mapping[str, Any]) -> LlamaConfig:
        try:
            return cls.from_hf(fields)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_hf(cls, config: Any) -> LlamaConfig:
        """Convert a transformers config, or a dict like its config.json.

        Raises ValueError for a setting that would compute something other than Llama 3.1 does.
        """
        if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
            got = type(config).__name__
            raise TypeError(f"config: got {got}, want a transformers config or a dict")
        hf: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        for name, wanted in _REQUIRED.items():
            got = hf.get(name, wanted)
            if got != wanted or type(got) is not type(wanted):
                raise ValueError(f"{name}: got {shown(got)}, want {wanted!r}")
        for name in ("vocab_size", "hidden_size", "num_attention_heads"):
            if name not in hf:
                raise ValueError(f"{name}: missing from the model's config")
            count(name, hf[name])
        heads = hf["num_attention_heads"]
        positions = hf.get("max_position_embeddings", 2048)
        theta, scaling = read_scaling(hf, positions)
        eos = _or(hf.get("eos_token_id"), ())
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf.get("intermediate_size", 11008),
            num_hidden_layers=hf.get("num_hidden_layers", 32),
            num_attention_heads=heads,
            num_key_value_heads=_or(hf.get("num_key_value_heads"), heads),
            head_dim=_or(hf.get("head_dim"), hf["hidden_size"] // heads),
            max_position_embeddings=positions,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=_or(hf.get("tie_word_embeddings"), False),
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


def is_gguf(path: str | Path) -> bool:
    return Path(path).suffix == ".gguf" and Path(path).is_file()


def check_folder(folder: Path) -> None:
    """Raise ValueError for a checkpoint in another format, with the way to load it, and OSError for
    what is neither a folder nor a GGUF file."""
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"{folder}: not a folder, nor a .gguf file")
        return
    if (folder / "config.json").exists():
        return
    if (folder / "params.json").exists() or any(folder.glob("consolidated.*.pth")):
        raise ValueError(f"{folder}: {META}")
    if named := sorted(folder.glob("*.gguf")):
        raise ValueError(f"{folder}: has no config.json, but GGUF files; name one, as {named[0]}")


# The script is in transformers' repository, not in its wheel.
META = (
    "holds weights in Meta's format (consolidated.*.pth, params.json), pickles that run code when "
    "opened; convert them where you trust them with transformers' "
    "src/transformers/models/llama/convert_llama_weights_to_hf.py: python "
    "convert_llama_weights_to_hf.py --input_dir IN --output_dir OUT --llama_version 3.1"
)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
