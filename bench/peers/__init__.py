"""Other libraries' kernels and models for the same jobs, if they are installed.

`wanted` lists the peers that can run; `Peer.ops` returns runs of a case, and `Peer.models` models.
A peer is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence

from .peer import Inputs, ModelPeer, Peer, Unsupported

__all__ = ["PEERS", "Inputs", "ModelPeer", "Peer", "Unsupported", "wanted"]

_CPU, _CUDA = ("cpu",), ("cuda",)
_GGUF = {"gguf": "gguf"}
_ALL = (
    Peer(
        "llama.cpp",
        "llama-cpp-python",
        _CPU,
        "llamacpp",
        {"llama_cpp": "llama-cpp-python", **_GGUF},
        at_least="0.3.36",
    ),
    Peer(
        "ik_llama.cpp",
        "ik-llama-cpp-python",
        _CPU,
        "ik_llamacpp",
        {"ik_llama_cpp": "ik-llama-cpp-python", **_GGUF},
        at_least="0.1.5",
    ),
    Peer("openvino", "openvino", _CPU, "openvino_model", {"openvino": "openvino", "nncf": "nncf"}),
    Peer("liger-kernel", "liger-kernel", _CUDA, "liger", {"liger_kernel": "liger-kernel"}),
    Peer(
        "flash-attn",
        "flash-attn",
        _CUDA,
        "flash_attention",
        {"flash_attn": "flash-attn"},
        install="pip install flash-attn --no-build-isolation",
    ),
    Peer(
        "flashinfer",
        "flashinfer-python",
        _CUDA,
        "flash_infer",
        {"flashinfer": "flashinfer-python"},
        install="pip install 'llama_fast[peers-gpu]'",
    ),
    Peer(
        "transformers + llama_fast",
        "transformers",
        (*_CPU, *_CUDA),
        "accelerated",
        {"transformers": "transformers"},
        install="pip install 'llama_fast[hf]'",
    ),
    Peer("torchao", "torchao", (*_CPU, *_CUDA), "ao", {"torchao": "torchao"}),
)
PEERS = {peer.name: peer for peer in _ALL}


def wanted(names: Sequence[str] | None, device: str) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers that can run on that type of device, in PEERS' order, and why others cannot.

    names None: all that can run. Raises ValueError for a name that is not in PEERS or that cannot
    run here.
    """
    unknown = [name for name in names or () if name not in PEERS]
    if unknown:
        raise ValueError(f"peers: got {', '.join(unknown)}, want some of {', '.join(PEERS)}")
    found: list[Peer] = []
    skipped: dict[str, str] = {}
    for name, peer in PEERS.items():
        if names is not None and name not in names:
            continue
        elsewhere = f"runs on {' and '.join(peer.devices)} only, not on {device}"
        why = peer.missing() if device in peer.devices else elsewhere
        if why is None:
            found.append(peer)
        else:
            skipped[name] = why
    if names is not None and skipped:
        raise ValueError("; ".join(f"peer {name}: {why}" for name, why in skipped.items()))
    return found, skipped
