"""What a Llama holds, where it comes from (files, random numbers, transformers) and moves to."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

import torch

from .chat import load_tokenizer
from .checkpoint import modules
from .checkpoint.load import load
from .checkpoint.weights import DTYPES, RandomSource, Weights, assemble, moved
from .config import LlamaConfig
from .generation.decode import Decoder
from .hub import resolve
from .parallel import Group, Share, vocab_sizes
from .rope_tables import RopeTables

Self = TypeVar("Self", bound="Pretrained")


class Pretrained:
    def __init__(self, config: LlamaConfig, weights: Weights, tp: Group | None = None) -> None:
        """config: of the whole model. weights: those of this rank. tp: the ranks that hold the
        model; None: this process alone. self.config then has this rank's heads and inner width."""
        self.tp = tp or Group()
        share = Share.of(config, self.tp.rank, self.tp.size)
        self.config, self.weights = share.config(config), weights
        self.first_token = share.vocab.start  # of this rank's part of the vocabulary
        self.vocab_sizes = vocab_sizes(config.vocab_size, self.tp.size)
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self.rope = RopeTables(config, self.device)
        self.decoders: list[Decoder] = []  # idle, for the next call of generate
        self.path: str | Path | None = None  # of the checkpoint, for the tokenizer

    def __repr__(self) -> str:
        linears, config = self.weights.linears, self.config
        fp8 = sum(linear.scale is not None for linear in linears)
        kinds = f"{str(self.dtype).removeprefix('torch.')}"
        kinds += f" with FP8 in {fp8} of {len(linears)} linear products" if fp8 else ""
        return (
            f"Llama({config.num_hidden_layers} layers, {self.weights.parameters:,} parameters, "
            f"{kinds}, {self.weights.nbytes:,} bytes on {self.device})"
        )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Return the checkpoint's tokenizer, see chat.load_tokenizer; None for a model that
        from_pretrained did not load."""
        return None if self.path is None else load_tokenizer(self.path)

    def to(self: Self, *targets: Any, device: Any = None, dtype: Any = None) -> Self:
        """Move the weights to a device, cast them to a dtype, or both, in place, and return self:
        to("cuda"), to(torch.float16), to("cuda", torch.float16). FP8 weights keep their bits."""
        for target in targets:
            named = getattr(torch, target, None) if isinstance(target, str) else target
            if isinstance(named, torch.dtype):
                dtype = named
            else:
                device = target
        dtype, device = _checked(
            self.dtype if dtype is None else dtype,
            self.device if device is None else device,
            self.tp,
        )
        self.weights = moved(self.weights, device, dtype)
        self.rope = RopeTables(self.config, device)
        self.dtype, self.device = self.weights.embedding.dtype, self.weights.embedding.device
        self.decoders.clear()
        return self

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path: str | Path,
        dtype: torch.dtype | str = torch.bfloat16,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        *,
        progress: bool | None = None,
        tp: Group | None = None,
    ) -> Self:
        """Load a folder in Hugging Face's format, config.json and safetensors, or a GGUF file.

        path: also the id of a model on the Hub, "owner/name" or "owner/name@revision"; a folder of
        that name wins. See hub.resolve for its cache, downloads and errors.
        dtype: bfloat16, float16 or float32, or its name. quantize: "fp8" for every linear layer but
        the head, "fp8_all" with the head, "fp8_ffn" for Meta's 405B recipe; weights that the
        checkpoint holds in FP8 stay as they are. progress: whether to show a bar on stderr; None:
        if stderr is a terminal. tp: parallel.join(), to split the model among the processes that
        torchrun started; each then reads only its part of the files, to its own device. Raises
        OSError or ValueError that names the fault in the files; with tp, on all ranks if on one
        (Group.together).
        """
        tp = tp or Group()
        with tp.together() as check:
            path = resolve(path, weights=True)
            config = LlamaConfig.from_pretrained(path)
            check(config=config, dtype=dtype, quantize=quantize)
            dtype, device = _checked(dtype, device, tp)
            weights = load(
                path,
                config,
                dtype=dtype,
                quantize=quantize,
                device=device,
                progress=progress if tp.rank == 0 else False,
                share=Share.of(config, tp.rank, tp.size),
                check_in=check,
            )
        model = cls(config, weights, tp)
        model.path = path
        return model

    @classmethod
    def from_transformers(
        cls: type[Self],
        model: Any,
        dtype: torch.dtype | str | None = None,
        quantize: str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Copy a LlamaForCausalLM of transformers; no memory is shared. dtype and device: None:
        the model's. quantize: as for from_pretrained; lf.nn.FP8Linear, which LlamaFastFP8Config and
        accelerate(quantize=...) make, keeps its weights. Raises TypeError, ValueError or
        NotImplementedError that names what Llama cannot compute, such as other quantizations and
        adapters that are not merged."""
        config = modules.read_config(model)
        embedding = model.model.embed_tokens.weight
        dtype, device = _checked(dtype or embedding.dtype, device or embedding.device, Group())
        return cls(config, modules.read_weights(model, config, dtype, quantize, device))

    def to_transformers(self) -> Any:
        """Return a LlamaForCausalLM with copies of the weights, bit for bit, whose FP8 layers are
        lf.nn.FP8Linear. Its save_pretrained writes a checkpoint that from_pretrained reads, here
        and (after `import llama_fast.hf`) in transformers. Raises NotImplementedError for a rank's
        part of a model."""
        if self.tp.size > 1:
            raise NotImplementedError(f"tp: got a part of {self.tp.size}, want the whole model")
        return modules.to_transformers(self.config, self.weights)

    @classmethod
    def from_config(
        cls: type[Self],
        config: LlamaConfig,
        seed: int = 0,
        *,
        dtype: torch.dtype | str = torch.bfloat16,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        tp: Group | None = None,
    ) -> Self:
        """Make random weights, for benchmarks. Activations have the scale of a trained model's. tp:
        as for from_pretrained; each rank draws its own part, so another number of ranks gives
        another model."""
        tp = tp or Group()
        dtype, device = _checked(dtype, device, tp)
        share = Share.of(config, tp.rank, tp.size)
        source = RandomSource(seed, dtype, device, None if tp.size == 1 else tp.rank)
        return cls(config, assemble(config, source, quantize, share=share), tp)


def _checked(
    dtype: torch.dtype | str, device: torch.device | str | None, tp: Group
) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device. Raises ValueError for others than Llama computes in, and for a
    device that this machine lacks."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, want bfloat16, float16 or float32")
    if tp.device is not None:
        if device is not None and torch.device(device) not in (
            tp.device,
            torch.device(tp.device.type),
        ):
            raise ValueError(f"device: got {device}, want None or the group's, {tp.device}")
        return found, tp.device
    return found, torch.get_default_device() if device is None else torch.device(device)
