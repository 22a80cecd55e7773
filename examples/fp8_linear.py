"""A linear layer with FP8 weights: half of bf16's memory, and half its bytes read for one token."""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_fast as lf

parser = argparse.ArgumentParser()
parser.add_argument("--features", type=int, nargs=2, default=(4096, 14336), metavar=("IN", "OUT"))
args = parser.parse_args()
k, n = args.features

torch.manual_seed(0)
weight = torch.randn(n, k, dtype=torch.bfloat16) / k**0.5
x = torch.randn(1, k, dtype=torch.bfloat16)

q, scale = lf.quantize_fp8(weight)  # e4m3 [n, k], fp32 [n, 1]: weight is about q * scale
packed = lf.pack_weight(q)  # once, after loading: the order in which the kernel reads it


def best_ms(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


bf16, fp8 = F.linear(x, weight), lf.fp8_linear(x, packed, scale)
error = (fp8 - bf16).float().norm() / bf16.float().norm()
print(f"{weight.nbytes / 2**20:.1f} MiB -> {(packed.nbytes + scale.nbytes) / 2**20:.1f} MiB")
print(f"relative difference {error:.3f}: e4m3 has 3 bits of mantissa, and errors average out")
print(f"bf16 F.linear {best_ms(lambda: F.linear(x, weight)):.2f} ms", end=", ")
print(f"fp8_linear {best_ms(lambda: lf.fp8_linear(x, packed, scale)):.2f} ms")
