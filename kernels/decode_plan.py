"""Plan decode_attention.py's launches: tiles, warps, stages and the number of splits.

The number of splits depends on the sequence's length and on constants (splits_of in decode_tile.py,
on the device), never on the batch or the cache's capacity, so a sequence's result has the same bits
in any batch. Up to eight splits have 256 keys each: 128 KB of one head in 16 bits, or 4 tiles,
which amortize a start. (An SM with 64 KB in flight for 0.8 us reads 80 GB/s: 1,000 keys of a head
take one program 6 us, and three programs 2 us.) From 4,096 keys on a split has 512 keys, which
halves the workspace. most_splits limits their number to what fills the chip with one sequence. The
grid covers the cache's capacity, since the lengths are on the device; programs past their
sequence's splits come last and exit at once. The result of a single split is written directly.
"""

from __future__ import annotations

import functools
import math

import triton.language as tl
from torch import Tensor

from . import common
from .common import Chip, Config

SHORT_SPLIT: tl.constexpr = tl.constexpr(256)  # keys
SHORT_SPLITS: tl.constexpr = tl.constexpr(8)
LONG_SPLIT: tl.constexpr = tl.constexpr(512)


def _shared_bytes(config: Config, d: int, bytes_q: int, bytes_cache: int) -> int:
    """Bound _attend's shared memory: the tiles in flight, the queries, and decoded keys or
    probabilities. wgmma (64 rows and more) reads a tile while the next ones arrive; mma.sync copies
    it to registers first, so one tile fewer is in flight."""
    block_m, block_n, block_d = config["BLOCK_M"], config["BLOCK_N"], common.padded_dim(d)
    tile = block_n * block_d
    if block_m >= 64:
        decoded = 2 * tile * bytes_q if bytes_cache < bytes_q else 0
        tiles = 2 * tile * bytes_cache * config.num_stages + decoded
    else:
        probabilities = block_m * block_n * bytes_q
        tiles = 2 * tile * bytes_cache * max(config.num_stages - 1, 1) + probabilities
    return tiles + block_m * block_d * bytes_q + 1024


def configs(chip: Chip, d: int, dtype: str, fp8_cache: bool, rows: int) -> list[Config]:
    """Return the configurations for q's dtype and Sq * G rounded up to `rows`: 16 to 128."""
    bytes_q = 4 if dtype == "float32" else 2
    bytes_cache = 1 if fp8_cache else bytes_q
    block_d = common.padded_dim(d)

    def config(warps: int, stages: int, block_n: int, block_m: int = rows) -> Config:
        return Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n)

    few = min(rows, 32)
    wgmma = chip.has_tma  # or tcgen05: 64 rows at a time, operands in shared memory
    if dtype == "float32":
        # fp32 products take their operands from registers: small tiles, many threads.
        offered = [config(8, 1 if fp8_cache else 2, 16, 16)]
    elif d % 16:
        # Unaligned rows load in pieces, through registers, which limit the tile.
        offered = [config(4, 3, 32, few), config(4, 2, 16, few)]
    elif rows <= 32 and few * block_d < 32 * 256:
        # Bound by memory, so by bytes in flight. First two programs or more an SM, 64 KB each at
        # D = 128; then half the barriers and reductions per key (in FP8 it would spill); then more
        # in flight; last a small one, for chips with little shared memory.
        offered = [config(4, 3, 64), config(4, 3, 128), config(4, 4, 64), config(4, 2, 32)]
        if fp8_cache:
            del offered[1]
            if chip.backend == "hip":  # four stages of decoded keys spill
                offered.remove(config(4, 4, 64))
        elif block_d <= 64:
            offered[:2] = offered[1::-1]
    elif block_d == 256 and (rows <= 32 or fp8_cache or not wgmma):
        # The sums take 64 registers a thread, and a decoded tile of 64 keys as many.
        offered = [config(4, 3, 32, few), config(4, 2, 32, few)]
    elif block_d == 256:
        # Eight warps, since the sums of 64 rows would fill the registers of four.
        offered = [config(8, 2, 32, 64), config(8, 2, 16, 64)]
    else:
        # Bound by arithmetic: a warp for 16 rows, and tiles of keys as large as registers allow;
        # then smaller ones, for little shared memory.
        offered = [config(rows // 16, 3, 64), config(rows // 16, 3, 32), config(4, 2, 32, 64)]
        if not wgmma:
            del offered[0]
        if chip.backend == "hip":  # 64 rows and their sums spill
            offered = [config(4, 2, 16, 32)]
    return [c for c in offered if _shared_bytes(c, d, bytes_q, bytes_cache) <= chip.shared_memory]


def resident(chip: Chip, config: Config, q: Tensor, cache: Tensor) -> int:
    """Return how many programs an SM runs at a time: as many as fit its shared memory, at most two,
    or one of 128 rows, whose registers fill the SM."""
    needed = _shared_bytes(config, q.shape[-1], q.itemsize, cache.itemsize)
    return max(1, min(1 if config["BLOCK_M"] > 64 else 2, chip.shared_memory // needed))


def splits_wanted(keys: int) -> int:
    """Compute on the host what splits_of does before it applies its limits."""
    short = min(keys // SHORT_SPLIT.value, SHORT_SPLITS.value)
    return max(1, keys // LONG_SPLIT.value, short)


@functools.lru_cache(maxsize=1024)
def most_splits(programs: int, slots: int) -> int:
    """Return how many splits of one sequence, of `programs` each, fill a chip that runs `slots`
    programs at a time: the fewest whose last wave is at least 95 % as full as the fullest choice's,
    within four waves."""

    def full(splits: int) -> float:
        waves = programs * splits / slots
        return waves / math.ceil(waves)

    counts = range(1, max(1, 4 * slots // programs) + 1)
    best = max(map(full, counts))
    return next(s for s in counts if full(s) >= 0.95 * best)
