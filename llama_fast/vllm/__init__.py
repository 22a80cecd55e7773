"""The plugin for vLLM (entry point vllm.general_plugins): Llama on CPUs with our kernels.

vLLM calls register() in each of its processes. docs/vllm.md lists what is served.
"""

from __future__ import annotations

import os
from importlib import import_module

try:
    import vllm
except ModuleNotFoundError as error:
    if error.name != "vllm":
        raise
    raise ImportError("llama_fast.vllm: needs vLLM: pip install 'llama_fast[vllm]'") from None

from vllm.logger import init_logger

from .. import _cpu

SWITCH = "LLAMA_FAST_VLLM"
logger = init_logger("vllm.llama_fast")
_registered: set[str] = set()


def register() -> None:
    """Register the kernels with vLLM, unless LLAMA_FAST_VLLM=0 or vLLM serves another device.

    Raises ValueError for another value of LLAMA_FAST_VLLM than 0 and 1. Where this vLLM lacks a
    hook of the tested version, it warns, and vLLM's own layers stay.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH}: got {switch!r}, want 0 or 1")
    if switch == "0":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        name = current_platform.device_name
        logger.warning("llama_fast: its kernels for vLLM are for CPUs; %s is left to vLLM", name)
        return
    for part in ("layers", "linear", "attention"):
        if part in _registered:  # vLLM may load plugins more than once
            continue
        try:
            import_module(f"{__name__}.{part}").register()
            _registered.add(part)
        except (ImportError, AttributeError, KeyError) as error:
            message = "llama_fast: vLLM %s keeps its own %s: %r"
            logger.warning(message, vllm.__version__, part, error)
    served = ", ".join(sorted(_registered))
    logger.info("llama_fast: serves vLLM's %s (%s); %s=0 prevents it", served, _cpu.isa(), SWITCH)
