"""The plugin for vLLM (entry point vllm.general_plugins): Llama on CPUs with our kernels.

vLLM calls register() in each of its processes. docs/vllm.md lists what is served.
"""

from __future__ import annotations

import os

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


def register() -> None:
    """Register the kernels with vLLM, unless LLAMA_FAST_VLLM=0 or vLLM serves another device.

    Raises ValueError for another value of LLAMA_FAST_VLLM than 0 and 1. A vLLM without the hooks of
    the tested version runs unchanged, with a warning.
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
    try:
        from . import attention, layers, linear
    except (ImportError, AttributeError) as error:
        logger.warning("llama_fast: vLLM %s is left unchanged: %s", vllm.__version__, error)
        return
    for part in (layers, linear, attention):
        part.register()
    logger.info("llama_fast: serves vLLM's CPU layers (%s); %s=0 prevents it", _cpu.isa(), SWITCH)
