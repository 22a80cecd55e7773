"""Other libraries' kernels and models for the same jobs, if they are installed.

`wanted` lists the peers that can run; `Peer.ops` returns runs of a case, and `Peer.models` models.
A peer is imported on first use. Its module has OPS, which maps an op to a function from a case's
inputs to runs by label, and may have models(hf_model, device).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..timing import Run

CHUNK = 512  # tokens of a context that a model processes at once, if that can be set
Ops = Mapping[str, Callable[..., Mapping[str, Run]]]  # op -> a case's inputs by name -> runs


class Unsupported(Exception):
    """The peer, or its installed version, does not support a shape, dtype or device."""


class ModelPeer(ABC):
    """One loaded model. Tokens are [B, S] int64; B is 1 on a CPU."""

    label: str  # the peer's name and variant, as "llama.cpp Q8_0"

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Return [1, S, vocab] fp32, on the CPU."""

    @abstractmethod
    def after(self, context: Tensor, tokens: Tensor, times: int) -> Run:
        """Process the context [B, C], which may be empty, and return a run that processes tokens
        after it, all at once, `times` times in a row, and returns the last token's logits. Rounds
        are equal, whatever else ran on the same context. Jobs on the same context share a cache,
        since a long one takes minutes to read."""

    def extend(self, context: Tensor, tokens: Tensor) -> Run:
        return self.after(context, tokens, 1)

    def decode(self, context: Tensor, steps: int) -> Run:
        """Return a run of `steps` decoding steps, which all read the context's last token."""
        return self.after(context, context[:, -1:], steps)

    @abstractmethod
    def weight_bytes(self) -> int:
        """Return the bytes of the weights that every token reads, without the embedding."""

    @abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True)
class Peer:
    name: str
    package: str  # on PyPI; its version is reported
    devices: tuple[str, ...]  # device types
    adapter: str  # the module of this package that drives it
    modules: tuple[str, ...]  # the modules that it needs
    install: str = "pip install 'llama_fast[peers]'"
    at_least: str = ""  # the oldest version that the adapter fits
    only_named: bool = False  # runs only if it is asked for by name

    def missing(self) -> str | None:
        """Return why it cannot run here, or None, without importing it."""
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                package = self.package if module == self.modules[0] else module
                return f"{package} is not installed: {self.install}"
        found = self.version()
        if found is not None and _numbers(found) < _numbers(self.at_least):
            return f"{self.package} {found} is installed, at least {self.at_least} is wanted"
        return None

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def ops(self, op: str, inputs: Mapping[str, Any]) -> Mapping[str, Run]:
        """Return runs of an op by label, none if it has no such op. Raises Unsupported."""
        make = self._adapter().OPS.get(op)
        return make(**inputs) if make else {}

    def models(self, hf_model: Any, device: torch.device) -> Iterator[ModelPeer]:
        """Yield a model of hf_model's weights in each form that the peer has. hf_model stays as it
        is."""
        if device.type not in self.devices:
            raise Unsupported(f"{self.name} is driven on {self.devices[0]} only, not on {device}")
        make = getattr(self._adapter(), "models", None)
        return make(hf_model, device) if make else iter(())

    def _adapter(self) -> Any:
        return importlib.import_module(f".{self.adapter}", __package__)


def _numbers(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers: "0.3.36+cpu" -> (0, 3, 36)."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


_CPU, _CUDA = ("cpu",), ("cuda",)
_BUILD, _GPU = "pip install flash-attn --no-build-isolation", "pip install 'llama_fast[peers-gpu]'"
_LLAMA, _IK = ("llama_cpp", "gguf"), ("ik_llama_cpp", "gguf")
_HF = ("transformers",)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("llama.cpp", "llama-cpp-python", _CPU, "llamacpp", _LLAMA, at_least="0.3.36"),
        Peer("ik_llama.cpp", "ik-llama-cpp-python", _CPU, "ik_llamacpp", _IK, at_least="0.1.5"),
        Peer("openvino", "openvino", _CPU, "openvino_model", ("openvino", "nncf")),
        Peer("liger-kernel", "liger-kernel", _CUDA, "liger", ("liger_kernel",)),
        Peer("flash-attn", "flash-attn", _CUDA, "flash_attention", ("flash_attn",), _BUILD),
        Peer("flashinfer", "flashinfer-python", _CUDA, "flash_infer", ("flashinfer",), _GPU),
        Peer("torchao", "torchao", _CPU + _CUDA, "ao", ("torchao",)),
        Peer("accelerate", "llama_fast", _CPU + _CUDA, "accelerated", _HF, only_named=True),
    )
}


def wanted(names: Sequence[str] | None, device: str) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers that can run on that type of device, in PEERS' order, and why others cannot.

    names None: all that can run but those of only_named. Raises ValueError for a name that is not
    in PEERS or that cannot run here.
    """
    if unknown := [name for name in names or () if name not in PEERS]:
        raise ValueError(f"peers: got {', '.join(unknown)}, want some of {', '.join(PEERS)}")
    asked = {
        n: peer
        for n, peer in PEERS.items()
        if (not peer.only_named if names is None else n in names)
    }
    skipped: dict[str, str] = {}
    for name, peer in asked.items():
        elsewhere = f"runs on {' and '.join(peer.devices)} only, not on {device}"
        if why := peer.missing() if device in peer.devices else elsewhere:
            skipped[name] = why
    if names is not None and skipped:
        raise ValueError("; ".join(f"peer {name}: {why}" for name, why in skipped.items()))
    return [peer for name, peer in asked.items() if name not in skipped], skipped
