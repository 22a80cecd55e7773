"""What the Triton kernels share: the chip at hand, a launch, and how a configuration is chosen.

A launcher receives tensors whose shapes are already checked and outputs that exist, and fills
the outputs. It asks its Tuner for a Config and calls launch(). Nothing here or in a kernel
synchronises with the device, so every launcher can be captured in a CUDA graph.

Here are launch() and the constants; chip.py has the chip and recording, tuning.py the Tuner.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .chip import CHIPS, INTERPRETED, Chip, Config, Launch, Recording, chip_of, on_device, record
from .chip import recorded as _recorded
from .tuning import Key, Tuner, file_name, force, key_text, load_choices, save_choices, tuning

__all__ = [
    "CHIPS",
    "FP8_MAX",
    "FP8_TINY",
    "INTERPRETED",
    "LOG2E",
    "Chip",
    "Config",
    "Key",
    "Launch",
    "Recording",
    "Tuner",
    "cdiv",
    "chip_of",
    "file_name",
    "force",
    "key_text",
    "launch",
    "load_choices",
    "next_power_of_2",
    "programs",
    "record",
    "save_choices",
    "tuning",
]

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FP8_MAX: tl.constexpr = tl.constexpr(448.0)
FP8_TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # fp32's smallest normal number

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2


def programs(work: int, slots: int) -> int:
    """How many programs of a persistent grid share work items, at most slots: as few as finish in
    the same number of rounds, so that the last round is full."""
    return cdiv(work, cdiv(work, slots)) if work else 0


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any
) -> None:
    """kernel[grid](*arguments, **constants, **config's), on the device and the current stream of
    the first tensor among the arguments. A grid with a zero launches nothing: on a GPU it would
    leave an error for the next call to trip over."""
    if 0 in grid:
        return
    if (recording := _recorded()) is not None:
        recording.launches.append(Launch(kernel, grid, arguments, constants, config))
        return
    with on_device(_first_tensor(arguments)):
        kernel[grid](
            *arguments,
            **dict(config.constants),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # Triton 3.9 warns that its default will change; a kernel may say otherwise.
            **{"enable_fp_fusion": True, **constants},
        )


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    for argument in arguments:
        base = getattr(argument, "base", argument)  # of a TensorDescriptor
        if isinstance(base, Tensor):
            return base
    raise TypeError("launch: want a tensor among the arguments")
