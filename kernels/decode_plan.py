"""How decode_attention.py is launched: tiles, warps and stages for a chip, and how many splits.

How many splits: a function of the sequence's own length and of constants (splits_of in
decode_tile.py, on the device), never of the batch or of the cache's capacity, so that a sequence's
result has the same bits in any batch. 256 keys a split up to eight of them: 128 KB of one head in
16 bits, 4 tiles, enough to amortise a start. (An SM with 64 KB on their way for 0.8 us takes in 80
GB/s: 1,000 keys of a head are 6 us of one program, and 2 of three.) From 4,096 keys on 512 a split,
which halves what is written and read again; at most as many as fill the chip with that sequence
alone (most_splits). The grid covers the capacity, since
the lengths are on the device; programs past their sequence's splits exit at once, and come last. A
sequence of one split is written directly.
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
    """Shared memory of _attend: the tiles in flight, the queries, and what is on its way into the
    matrix unit. wgmma (64 rows and more) reads a tile while the next ones arrive, mma.sync copies
    it to registers first and needs one fewer."""
    block_m, block_n, block_d = config["BLOCK_M"], config["BLOCK_N"], padded_dim(d)
    tile = block_n * block_d
    if block_m >= 64:
        decoded = 2 * tile * bytes_q if bytes_cache < bytes_q else 0
        tiles = 2 * tile * bytes_cache * config.num_stages + decoded
    else:
        probabilities = block_m * block_n * bytes_q
        tiles = 2 * tile * bytes_cache * max(config.num_stages - 1, 1) + probabilities
    return tiles + block_m * block_d * bytes_q + 1024


def configs(chip: Chip, d: int, dtype: str, fp8_cache: bool, rows: int) -> list[Config]:
    """dtype: q's; rows: Sq * G rounded up to 16, 32, 64 or 128."""
    bytes_q = 4 if dtype == "float32" else 2
    bytes_cache = 1 if fp8_cache else bytes_q
    block_d = padded_dim(d)

    def config(warps: int, stages: int, block_n: int, block_m: int = rows) -> Config:
        return Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n)

    few = min(rows, 32)
    wgmma = chip.has_tma  # or what followed it: 64 rows at a time, operands in shared memory
    if dtype == "float32":
        # Products on the vector units, whose operands lie in registers: small tiles, many threads.
        offered = [config(8, 1 if fp8_cache else 2, 16, 16)]
    elif d % 16:
        # Rows that start anywhere load in pieces, through registers, which then set the limit.
        offered = [config(4, 3, 32, few), config(4, 2, 16, few)]
    elif rows <= 32 and few * block_d < 32 * 256:
        # Bound by memory: bytes in flight count. Two programs an SM or more, 64 KB each, for
        # D = 128; then half the barriers and reductions a key (FP8 would not fit the registers);
        # then more in flight; then less of everything, for chips of little shared memory.
        offered = [config(4, 3, 64), config(4, 3, 128), config(4, 4, 64), config(4, 2, 32)]
        if fp8_cache:
            del offered[1]
            if chip.backend == "hip":  # four stages of decoded keys spill there
                offered.remove(config(4, 4, 64))
        elif block_d <= 64:
            offered[:2] = offered[1::-1]
    elif block_d == 256 and (rows <= 32 or fp8_cache or not wgmma):
        # The sums alone are 64 registers a thread, and a decoded tile of 64 keys as many.
        offered = [config(4, 3, 32, few), config(4, 2, 32, few)]
    elif block_d == 256:
        # Eight warps share 64 rows' sums, which would fill the registers of four.
        offered = [config(8, 2, 32, 64), config(8, 2, 16, 64)]
    else:
        # Bound by arithmetic: a warp for 16 rows; tiles of keys as large as registers allow, then
        # as small as little shared memory asks for.
        offered = [config(rows // 16, 3, 64), config(rows // 16, 3, 32), config(4, 2, 32, 64)]
        if not wgmma:
            del offered[0]
        if chip.backend == "hip":  # 64 rows and their sums spill there
            offered = [config(4, 2, 16, 32)]
    return [c for c in offered if _shared_bytes(c, d, bytes_q, bytes_cache) <= chip.shared_memory]


def resident(chip: Chip, config: Config, q: Tensor, cache: Tensor) -> int:
    """Programs an SM runs at a time: by shared memory, two at the most, one of 128 rows (whose
    registers fill the SM)."""
    needed = _shared_bytes(config, q.shape[-1], q.itemsize, cache.itemsize)
    return max(1, min(1 if config["BLOCK_M"] > 64 else 2, chip.shared_memory // needed))


def padded_dim(d: int) -> int:
    return max(16, common.next_power_of_2(d))  # 16: the least a matrix instruction sums over


def splits_wanted(keys: int) -> int:
    """Into how many splits so many keys go, where that many programs find room: as splits_of."""
    short = min(keys // SHORT_SPLIT.value, SHORT_SPLITS.value)
    return max(1, keys // LONG_SPLIT.value, short)


@functools.lru_cache(maxsize=1024)
def most_splits(programs: int, slots: int) -> int:
    """Into how many splits one sequence's `programs` fill a chip that holds `slots` at a time: the
    fewest whose last wave is nearly (19 in 20) as full as any choice's, within four waves."""

    def full(splits: int) -> float:
        waves = programs * splits / slots
        return waves / math.ceil(waves)

    counts = range(1, max(1, 4 * slots // programs) + 1)
    best = max(map(full, counts))
    return next(s for s in counts if full(s) >= 0.95 * best)
