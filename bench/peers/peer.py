"""What a peer is: a library with kernels for the same job, run beside ours if it is installed."""

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

Inputs = Mapping[str, Any]  # one case's tensors, by name
CHUNK = 512  # tokens of a context that a model processes at once, where it has a choice


class Unsupported(Exception):
    """What a peer does not offer for a shape, a dtype, a device or in its version: the reason."""


class ModelPeer(Protocol):
    """One loaded model. Tokens are [B, S] int64; B is 1 on a CPU."""

    label: str  # its name and what differs, "llama.cpp Q8_0"

    def logits(self, tokens: Tensor) -> Tensor:
        """Return [1, S, vocab] fp32, on the CPU."""

    def extend(self, context: Tensor, tokens: Tensor) -> Run:
        """Make a run that processes tokens, at once, after the context [B, C], which may be empty
        and is processed here and now; it returns the last token's logits. Rounds are alike,
        whatever ran on the same context in between."""

    def decode(self, context: Tensor, steps: int) -> Run:
        """Make a run that decodes `steps` single tokens after context, its last one again and
        again, and returns the last step's logits; otherwise as extend."""

    def weight_bytes(self) -> int:
        """Count the weights that every token passes through; the embedding is only looked up."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Peer:
    name: str
    package: str  # what pip installs, and whose version is stated
    devices: tuple[str, ...]  # device types
    adapter: str  # the module of this package that drives it
    modules: Mapping[str, str]  # what has to be importable: module -> the package it comes with
    install: str = "pip install 'llama_fast[peers]'"
    at_least: str = ""  # the version below which the adapter does not fit

    def missing(self) -> str | None:
        """Say why it cannot be run here, or None. Imports nothing."""
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
        """Label -> run(i), none where it has no such op. Raises Unsupported where it refuses."""
        make = self._adapter().OPS.get(op)
        return make(inputs) if make else {}

    def models(self, hf_model: Any, config: Any, device: torch.device) -> Iterator[ModelPeer]:
        """Load hf_model's weights in each form the peer has, one after the other. hf_model itself
        is left as it is."""
        if device.type not in self.devices:
            raise Unsupported(f"{self.name} is driven on {self.devices[0]} only, not on {device}")
        make = getattr(self._adapter(), "models", None)
        return make(hf_model, config, device) if make else iter(())

    def _adapter(self) -> Any:
        return importlib.import_module(f".{self.adapter}", __package__)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers: "0.3.36+cpu" -> (0, 3, 36)."""
    found = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)
