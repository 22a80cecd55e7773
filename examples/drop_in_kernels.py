"""A Llama block in plain PyTorch, and the same block with the kernels.

The weights and the signature stay the same; only the body of forward changes.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llama_fast as lf

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--hidden", type=int, default=2048)
args = parser.parse_args()
D = 64


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = hidden // D, hidden // D // 4
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * D, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 8 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.view(-1, self.heads + 2 * self.kv_heads, D).split(
            (self.heads, self.kv_heads, self.kv_heads), dim=1
        )

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]; table [T, D] holds cosines, then sines."""
        q, k, v = self.split(self.qkv(self.norm1(x)))
        q, k = rotate(q, table), rotate(k, table)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(a[0].transpose(0, 1).flatten(1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table[:, None].chunk(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class FastBlock(Block):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(lf.rms_norm(x, self.norm1.weight)))
        q, k = lf.apply_rope(q, k, torch.arange(len(x)), table)
        a = lf.attention(q[None], k[None], v[None])[0].flatten(1)
        h, x = lf.add_rms_norm(self.out(a), x, self.norm2.weight)
        return x + self.down(lf.silu_and_mul(self.gate_up(h)))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    eager = Block(args.hidden).bfloat16()
    fast = FastBlock(args.hidden).bfloat16()
    fast.load_state_dict(eager.state_dict())
    x = torch.randn(args.tokens, args.hidden, dtype=torch.bfloat16)
    table = lf.rope_table(500000.0, args.tokens, head_dim=D)

    error = (fast(x, table) - eager(x, table)).float().norm() / eager(x, table).float().norm()
    print(f"relative difference {error:.2e}; bf16 rounds at {2**-8:.1e}")
    best = {"eager": float("inf"), "fast": float("inf")}
    for _ in range(5):  # alternately, so that both see the same load
        for name, block in (("eager", eager), ("fast", fast)):
            start = time.perf_counter()
            block(x, table)
            best[name] = min(best[name], time.perf_counter() - start)
    print(", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in best.items()))


main()
