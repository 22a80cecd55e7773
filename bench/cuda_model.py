"""What the kernels of csrc/cuda should take: roofline.py's formula, with their own tiles, pipelines
and residency. `python -m bench.cost_model --write docs/kernels.md` prints it for both Hoppers.

Registers are those of nvcc 13.0 for sm_90 (`cuobjdump --dump-resource-usage`), shared memory is
what the launchers ask for; the blocks that fit follow from both (occupancy.py). Predictions, not
measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from . import cost_model
from .occupancy import occupancy
from .roofline import GPUS, Gpu, Prediction, Work, time

# Of the matrix rate: what mma.sync reaches on an H100, where wgmma reaches all of it. Source: Luo
# et al., arXiv:2402.13499: 62.9 % on average.
MMA_SYNC = 0.629
# Of the softmax behind products where consumers take turns: what FlashAttention 3 reaches.
PING_PONG_OVERLAP = 0.6
# Of a block's life in which its loads are on their way, where nothing is fetched ahead: assumed.
# The rest is reducing, storing and the next block's start.
LOADING = 2 / 3
# Instructions of an output besides its products, from the SASS: scales, a bias, conversion, half a
# store, addresses; in turn with the products, as a block's consumers finish together.
EPILOGUE = 4.5
# Instructions of a warp for each 8 KB of a cache: assumed, from the loop's SASS without its masks.
DECODE_INSTRUCTIONS = {2: 400.0, 1: 700.0}
# Of a warp for each 4 KB of a weight beside up to 16 rows, from the loop's SASS.
FEW_ROWS_INSTRUCTIONS = {"fp8_gemm": 424.0, "fp8_linear": 719.0}


Demand = Callable[["Kernel", Gpu], Work]


@dataclass(frozen=True)
class Kernel:
    """An instance at a shape of Llama 3.1 8B. in_flight: bytes a block has under way; 0: enough."""

    file: str
    case: str
    tile: str
    threads: int
    registers: int
    shared: int
    work: Demand
    in_flight: float = 0.0

    @property
    def blocks(self) -> int:
        """That one multiprocessor of sm_90 holds."""
        return occupancy("sm_90", self.registers, self.shared, self.threads).blocks

    def predict(self, gpu: Gpu) -> Prediction:
        return time(self.case, self.work(self, gpu), gpu)


# ---- what an instance asks of the chip, given its blocks a multiprocessor ----


def elementwise(op: str, read: float, **shape: int | bool) -> Demand:
    """read: of the op's bytes, those that are loaded; latency is theirs only."""

    def work(k: Kernel, gpu: Gpu) -> Work:
        base = cost_model.work_of(op, **shape)
        return replace(base, per_sm=k.blocks, in_flight=LOADING * k.in_flight / read)

    return work


def quantize_tensor(rows: int, hidden: int) -> Demand:
    """Read for the maximum, read again, written; four launches."""

    def work(k: Kernel, gpu: Gpu) -> Work:
        base = elementwise("quantize_fp8", 4 / 5, rows=rows, hidden=hidden)(k, gpu)
        return replace(base, bytes=rows * hidden * 5.0 + 4, launches=4)

    return work


def prefill(
    m: int, n: int, shared: float, overlap: float, matrix_share: float, length: int = 16384
) -> Demand:
    """Causal. shared: bytes of shared memory that matrix instructions read for a score."""

    def work(k: Kernel, gpu: Gpu) -> Work:
        base = cost_model.work_of(
            "attention", batch=1, seqlen_q=length, seqlen_k=length, heads=32, kv_heads=8, d=128
        )
        scores = 32 * cost_model.scores_of_tiles(length, length, m, n, causal=True)
        return replace(
            base,
            executed=4 * 128 * scores,
            exponentials=scores,
            fp32=cost_model.SCORE_FP32 * scores,
            shared=shared * scores,
            overlap=overlap,
            matrix_share=matrix_share,
            per_sm=k.blocks,
        )

    return work


def most_splits(parts: int, slots: int) -> int:
    """decode_attention.cu's `filling`: the fewest splits of a sequence whose last wave is nearly as
    full as any choice's, within four waves."""

    def full(splits: int) -> float:
        blocks = parts * splits
        return blocks / (-(-blocks // slots) * slots)

    best = max(full(s) for s in range(1, max(4 * slots // parts, 1) + 1))
    return next(s for s in range(1, slots + 1) if full(s) >= 0.95 * best)


def splits_of(keys: int, most: int) -> int:
    """128 keys a split up to eight of them, then 512, until `most` fill the chip."""
    return max(1, min(most, max(keys // 512, min(keys // 128, 8))))


def decode(batch: int, keys: int, cache_bytes: int = 2) -> Demand:
    def work(k: Kernel, gpu: Gpu) -> Work:
        heads, kv_heads, d = 32, 8, 128
        base = cost_model.work_of(
            "attention_with_kvcache",
            batch=batch,
            seqlen_q=1,
            seqlen_k=keys,
            heads=heads,
            kv_heads=kv_heads,
            d=d,
            cache_bytes=cache_bytes,
        )
        splits = splits_of(keys, most_splits(kv_heads, gpu.sms * k.blocks))
        cache = 2 * batch * keys * kv_heads * d * cache_bytes
        return replace(
            base,
            workspace=2 * 4 * (d + 2) * heads * batch * splits,  # written and read
            matrix_share=MMA_SYNC,
            fp32=DECODE_INSTRUCTIONS[cache_bytes] * 32 * cache / 8192,
            overlap=1.0,  # a warp's products and its softmax, among seven other warps'
            launches=1 if splits == 1 else 2,
            programs=batch * kv_heads * splits,
            per_sm=k.blocks,
            in_flight=k.in_flight,
        )

    return work


def few_rows(op: str, m: int, n: int, k_dim: int) -> Demand:
    """The weight's stream; x, out of L1 and L2, is not in the model."""

    def work(k: Kernel, gpu: Gpu) -> Work:
        base = cost_model.work_of(op, m=m, n=n, k=k_dim)
        return replace(
            base,
            executed=2.0 * max(16, m) * n * k_dim,
            fp8=False,  # on sm_90 mma.sync of e4m3 is compiled to fp16's
            matrix_share=MMA_SYNC,
            fp32=FEW_ROWS_INSTRUCTIONS[op] * 32 * n * k_dim / 4096,
            overlap=1.0,  # a warp's products and its conversions, among 15 other warps'
            programs=-(-n // 32),
            per_sm=k.blocks,
            in_flight=k.in_flight,
        )

    return work


def many_rows(m: int, n: int, k_dim: int) -> Demand:
    """Tiles of 128 x 256. A stage is read by two consumers: 64 rows of x each, once for each half
    of the weight's tile, and all of that. Sums leave the matrix unit every 128 of k."""
    tile_n = 256

    def work(k: Kernel, gpu: Gpu) -> Work:
        base = cost_model.work_of("fp8_gemm", m=m, n=n, k=k_dim)
        tiles = -(-m // 128) * -(-n // tile_n)
        executed = 2.0 * tiles * 128 * tile_n * k_dim
        promotion = m * n * k_dim / 128 / gpu.fp32
        # Promotion runs beside the other consumer's products in part; the epilogue beside none.
        exposed = (1 - cost_model.PROMOTION_OVERLAP) * promotion + EPILOGUE * m * n / gpu.fp32
        return replace(
            base,
            executed=executed,
            fp32=exposed * gpu.fp32,
            overlap=0.0,
            shared=tiles * (k_dim / 128) * 2 * (2 * 64 + tile_n) * 128,
            programs=tiles,
            per_sm=k.blocks,
            in_flight=math.inf,
        )

    return work


# ---- the instances ----

ROWS, HIDDEN, INNER = 32768, 4096, 14336

KERNELS = (
    Kernel(
        "rms_norm.cu", "add + norm, 32k x 4096", "a row", 256, 48, 132,
        elementwise("add_rms_norm", 1 / 2, rows=ROWS, hidden=HIDDEN), 4 * HIDDEN,
    ),
    Kernel(
        "rms_norm.cu", "add + norm + FP8, 32k x 4096", "a row", 256, 44, 132,
        elementwise("rms_norm_fp8", 4 / 7, rows=ROWS, hidden=HIDDEN, residual=True), 4 * HIDDEN,
    ),
    Kernel(
        "activation.cu", "SwiGLU, 8k x 14336", "2,048 elements", 256, 31, 0,
        elementwise("silu_and_mul", 2 / 3, rows=8192, inner=INNER), 256 * 32,
    ),
    Kernel(
        "activation.cu", "SwiGLU + FP8, 8k x 14336", "a row", 896, 60, 128,
        elementwise("silu_and_mul_fp8", 4 / 5, rows=8192, inner=INNER), 4 * INNER,
    ),
    Kernel(
        "quantize.cu", "by row, 32k x 4096", "a row", 256, 32, 128,
        elementwise("quantize_fp8", 2 / 3, rows=ROWS, hidden=HIDDEN), 2 * HIDDEN,
    ),
    Kernel(
        "quantize.cu", "by 1 x 128, 32k x 4096", "16 x 128 elements", 256, 30, 0,
        elementwise("quantize_fp8", 2 / 3, rows=ROWS, hidden=HIDDEN), 16 * 128 * 2,
    ),
    Kernel(
        "quantize.cu", "by tensor, 32k x 4096", "2,048 elements", 256, 26, 128,
        quantize_tensor(ROWS, HIDDEN), 256 * 16,
    ),
    Kernel(
        "rope.cu", "q and k, 32k tokens", "20 heads", 160, 40, 0,
        elementwise("apply_rope", 1 / 2, tokens=ROWS, heads=32, kv_heads=8, d=128), 160 * 32,
    ),
    Kernel(
        "rope.cu", "with append, 32k tokens", "24 heads", 192, 54, 0,
        elementwise("apply_rope_and_append", 1 / 2, tokens=ROWS, heads=32, kv_heads=8, d=128),
        192 * 32,
    ),
    # A warp of 32 rows reads Q's (8 KB), K's and V's 16 KB for 32 x 64 scores.
    Kernel(
        "attention.cu", "causal, 16k, D = 128", "128 x 64", 128, 255, 65552,
        prefill(128, 64, 40960 / (32 * 64), cost_model.SOFTMAX_OVERLAP, MMA_SYNC),
    ),
    # A consumer reads 16 KB of Q, K's and V's 32 KB for 64 x 128 scores.
    Kernel(
        "attention_sm90.cu", "causal, 16k, D = 128", "128 x 128", 384, 168, 196688,
        prefill(128, 128, 81920 / (64 * 128), PING_PONG_OVERLAP, 1.0),
    ),
    Kernel(
        "decode_attention.cu", "32 x 4k", "16 rows x 64", 128, 159, 98656,
        decode(32, 4096), 4 * 2 * 8192,
    ),
    Kernel(
        "decode_attention.cu", "1 x 128k", "16 rows x 64", 128, 159, 98656,
        decode(1, 131072), 4 * 2 * 8192,
    ),
    Kernel(
        "decode_attention.cu", "FP8, 32 x 4k", "16 rows x 128", 128, 160, 98656,
        decode(32, 4096, 1), 4 * 2 * 8192,
    ),
    Kernel(
        "linear.cu", "16 rows, gate and up", "16 x 32", 256, 121, 98304,
        few_rows("fp8_gemm", 16, 2 * INNER, HIDDEN), 256 * 256,
    ),
    Kernel(
        "linear.cu", "1 row of 16 bits, gate and up", "16 x 32", 256, 84, 98304,
        few_rows("fp8_linear", 1, 2 * INNER, HIDDEN), 256 * 256,
    ),
    Kernel(
        "linear_sm90.cu", "rows, 8192^3", "128 x 256 x 128", 384, 168, 231504,
        many_rows(8192, 8192, 8192),
    ),
    Kernel(
        "linear_sm90.cu", "blocks, 4096 x 7168 x 16384", "128 x 256 x 128", 384, 168, 232048,
        many_rows(4096, 7168, 16384),
    ),
)  # fmt: skip


def figures(k: Kernel, gpu: Gpu) -> str:
    """ "123 us, 3.9 TB/s, 91 %": time, rate, share of the limit."""
    p = k.predict(gpu)
    rate = f"{p.rate / 1e12:.2f} TB/s" if p.limit != "matrix" else f"{p.rate / 1e12:.0f} TFLOP/s"
    return f"{p.seconds * 1e6:.4g} us, {rate}, {p.share:.0%}"


def markdown() -> str:
    """The docs' table."""
    limits = [
        f"{name}: copy {gpu.bandwidth / 1e12:.1f} TB/s, bf16 {gpu.bf16 / 1e12:.0f} TFLOP/s"
        for name, gpu in GPUS.items()
    ]
    lines = [
        f"Predicted, not measured: time, rate, share of the limit. {'; '.join(limits)}; FP8 twice "
        "bf16's rate (assumed).",
        "",
        "| file | for | tile | threads | registers | shared memory | blocks an SM | GB | TFLOP | "
        "bound by | H200 | H100 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in KERNELS:
        p = k.predict(GPUS["H200"])
        lines.append(
            f"| `{k.file}` | {k.case} | {k.tile} | {k.threads} | {k.registers} | {k.shared} | "
            f"{k.blocks} | {p.bytes / 1e9:.3g} | {p.flops / 1e12:.3g} | {p.limit} | "
            f"{figures(k, GPUS['H200'])} | {figures(k, GPUS['H100'])} |"
        )
    return "\n".join(lines)
