"""What PyTorch itself offers against our kernels on a GPU. Each is tried once, on the case's own
tensors; what this version or chip does not offer is left out by name, with its reason."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .timing import Run

# Raised by what a version or a chip does not offer.
REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError)


class Baselines:
    """The runs of one case: ours first, then what it is compared with."""

    def __init__(self, ours: Run) -> None:
        self.runs: dict[str, Run] = {"ours": ours}
        self.skipped: dict[str, str] = {}  # name -> why

    def add(self, name: str, run: Run) -> Baselines:
        self.runs[name] = run
        return self

    def offer(self, name: str, run: Run) -> bool:
        """As add, if the run works."""
        try:
            with warnings.catch_warnings():  # SDPA explains each of its refusals
                warnings.simplefilter("ignore")
                run(0)
        except REFUSALS as error:
            self.skipped[name] = first_line(error)
            return False
        self.runs[name] = run
        return True


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class Compiler:
    """torch.compile of eager twins, as long as the seconds set aside for compiling last."""

    def __init__(self, budget: float) -> None:
        self.left = budget

    def offer(self, to: Baselines, f: Callable[..., Any], arguments: Callable[[int], Any]) -> None:
        """Adds "torch.compile" of f. arguments(i): the tuple that f is called with."""
        if self.left <= 0:
            to.skipped["torch.compile"] = "the time set aside for compiling is spent"
            return
        began = time.perf_counter()
        torch._dynamo.reset()  # or one case's shapes count against another's limit of variants
        compiled = torch.compile(f, dynamic=False)
        to.offer("torch.compile", lambda i: compiled(*arguments(i)))
        self.left -= time.perf_counter() - began


SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def offer_sdpa(
    to: Baselines, tensors: Callable[[int], tuple[Tensor, Tensor, Tensor]], causal: bool
) -> None:
    """tensors(i): q [B, Sq, H, D], k and v [B, Sk, Hkv, D]. Who knows no groups of heads gets k and
    v already repeated, outside of the time."""

    def attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    for name, backend in SDPA.items():
        if to.offer(name, lambda i, b=backend: attend(b, *tensors(i))):
            continue
        if _fits(*tensors(0)):
            q, k, v = tensors(0)
            group = q.shape[2] // k.shape[2]
            k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
            repeated = f"{name}, K/V repeated"
            to.offer(repeated, lambda _, b=backend, q=q, k=k, v=v: attend(b, q, k, v))


def _fits(q: Tensor, k: Tensor, v: Tensor, most: int = 4 << 30) -> bool:
    """Whether repeating k and v for each query head stays below `most` bytes."""
    return (k.nbytes + v.nbytes) * (q.shape[2] // k.shape[2]) <= most


def offer_scaled_mm(
    to: Baselines,
    operands: Callable[[int], tuple[Tensor, Tensor]],
    scale_a: Tensor,
    scale_b: Tensor,
) -> None:
    """operands(i): a [M, K], b [N, K] e4m3; scales [M, 1] and [N, 1]. bf16 out, as ours."""
    one = torch.ones((), device=scale_a.device)
    scales = {"tensor": (one, one), "row": (scale_a, scale_b.t().contiguous())}
    for granularity, (sa, sb) in scales.items():
        for fast in (True, False):

            def run(i: int, sa: Tensor = sa, sb: Tensor = sb, fast: bool = fast) -> Tensor:
                a, b = operands(i)
                return torch._scaled_mm(
                    a, b.t(), sa, sb, out_dtype=torch.bfloat16, use_fast_accum=fast
                )

            to.offer(f"_scaled_mm {granularity}{', fast' if fast else ''}", run)


def offer_scaled_mm_blocks(
    to: Baselines,
    operands: Callable[[int], tuple[Tensor, Tensor]],
    scale_a: Tensor,
    scale_b: Tensor,
) -> None:
    """scale_a [M, K / 128] and scale_b [N / 128, K / 128], which torch wants column-major."""
    sa, sb = scale_a.t().contiguous().t(), scale_b.t()

    def run(i: int) -> Tensor:
        a, b = operands(i)
        return torch._scaled_mm(a, b.t(), sa, sb, out_dtype=torch.bfloat16)

    to.offer("_scaled_mm blocks", run)
