"""Plans of every CUDA kernel's resources and instructions, in one table.

A plan names the instances that a file must contain, and for each its launcher's threads and dynamic
shared memory (tests/static/test_cuda.py compares the sizes with the C++ expression), the blocks
that have to fit on a multiprocessor, and the instructions that it must contain. No kernel may spill
or use local memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from . import LINEAR

Arguments = tuple[str, ...]
PORTABLE, HOPPER = ("sm_80", "sm_89", "sm_90"), ("sm_90a",)


def chip(arch: str) -> str:
    return arch.removesuffix("a")


@dataclass(frozen=True)
class Plan:
    """The plan of a kernel template. A callable takes an instance's template arguments; `needs` and
    `launched` take the architecture too."""

    file: str
    kernel: str
    instances: Sequence[Arguments]
    threads: int | Callable[[Arguments], int]
    blocks: int | Callable[[Arguments], int]  # on a multiprocessor, if shared memory has room
    needs: Callable[[Arguments, str], Iterable[str]] = lambda a, arch: ()  # keys of binary.SASS
    shared: int | Callable[[Arguments], int] = 0  # dynamic, bytes per block
    cpp: str = ""  # the launcher's expression for it, with template arguments {0} ...
    archs: tuple[str, ...] = PORTABLE
    streams: bool = False  # elementwise, so that memory should bound it
    # Bytes of cp.async on a multiprocessor before the first wait.
    ahead: int | Callable[[Arguments], int] = 0
    launched: Callable[[Arguments, str], bool] = lambda a, arch: True

    def of(self, name: str, arguments: Arguments) -> int:
        """Return threads, blocks, shared or ahead of an instance."""
        value = getattr(self, name)
        return value(arguments) if callable(value) else value


# ---- the plans ----

HALF, BF16, F32, E4M3 = "__half", "__nv_bfloat16", "float", "unsigned char"
TYPES, BOTH, T = (HALF, BF16, F32), ("false", "true"), "true"
LOADS, STORES = "16-byte loads", "16-byte stores"
# Bytes in flight that memory's latency needs: an H200's 4.8 TB/s times 0.7 us are 26 KB for each of
# 132 multiprocessors. The elementwise kernels have enough blocks for that.
IN_FLIGHT = 32 << 10


def vectors(*names: str, at: int = 1) -> Callable[[Arguments, str], list[str]]:
    """Return an elementwise kernel's needs: aligned rows move 16 bytes at a time."""
    return lambda a, arch: [n for n in names if a[at] == T or n not in (LOADS, STORES)]


def decode_shape(a: Arguments) -> tuple[int, int]:
    """Return DecodeShape's warps and shared_bytes."""
    d, row_tiles = int(a[2]), int(a[3])
    row_bytes = d * (1 if a[1] == E4M3 else 2)
    keys = 32 if row_bytes <= 128 and d * row_tiles <= 128 else 16
    warps, stage = 2 if row_bytes > 256 else 4, 2 * keys * row_bytes
    stages = 3 if stage > 4096 else 5
    kept = 48 + 4 * warps * (stages + 16 * row_tiles)  # Part, seen, scale
    return warps, warps * stages * stage + -(-kept // 8) * 8


def attention_shared(a: Arguments) -> int:
    rows, keys = (64, 32) if int(a[1]) > 128 else (128, 64)
    return 2 * int(a[1]) * (rows + 2 * keys) + 16


def many_rows_shared(a: Arguments) -> int:
    """Return the bytes of stages, the output's buffers, scales, the bias and barriers."""
    n = int(a[1])
    scales = 4 * 4 * (128 + n // 128) if a[2] == T else 4 * (128 + n)
    return 4 * 128 * (128 + n) + 4 * 8192 + scales + n * (4 if a[0] == F32 else 2) + 80


def few_rows_needs(a: Arguments, arch: str) -> list[str]:
    """Return few_rows_kernel's needs. sm_90 has e4m3 only in wgmma: ptxas replaces an e4m3 mma.sync
    by two of fp16."""
    matrix = "mma e4m3" if a[0] == E4M3 and arch == "sm_89" else "mma"
    return [matrix, "cp.async", LOADS] if a[3] == T else [matrix]


def rows(file: str, kernel: str, instances: Iterable[Arguments], *names: str) -> Plan:
    """Return the plan of an elementwise kernel with a block of 1,024 threads per row."""
    return Plan(file, kernel, [*instances], 1024, 1, vectors(*names), 32 * 4, streams=True)


def pieces(file: str, kernel: str, *names: str, shared: int = 0) -> Plan:
    """Return the plan of an elementwise kernel with blocks of 256 threads."""
    instances = [*product(TYPES, BOTH)]
    return Plan(file, kernel, instances, 256, 4, vectors(*names), shared, streams=True)


# fmt: off
PLANS = [
    Plan(
        "rms_norm", "rms_norm_kernel", [*product(TYPES, BOTH, "02", BOTH)], 1024, 1,
        lambda a, arch: vectors(LOADS, *[STORES] * (a[3] != T))(a, arch), 33 * 4, streams=True,
    ),
    pieces("activation", "silu_and_mul_kernel", "ex2", LOADS, STORES),
    # FP8 from 16 bits has 8 bytes a thread, so no 16-byte stores.
    rows("activation", "silu_and_mul_fp8_kernel",
         [a for a in product(TYPES, BOTH, "024") if (a[0], a[2]) != (HALF, "4")], "ex2", LOADS),
    rows("quantize", "by_row_kernel", product(TYPES, BOTH, "024"), LOADS),
    pieces("quantize", "by_block_kernel", LOADS),
    pieces("quantize", "by_square_kernel", LOADS, shared=32 * 4),
    pieces("quantize", "tensor_amax_kernel", LOADS, shared=32 * 4),
    pieces("quantize", "tensor_quantize_kernel", LOADS),
    Plan("quantize", "clear_kernel", [()], 1, 1),
    Plan("quantize", "tensor_scale_kernel", [()], 1, 1),
    Plan(
        "rope", "rope_kernel",
        [(t, cache, step, x) for t in TYPES for cache in ("void", t, E4M3)
         for step in ("1", "4" if t == F32 else "8") for x in BOTH],
        256, 4, lambda a, arch: [LOADS, STORES] if a[2] != "1" else [], streams=True,
    ),
    Plan(  # 2 blocks: one's softmax overlaps the other's products
        "attention", "attention_kernel",
        [*product((HALF, BF16), ("64", "128", "256"), (T,)),
         *product((HALF, BF16), ("128", "256"), ("false",))],
        128, 2,
        lambda a, arch: ["mma", "ldmatrix", "ex2", *["cp.async", STORES] * (a[2] == T)],
        attention_shared, "Shape<{1}>::q_bytes + 2 * Shape<{1}>::kv_bytes + sizeof(Output<{0}>)",
    ),
    # As many blocks as ptxas allows without spills.
    Plan("attention", "attention_fp32_kernel", [()], 128, 4, lambda a, arch: ["ex2"],
         4608, "kFp32SharedBytes"),
    Plan(  # two consumers and a producer fill a multiprocessor's registers
        "attention_sm90", "attention_kernel", [*product((HALF, BF16), ("64", "128"))], 384, 1,
        lambda a, arch: ["wgmma", "TMA", "TMA stores", "setmaxnreg", "ex2"],
        lambda a: 6 * 128 * 2 * int(a[1]) + 80, "sizeof(Shared<{1}>)", HOPPER,
    ),
    Plan(  # 2 blocks: one's start and end overlap the other's stream
        "decode_attention", "decode_kernel",
        [(t, cache, d, n) for t, cache in ((HALF, HALF), (BF16, BF16), (HALF, E4M3))
         for d, n in (*product(("64", "128"), "12"), ("256", "1"))],
        lambda a: 32 * decode_shape(a)[0], 2,
        lambda a, arch: ["mma", "ldmatrix", "ex2", "cp.async",
                         *["e4m3 to fp16"] * (a[1] == E4M3 and arch != "sm_80")],
        lambda a: decode_shape(a)[1], "DecodeShape<{1}, {2}, {3}>::shared_bytes", ahead=IN_FLIGHT,
    ),
    Plan(  # short blocks, which have only their latency to hide
        "decode_attention", "combine_kernel", [()], 128, 8,
        lambda a, arch: ["ex2", LOADS, *["griddepcontrol.wait"] * (arch == "sm_90")], 4 * 260 * 4,
    ),
    Plan("decode_attention", "decode_fp32_kernel", [(F32,), (E4M3,)], 128, 4,
         lambda a, arch: ["ex2"], 4608, "kFp32SharedBytes"),
    Plan(  # 2 blocks up to 16 rows, as for decode_kernel
        LINEAR, "few_rows_kernel",
        [(x, out, n, aligned, blockwise)
         for x, out in [(HALF, HALF), (BF16, BF16), *product((E4M3,), TYPES)]
         for n, aligned in [("1", "false"), ("1", T), ("2", T), ("4", T)]
         for blockwise in BOTH if (n, blockwise) != ("4", T)],
        256, lambda a: 2 if a[2] == "1" else 1, few_rows_needs,
        8 * 3 * 32 * 128, "kWarps * kStages * kStage",
        ahead=lambda a: IN_FLIGHT if a[3] == T else 0,
        launched=lambda a, arch: a[0] != E4M3 or arch != "sm_80",
    ),
    # One warp per output, without matrix instructions.
    Plan(LINEAR, "plain_kernel", [(F32, F32), *product((E4M3,), TYPES)], 256, 4),
    Plan(  # persistent; registers as for attention_sm90
        f"{LINEAR}_sm90", "many_rows_kernel",
        [a for a in product(TYPES, ("128", "256"), BOTH) if a[0] != F32 or a[1] == "128"], 384, 1,
        lambda a, arch: ["wgmma e4m3", "TMA", "TMA multicast", "setmaxnreg",
                         *["TMA stores"] * (a[0] != F32)],
        many_rows_shared, "sizeof(Shared<{0}, {1}, {2}>)", HOPPER,
    ),
]
# fmt: on
