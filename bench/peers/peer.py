"""Define a peer: a library with kernels for the same jobs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..timing import Run

Inputs = Mapping[str, Any]  # one case's tensors by name
CHUNK = 512  # tokens of a context that a model processes at once, if that can be set


class Unsupported(Exception):
    """The peer does not support a shape, dtype or device, or its version does not."""


class ModelPeer(Protocol):
    """One loaded model. Tokens are [B, S] int64; B is 1 on a CPU."""

    label: str  # the peer's name and variant, as "llama.cpp Q8_0"

    def logits(self, tokens: Tensor) -> Tensor:
        """Return [1, S, vocab] fp32, on the CPU."""

    def extend(self, context: Tensor, tokens: Tensor) -> Run:
        """Process the context [B, C], which may be empty, and return a run that processes tokens
        after it, at once, and returns the last token's logits. Its rounds are equal, whatever else
        ran on the same context."""

    def decode(self, context: Tensor, steps: int) -> Run:
        """Return a run that decodes the context's last token `steps` times, one after the other,
        and returns the last step's logits; otherwise like extend."""

    def weight_bytes(self) -> int:
        """Return the bytes of the weights that every token reads, without the embedding."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Peer:
    name: str
    package: str  # on PyPI; its version is reported
    devices: tuple[str, ...]  # device types
    adapter: str  # the module of this package that drives it
    modules: Mapping[str, str]  # modules that it needs -> their packages
    install: str = "pip install 'llama_fast[peers]'"
    at_least: str = ""  # the oldest version that the adapter fits

    def missing(self) -> str | None:
        """Return why it cannot run here, or None, without importing it."""
        for module, package in self.modules.items():
            if importlib.util.find_spec(module) is None:
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

    def ops(self, op: str, inputs: Inputs) -> dict[str, Run]:
        """Return runs of an op by label, none if it has no such op. Raises Unsupported."""
        make = self._adapter().OPS.get(op)
        return make(inputs) if make else {}

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
    found = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)
