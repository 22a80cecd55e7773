"""Check compiled kernels without a GPU: python -m bench.static cuda | triton."""

LINEAR = "linear"  # stem of the matrix products' files in kernels/ and csrc/cuda
