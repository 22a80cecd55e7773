"""Compute how many blocks of a kernel fit on one multiprocessor from the resources that it takes.

NVIDIA: registers are allocated per warp, 256 at a time, from a multiprocessor's four files; shared
memory per block, in units of 128 bytes plus 1 KiB for the system. Source: CUDA C++ Programming
Guide, "Compute Capabilities". AMD's CDNA3: 512 vector registers a lane on each of four SIMDs, eight
at a time, eight waves a SIMD; 64 KiB of LDS a compute unit. Source: AMD Instinct MI300 instruction
set architecture.
"""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """One SM, or one of AMD's compute units. Sizes are in bytes."""

    warps: int  # the most that are resident
    blocks: int
    registers: int  # per lane of one of the four files
    register_unit: int  # per lane
    lanes: int
    shared: int
    shared_reserved: int  # per block
    tensor_memory: int = 0  # columns; a block takes a power of two


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 512, 8, 32, 167936, 1024),
    "sm_89": Multiprocessor(48, 24, 512, 8, 32, 102400, 1024),
    "sm_90": Multiprocessor(64, 32, 512, 8, 32, 233472, 1024),
    "sm_100": Multiprocessor(64, 32, 512, 8, 32, 233472, 1024, 512),
    "gfx942": Multiprocessor(32, 16, 512, 8, 64, 65536, 0),
}


class Occupancy(NamedTuple):
    """Resident blocks and warps of a multiprocessor."""

    blocks: int
    warps: int
    limit: str  # the resource that another block would lack: a key of `blocks` below

    def __str__(self) -> str:
        return f"{self.blocks:>2} x {self.warps // max(self.blocks, 1):<3}"


def occupancy(
    arch: str, registers: int, shared: int, threads: int, tensor_memory: int = 0
) -> Occupancy:
    """Return the occupancy. registers: per thread; shared (bytes), threads and tensor_memory
    (columns): per block."""
    m = MULTIPROCESSORS[arch]
    warps = -(-threads // m.lanes)
    registers = -(-max(registers, 1) // m.register_unit) * m.register_unit
    shared = -(-shared // 128) * 128 + m.shared_reserved
    blocks = {
        "registers": 4 * (m.registers // registers) // warps,
        "shared memory": m.shared // shared if shared else m.blocks,
        "warps": m.warps // warps,
        "blocks": m.blocks,
    }
    if tensor_memory:
        blocks["tensor memory"] = m.tensor_memory // tensor_memory
    limit = min(blocks, key=lambda name: blocks[name])
    return Occupancy(blocks[limit], blocks[limit] * warps, limit)
