"""Launch Triton kernels; re-exports chip.py (chips, recording) and tuning.py (the Tuner).

A launcher fills outputs that the caller allocated, for inputs that the caller checked. It asks its
Tuner for a Config and calls launch(). No launcher or kernel synchronizes with the device, so every
launcher can be captured in a CUDA graph.
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
    "padded_dim",
    "programs",
    "record",
    "save_choices",
    "tuning",
    "wide_row_configs",
]

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FP8_MAX: tl.constexpr = tl.constexpr(448.0)
FP8_TINY: tl.constexpr = tl.constexpr(5.266214691683848e-36)  # its scale is the smallest normal one

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2


def programs(work: int, slots: int) -> int:
    """Return the size of a persistent grid for `work` items: the fewest programs that need no more
    rounds than `slots` programs would, so that the last round is full."""
    return cdiv(work, cdiv(work, slots)) if work else 0


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any
) -> None:
    """Launch kernel[grid] with the arguments, the constants and the config's constants, on the
    device and the current stream of the first tensor argument. A grid with a zero launches nothing:
    on a GPU it would leave an error that the next call reports."""
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
            # Explicit: Triton 3.9 warns that its default will change. Constants may override it.
            **{"enable_fp_fusion": True, **constants},
        )


def padded_dim(d: int) -> int:
    """Return the head_dim of tiles: a power of two, at least 16 for matrix instructions."""
    return max(16, next_power_of_2(d))


def wide_row_configs(chip: Chip, itemsize: int) -> list[Config]:
    """Return configurations for rows that do not fit in registers: one program of 1024 threads an
    SM reads two inputs in pieces of 8192 columns, with three pieces in flight, or as many as fit
    the shared memory."""
    stages = [s for s in (4, 3, 2) if (s - 1) * 2 * 8192 * itemsize + 1024 <= chip.shared_memory]
    return [
        Config.of(1024 // chip.warp_size, 1, BLOCK=8192, PER_SM=1, STAGES=s) for s in stages or [1]
    ]


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    for argument in arguments:
        base = getattr(argument, "base", argument)  # a TensorDescriptor's tensor
        if isinstance(base, Tensor):
            return base
    raise TypeError("launch: want a tensor among the arguments")
