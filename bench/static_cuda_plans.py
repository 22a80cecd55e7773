"""What every CUDA kernel is planned to take, in one place.

A plan names the instances that a file must contain, and for each its threads and dynamic shared
memory as its launcher asks for them (tests/static/test_cuda.py holds the sizes against the C++
expression), the blocks that are to fit on a multiprocessor, and the instructions it is built on.
Nothing may spill or use local memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from .occupancy import MULTIPROCESSORS

Arguments = tuple[str, ...]
PORTABLE = ("sm_80", "sm_89", "sm_90")
HOPPER = ("sm_90a",)
HALF, BF16, F32, E4M3 = "__half", "__nv_bfloat16", "float", "unsigned char"
TYPES, BOTH = (HALF, BF16, F32), ("false", "true")


def chip(arch: str) -> str:
    return arch.removesuffix("a")


@dataclass(frozen=True)
class Plan:
    """Of one kernel template. The callables take an instance's template arguments."""

    file: str
    kernel: str
    instances: Sequence[Arguments]
    threads: Callable[[Arguments], int]
    # On one multiprocessor; fewer where shared memory has no room for them.
    blocks: int | Callable[[Arguments], int]
    why: str  # that many
    needs: Callable[[Arguments, str], Iterable[str]]  # and the architecture: keys of SASS
    shared: Callable[[Arguments], int] = lambda a: 0  # dynamic, bytes a block
    cpp: str = ""  # the same in C++, {0} ... the template arguments
    archs: tuple[str, ...] = PORTABLE
    launched: Callable[[Arguments, str], bool] = lambda a, arch: True
    streams: bool = False  # elementwise: nothing but memory should bound it
    # Bytes of cp.async on a multiprocessor before anything waits for them.
    ahead: Callable[[Arguments], int] = lambda a: 0

    def wanted_blocks(self, arguments: Arguments, arch: str) -> int:
        m = MULTIPROCESSORS[chip(arch)]
        room = m.shared // (-(-self.shared(arguments) // 128) * 128 + m.shared_reserved)
        blocks = self.blocks if isinstance(self.blocks, int) else self.blocks(arguments)
        return max(1, min(blocks, room))


def _vector_stores(arguments: Arguments, arch: str) -> list[str]:
    """Of the elementwise kernels: aligned rows move 16 bytes at a time."""
    return ["16-byte loads", "16-byte stores"] if arguments[1] == "true" else []


def _vector_loads(arguments: Arguments, arch: str) -> list[str]:
    """FP8 out of 16 bits leaves 8 bytes a thread."""
    return ["16-byte loads"] if arguments[1] == "true" else []


def _rope(a: Arguments, arch: str) -> list[str]:
    return ["16-byte loads", "16-byte stores"] if a[2] != "1" else []


def _attention(a: Arguments, arch: str) -> list[str]:
    always = ["mma", "ldmatrix", "ex2"]
    return [*always, "cp.async", "16-byte stores"] if a[2] == "true" else always


def _decode(a: Arguments, arch: str) -> list[str]:
    always = ["mma", "ldmatrix", "ex2", "cp.async"]
    return [*always, "e4m3 to fp16"] if a[1] == E4M3 and arch != "sm_80" else always


def _few_rows(a: Arguments, arch: str) -> list[str]:
    """sm_90 has e4m3 in wgmma only: of mma.sync ptxas makes two of fp16."""
    matrix = "mma e4m3" if a[0] == E4M3 and arch == "sm_89" else "mma"
    return [matrix, "cp.async", "16-byte loads"] if a[3] == "true" else [matrix]


def _many_rows(a: Arguments, arch: str) -> list[str]:
    always = ["wgmma e4m3", "TMA", "TMA multicast", "setmaxnreg"]
    return always if a[0] == F32 else [*always, "TMA stores"]


def _decode_shape(a: Arguments) -> tuple[int, int]:
    """DecodeShape's warps and shared_bytes."""
    d, row_tiles = int(a[2]), int(a[3])
    row_bytes = d * (1 if a[1] == E4M3 else 2)
    keys = 32 if row_bytes <= 128 and d * row_tiles <= 128 else 16
    warps = 2 if row_bytes > 256 else 4
    stage = 2 * keys * row_bytes
    stages = 3 if stage > 4096 else 5
    kept = 48 + 4 * warps * (stages + 16 * row_tiles)  # Part, seen, scale
    return warps, warps * stages * stage + -(-kept // 8) * 8


def _attention_shared(a: Arguments) -> int:
    d = int(a[1])
    rows, keys = (64, 32) if d > 128 else (128, 64)
    return 2 * d * (rows + 2 * keys) + 16


def _many_rows_shared(a: Arguments) -> int:
    """Stages, the output's buffers, scales, the bias, barriers."""
    n = int(a[1])
    scales = 4 * 4 * (128 + n // 128) if a[2] == "true" else 4 * (128 + n)
    return 4 * 128 * (128 + n) + 4 * 8192 + scales + n * (4 if a[0] == F32 else 2) + 80


def fixed(value: int) -> Callable[[Arguments], int]:
    return lambda arguments: value


# What memory's latency asks for: an H200's 4.8 TB/s times 0.7 us, for each of 132 multiprocessors,
# are 26 KB.
IN_FLIGHT = 32 << 10
FEW_ROWS = [("1", "false"), ("1", "true"), ("2", "true"), ("4", "true")]  # row tiles, aligned
STREAMS = "32 KB of loads in flight, what memory's latency asks for"
FP32 = "fp32: right rather than fast; so many that ptxas does not spill for more"

PLANS = [
    Plan(
        "rms_norm",
        "rms_norm_kernel",
        [*product(TYPES, BOTH, "02", BOTH)],
        fixed(1024),
        1,
        STREAMS,
        lambda a, arch: _vector_loads(a, arch) if a[3] == "true" else _vector_stores(a, arch),
        fixed(33 * 4),
        streams=True,
    ),
    Plan(
        "activation",
        "silu_and_mul_kernel",
        [*product(TYPES, BOTH)],
        fixed(256),
        4,
        STREAMS,
        lambda a, arch: ["ex2", *_vector_stores(a, arch)],
        streams=True,
    ),
    Plan(
        "activation",
        "silu_and_mul_fp8_kernel",
        [(t, a, n) for t, a, n in product(TYPES, BOTH, "024") if (t, n) != (HALF, "4")],
        fixed(1024),
        1,
        STREAMS,
        lambda a, arch: ["ex2", *_vector_loads(a, arch)],
        fixed(32 * 4),
        streams=True,
    ),
    Plan(
        "quantize",
        "by_row_kernel",
        [*product(TYPES, BOTH, "024")],
        fixed(1024),
        1,
        STREAMS,
        _vector_loads,
        fixed(32 * 4),
        streams=True,
    ),
    Plan(
        "quantize",
        "by_block_kernel",
        [*product(TYPES, BOTH)],
        fixed(256),
        4,
        STREAMS,
        _vector_loads,
        streams=True,
    ),
    *(
        Plan(
            "quantize",
            kernel,
            [*product(TYPES, BOTH)],
            fixed(256),
            4,
            STREAMS,
            _vector_loads,
            fixed(32 * 4),
            streams=True,
        )
        for kernel in ("by_square_kernel", "tensor_amax_kernel")
    ),
    Plan(
        "quantize",
        "tensor_quantize_kernel",
        [*product(TYPES, BOTH)],
        fixed(256),
        4,
        STREAMS,
        _vector_loads,
        streams=True,
    ),
    Plan("quantize", "clear_kernel", [()], fixed(1), 1, "one thread", lambda a, arch: []),
    Plan("quantize", "tensor_scale_kernel", [()], fixed(1), 1, "one thread", lambda a, arch: []),
    Plan(
        "rope",
        "rope_kernel",
        [
            (t, cache, step, x)
            for t in TYPES
            for cache in ("void", t, E4M3)
            for step in ("1", "4" if t == F32 else "8")
            for x in BOTH
        ],
        fixed(256),
        4,
        STREAMS,
        _rope,
        streams=True,
    ),
    Plan(
        "attention",
        "attention_kernel",
        [*product((HALF, BF16), ("64", "128", "256"), ("true",))]
        + [*product((HALF, BF16), ("128", "256"), ("false",))],
        fixed(128),
        2,
        "one's softmax beside the other's products",
        _attention,
        _attention_shared,
        "Shape<{1}>::q_bytes + 2 * Shape<{1}>::kv_bytes + sizeof(Output<{0}>)",
    ),
    Plan(
        "attention",
        "attention_fp32_kernel",
        [()],
        fixed(128),
        4,
        FP32,
        lambda a, arch: ["ex2"],
        fixed(4608),
        "kFp32SharedBytes",
    ),
    Plan(
        "attention_sm90",
        "attention_kernel",
        [*product((HALF, BF16), ("64", "128"))],
        fixed(384),
        1,
        "two consumers and a producer are what a multiprocessor's registers hold",
        lambda a, arch: ["wgmma", "TMA", "TMA stores", "setmaxnreg", "ex2"],
        lambda a: 6 * 128 * 2 * int(a[1]) + 80,
        "sizeof(Shared<{1}>)",
        HOPPER,
    ),
    Plan(
        "decode_attention",
        "decode_kernel",
        [(t, t, d, n) for t in (HALF, BF16) for d in ("64", "128") for n in "12"]
        + [(t, t, "256", "1") for t in (HALF, BF16)]
        + [(HALF, E4M3, d, n) for d in ("64", "128") for n in "12"]
        + [(HALF, E4M3, "256", "1")],
        lambda a: 32 * _decode_shape(a)[0],
        2,
        "a block starts and ends beside the other's stream",
        _decode,
        lambda a: _decode_shape(a)[1],
        "DecodeShape<{1}, {2}, {3}>::shared_bytes",
        ahead=lambda a: IN_FLIGHT,
    ),
    Plan(
        "decode_attention",
        "combine_kernel",
        [()],
        fixed(128),
        8,
        "short blocks: their latency is all there is to hide",
        lambda a, arch: ["ex2", "16-byte loads"] + ["griddepcontrol.wait"] * (arch == "sm_90"),
        fixed(4 * 260 * 4),
    ),
    Plan(
        "decode_attention",
        "decode_fp32_kernel",
        [(F32,), (E4M3,)],
        fixed(128),
        4,
        FP32,
        lambda a, arch: ["ex2"],
        fixed(4608),
        "kFp32SharedBytes",
    ),
    Plan(
        "linear",
        "few_rows_kernel",
        [
            (x, out, n, aligned, blockwise)
            for x, out in [(HALF, HALF), (BF16, BF16), *product((E4M3,), TYPES)]
            for n, aligned in FEW_ROWS
            for blockwise in BOTH
            if n != "4" or blockwise == "false"
        ],
        fixed(256),
        lambda a: 2 if a[2] == "1" else 1,
        "one starts and ends beside the other's stream",
        _few_rows,
        fixed(8 * 3 * 32 * 128),
        "kWarps * kStages * kStage",
        launched=lambda a, arch: a[0] != E4M3 or arch != "sm_80",
        ahead=lambda a: IN_FLIGHT if a[3] == "true" else 0,
    ),
    Plan(
        "linear",
        "plain_kernel",
        [(F32, F32), *product((E4M3,), TYPES)],
        fixed(256),
        4,
        "a warp an output, without matrix instructions",
        lambda a, arch: [],
    ),
    Plan(
        "linear_sm90",
        "many_rows_kernel",
        [(t, n, b) for t in TYPES for n in ("128", "256") for b in BOTH if t != F32 or n == "128"],
        fixed(384),
        1,
        "persistent; two consumers and a producer are what the registers hold",
        _many_rows,
        _many_rows_shared,
        "sizeof(Shared<{0}, {1}, {2}>)",
        HOPPER,
    ),
]
