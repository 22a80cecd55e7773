"""Test what these tests require of a matrix product, in the interpreter or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

M, N, K = 32, 64, 32


@triton.jit
def product_kernel(out, a, b, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision="ieee"))


@pytest.mark.triton
def test_f41_a_product_does_not_depend_on_its_place(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotate the rows and columns of a tile. numpy's matmul, a BLAS, fails this with
    OPENBLAS_CORETYPE=Haswell or Zen. Other BLAS may pass, so the test forbids them all."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the interpreter called a BLAS")

    if device.type == "cpu":
        monkeypatch.setattr(np, "matmul", refuse)
    a, b = torch.randn(M, K, device=device), torch.randn(K, N, device=device)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.empty(M, N, device=device)
        product_kernel[(1,)](out, a.contiguous(), b.contiguous(), M, N, K)
        return out

    whole = product(a, b)
    torch.testing.assert_close(whole.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    for i in range(1, N):
        assert torch.equal(product(a.roll(i, 0), b.roll(i, 1)), whole.roll((i, i), (0, 1)))
