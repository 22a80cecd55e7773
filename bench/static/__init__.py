"""Check compiled kernels without a GPU: python -m bench.static cuda | triton."""

LINEAR = "fp8_gemm"  # stem of the matrix products' files in kernels/ and csrc/cuda
