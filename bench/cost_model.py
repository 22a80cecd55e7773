"""python -m bench.cost_model: what the Triton kernels should take, before anybody measures; with
--write, what CUDA's should (cuda_model.py).

Each op states its bytes, flops and arithmetic; roofline.py makes a time of them. Tiles and how many
programs a multiprocessor holds come from the static table (bench.static).

Predictions, not measurements: the GPU report prints them beside measured figures, and where the two
differ one of the two has something to learn.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from .roofline import GPUS, H200, Gpu, Prediction, Work, time
from .static_table import resident

# Of attention's arithmetic behind its products: chosen so that the model gives 477 TFLOP/s at 16k,
# the best published for a Triton kernel on an H100. FlashAttention 3, whose consumers take turns on
# purpose, reaches 0.6.
SOFTMAX_OVERLAP = 0.05
# Of sums moved out of the matrix unit: assumed, one half of the warps adding while the other
# multiplies. DeepGEMM, which arranges that, comes near 1.
PROMOTION_OVERLAP = 0.5
# Instructions a score besides its exponential: scale and subtract, maximum, sum, half a conversion,
# its share of rescaling the accumulator.
SCORE_FP32 = 5.0

# ---- the ops: bytes and flops in bf16, each input read and each output written once ----


def _norm(op: str, rows: int, hidden: int, residual: bool = False) -> Work:
    """rms_norm, add_rms_norm, rms_norm_fp8."""
    fp8, residual = op == "rms_norm_fp8", residual or op == "add_rms_norm"
    bytes_each = 2 + (1 if fp8 else 2) + (4 if residual else 0)
    r = resident("_rms_norm_kernel", f"8B{' + residual' * residual}{' FP8' * fp8}")
    return Work(
        bytes=rows * (hidden * bytes_each + (4 if fp8 else 0)),
        flops=rows * hidden * (7 if fp8 else 5 if residual else 4),
        fp32=rows * hidden * (25 if fp8 else 11),
        per_sm=r.blocks,
        in_flight=r.in_flight((4 if residual else 2) * hidden),
    )


def _silu(op: str, rows: int, inner: int) -> Work:
    fp8 = op.endswith("_fp8")
    r = resident("_row_fp8_kernel" if fp8 else "_tile_kernel", "8B FP8" if fp8 else "8B")
    return Work(
        bytes=rows * (inner * (5 if fp8 else 6) + (4 if fp8 else 0)),
        flops=5 * rows * inner,
        exponentials=rows * inner,
        fp32=rows * inner * (35 if fp8 else 20),
        per_sm=r.blocks,
        in_flight=r.in_flight(4 * r.constants.get("BLOCK", 2048)),
    )


def _quantize(op: str, rows: int, hidden: int) -> Work:
    r = resident("_group_kernel", "row 8B")
    return Work(
        bytes=rows * (3 * hidden + 4),
        flops=3 * rows * hidden,
        fp32=rows * hidden * 15,
        per_sm=r.blocks,
        in_flight=r.in_flight(2 * hidden),
    )


def _rope(op: str, tokens: int, heads: int, kv_heads: int, d: int) -> Work:
    """Appending moves v as well."""
    values = tokens * (heads + (2 if op.endswith("append") else 1) * kv_heads) * d
    return Work(bytes=4 * values + 4 * tokens * d, flops=3 * values, fp32=6 * values)


def scores_of_tiles(seqlen_q: int, seqlen_k: int, m: int, n: int, causal: bool) -> int:
    """What a head computes in tiles of m queries by n keys; rows past the end count."""
    scores = 0
    for first in range(0, seqlen_q, m):
        last = min(first + m, seqlen_q) - 1
        keys = min(max(last + 1 + seqlen_k - seqlen_q, 0), seqlen_k) if causal else seqlen_k
        scores += m * -(-keys // n) * n
    return scores


def _attention(
    op: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: int,
    kv_heads: int,
    d: int,
    causal: bool = True,
) -> Work:
    """Tiles on the diagonal are computed whole. The heaviest come first, so that the last round
    is as full as the average."""
    r = resident("_attention", "causal" if causal else "full")
    m, n = r.constants.get("BLOCK_M", 128), r.constants.get("BLOCK_N", 128)
    scores = scores_of_tiles(seqlen_q, seqlen_k, m, n, causal)
    if causal:
        seen = (seqlen_k - seqlen_q + 1, seqlen_k)
        useful = seqlen_q * (max(seen[0], 0) + seen[1]) / 2
    else:
        useful = seqlen_q * seqlen_k
    tiles = batch * heads * -(-seqlen_q // m)
    scores, useful = scores * batch * heads, useful * batch * heads
    return Work(
        bytes=2 * batch * d * (2 * seqlen_q * heads + 2 * seqlen_k * kv_heads),
        flops=4 * d * useful,
        executed=4 * d * scores,
        exponentials=scores,
        fp32=SCORE_FP32 * scores,
        overlap=SOFTMAX_OVERLAP,
        programs=0 if causal else tiles,
        per_sm=r.blocks,
    )


def _cached(
    op: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: int,
    kv_heads: int,
    d: int,
    cache_bytes: int = 2,
    causal: bool = True,
) -> Work:
    """One query: the cache streams past, and a second launch adds the splits."""
    if seqlen_q > 16:
        return _attention(op, batch, seqlen_q, seqlen_k, heads, kv_heads, d, causal)
    r = resident("_attend", "FP8" if cache_bytes == 1 else "paged")
    cache = 2 * batch * seqlen_k * kv_heads * d
    rows = max(16, seqlen_q * heads // kv_heads)  # of the tile that the heads of a key share
    return Work(
        bytes=cache * cache_bytes + 4 * batch * seqlen_q * heads * d,
        flops=4 * d * batch * seqlen_q * heads * seqlen_k,
        executed=4 * d * batch * kv_heads * rows * seqlen_k,
        exponentials=batch * kv_heads * rows * seqlen_k,
        fp32=SCORE_FP32 * batch * kv_heads * rows * seqlen_k + cache * (2 - cache_bytes),
        launches=2,
        per_sm=r.blocks,
        in_flight=r.in_flight(0),
    )


def _product(op: str, m: int, n: int, k: int) -> Work:
    """linear, fp8_linear (an FP8 weight, x in 16 bits), fp8_gemm."""
    few = m <= 64
    x_bytes = 1 if op == "fp8_gemm" else 2
    weight_bytes = 2 if op == "linear" else 1
    r = resident("_stream", "FP8, 16 rows") if few else resident("_gemm", "8192^3")
    tile_m = max(16, m) if few else r.constants.get("BLOCK_M", 128)
    tile_n = r.constants.get("BLOCK_N", 256)
    tiles = -(-m // tile_m) * -(-n // tile_n)
    moved = n * k * weight_bytes + m * k * x_bytes + 2 * m * n
    return Work(
        bytes=moved,
        flops=2 * m * n * k,
        executed=2 * tiles * tile_m * tile_n * k,
        fp32=m * n * k / 128,  # sums moved out of the matrix unit every 128 of k
        fp8=x_bytes == 1,
        overlap=PROMOTION_OVERLAP,
        programs=0 if few else tiles,
        per_sm=r.blocks,
        in_flight=r.in_flight(0) if few else math.inf,
    )


_OPS: dict[str, Callable[..., Work]] = {
    "rms_norm": _norm,
    "add_rms_norm": _norm,
    "rms_norm_fp8": _norm,
    "silu_and_mul": _silu,
    "silu_and_mul_fp8": _silu,
    "quantize_fp8": _quantize,
    "apply_rope": _rope,
    "apply_rope_and_append": _rope,
    "attention": _attention,
    "attention_with_kvcache": _cached,
    "linear": _product,
    "fp8_linear": _product,
    "fp8_gemm": _product,
}


def work_of(op: str, **shape: int | bool) -> Work:
    """What an op asks for at a shape, named as in the functions above."""
    if op not in _OPS:
        raise ValueError(f"op: got {op!r}, want one of {', '.join(_OPS)}")
    return _OPS[op](op, **shape)


def predict(op: str, gpu: Gpu = H200, **shape: int | bool) -> Prediction:
    """Triton's kernel for an op; unknown ops are a ValueError."""
    if op == "fp8_linear" and shape.pop("quantised", False):  # one kernel after the other
        quantise = predict("quantize_fp8", gpu, rows=shape["m"], hidden=shape["k"])
        return predict("fp8_gemm", gpu, **shape).after(quantise)
    return time(op, work_of(op, **shape), gpu)


def predict_decode(fp8: bool, context: int = 1024, gpu: Gpu = H200) -> float:
    """Seconds a token of Llama 3.1 8B, one sequence, its kernels one after another in a graph.
    FP8 quantises activations too: in the norms and in SwiGLU, and by itself after attention."""
    hidden, inner, layers, vocabulary = 4096, 14336, 32, 128256
    heads, kv_heads, d = 32, 8, 128
    norm, product, silu = (
        ("rms_norm_fp8", "fp8_gemm", "silu_and_mul_fp8")
        if fp8
        else ("add_rms_norm", "linear", "silu_and_mul")
    )
    shape = {"heads": heads, "kv_heads": kv_heads, "d": d}
    layer: list[tuple[str, dict[str, int | bool]]] = [
        (norm, {"rows": 1, "hidden": hidden, "residual": True}),
        (product, {"m": 1, "n": (heads + 2 * kv_heads) * d, "k": hidden}),
        ("apply_rope_and_append", {"tokens": 1, **shape}),
        ("attention_with_kvcache", {"batch": 1, "seqlen_q": 1, "seqlen_k": context, **shape}),
        *([("quantize_fp8", {"rows": 1, "hidden": heads * d})] if fp8 else []),
        (product, {"m": 1, "n": hidden, "k": heads * d}),
        (norm, {"rows": 1, "hidden": hidden, "residual": True}),
        (product, {"m": 1, "n": 2 * inner, "k": hidden}),
        (silu, {"rows": 1, "inner": inner}),
        (product, {"m": 1, "n": hidden, "k": inner}),
    ]
    head = predict("linear", gpu, m=1, n=vocabulary, k=hidden)  # stays in 16 bits
    return layers * sum(predict(op, gpu, **s).seconds for op, s in layer) + head.seconds


# ---- the command ----

# TARGETS: what, the prediction's op and shape, the figure wanted and its unit.
_LAYER = {"heads": 32, "kv_heads": 8, "d": 128}
ROWS: list[tuple[str, str, dict[str, int | bool], float, str]] = [
    ("RMSNorm, 32k x 4096", "rms_norm", {"rows": 32768, "hidden": 4096}, 0.92, "of copy"),
    (
        "norm + residual + FP8, 32k x 4096",
        "rms_norm_fp8",
        {"rows": 32768, "hidden": 4096, "residual": True},
        0.88,
        "of copy",
    ),
    ("RoPE, 32k tokens", "apply_rope", {"tokens": 32768, **_LAYER}, 0.85, "of copy"),
    (
        "RoPE + append, 32k tokens",
        "apply_rope_and_append",
        {"tokens": 32768, **_LAYER},
        0.85,
        "of copy",
    ),
    (
        "prefill attention, causal, 16k",
        "attention",
        {"batch": 1, "seqlen_q": 16384, "seqlen_k": 16384, **_LAYER},
        480,
        "TFLOP/s",
    ),
    (
        "decode attention, B32 x 4k",
        "attention_with_kvcache",
        {"batch": 32, "seqlen_q": 1, "seqlen_k": 4096, **_LAYER},
        4.0,
        "TB/s",
    ),
    (
        "decode attention, B1 x 128k",
        "attention_with_kvcache",
        {"batch": 1, "seqlen_q": 1, "seqlen_k": 131072, **_LAYER},
        0.85,
        "of copy",
    ),
    ("FP8 GEMM, row-wise 8192^3", "fp8_gemm", {"m": 8192, "n": 8192, "k": 8192}, 1360, "TFLOP/s"),
    (
        "the same with quantisation",
        "fp8_linear",
        {"m": 8192, "n": 8192, "k": 8192, "quantised": True},
        1300,
        "TFLOP/s",
    ),
    (
        "FP8 GEMM, blocks, 4096 x 7168 x 16384",
        "fp8_gemm",
        {"m": 4096, "n": 7168, "k": 16384},
        1550,
        "TFLOP/s",
    ),
    ("FP8 GEMM, M = 16, gate and up", "fp8_linear", {"m": 16, "n": 28672, "k": 4096}, 3.6, "TB/s"),
]


def figure(p: Prediction, unit: str, gpu: Gpu) -> float:
    per = {
        "of copy": p.bytes / gpu.bandwidth,
        "TB/s": p.bytes / 1e12,
        "TFLOP/s": p.flops / 1e12,
    }
    return per[unit] / p.seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cost_model", description=__doc__)
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the CUDA kernels' table between its markers"
    )
    args = parser.parse_args(argv)
    if args.write:
        from . import cuda_model, report  # which build on this module

        report.insert(args.write, cuda_model.markdown(), "cuda model")
        return 0
    gpu = GPUS[args.gpu]
    print(
        f"{gpu.name}: copy {gpu.bandwidth / 1e12:.1f} TB/s, bf16 {gpu.bf16 / 1e12:.0f} TFLOP/s, "
        f"FP8 {gpu.fp8 / 1e12:.0f} (assumed); predicted, not measured"
    )
    print(f"{'':<40}{'predicted':>12}{'':>18}{'target':>10}  bound by")
    for what, op, shape, target, unit in ROWS:
        p = predict(op, gpu, **shape)
        print(
            f"{what:<40}{p.seconds * 1e6:>9.1f} us{figure(p, unit, gpu):>10.4g} {unit:<7}"
            f"{target:>10g}  {p.limit}, {p.share:.0%} of it"
        )
    for fp8, target in ((False, 230), (True, 420)):
        rate = 1 / predict_decode(fp8, gpu=gpu)
        what = f"8B decode, batch 1, {'FP8' if fp8 else 'bf16'}"
        print(f"{what:<40}{1e6 / rate:>9.1f} us{rate:>10.4g} tok/s  {target:>10g}  memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
