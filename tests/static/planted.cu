// Kernels with one fault each, and one without: what bench.static.cuda must and must not report.
#include <cstdint>

namespace {

// 96 values that all live at once, in 64 registers: 1,024 threads leave no more.
__global__ void __launch_bounds__(1024) spills_kernel(const float* x, float* out, int n) {
  float held[96] = {};
  for (int step = 0; step < n; ++step) {
#pragma unroll
    for (int i = 0; i < 96; ++i) held[i] = held[i] * held[(i + 1) % 96] + x[step];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) out[threadIdx.x * 96 + i] = held[i];
}

// The same where they have room, for fewer blocks than planned.
__global__ void __launch_bounds__(256) wide_kernel(const float* x, float* out, int n) {
  float held[96] = {};
  for (int step = 0; step < n; ++step) {
#pragma unroll
    for (int i = 0; i < 96; ++i) held[i] = held[i] * held[(i + 1) % 96] + x[step];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) out[threadIdx.x * 96 + i] = held[i];
}

__global__ void indexed_kernel(const int* at, float* out, int n) {
  float held[32];
  for (int i = 0; i < n; ++i) held[at[i]] = static_cast<float>(i);
  out[threadIdx.x] = held[at[n]];
}

__global__ void static_shared_kernel(float* out) {
  __shared__ float held[64];
  held[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[63 - threadIdx.x];
}

// 16 bytes a thread, or four times four.
template <bool vectors>
__global__ void copy_kernel(const uint4* x, uint4* out) {
  if (vectors) {
    out[threadIdx.x] = x[threadIdx.x];
  } else {
    for (int i = 0; i < 4; ++i)
      reinterpret_cast<volatile uint32_t*>(out)[4 * threadIdx.x + i] =
          reinterpret_cast<const volatile uint32_t*>(x)[4 * threadIdx.x + i];
  }
}

// 16 bytes a thread, divided, by indices that are divided too; or neither.
template <bool divides>
__global__ void scale_kernel(const float4* x, float4* out, float scale, int64_t pieces) {
  const int64_t item = divides ? (blockIdx.x + pieces) / pieces * blockDim.x : blockIdx.x;
  float4 v = x[item + threadIdx.x];
  if (divides)
    v.x = __fdiv_rn(v.x, scale);
  else
    v.x *= scale;
  out[item + threadIdx.x] = v;
}

// Four copies of 16 bytes a thread under way, or each waited for.
template <bool together>
__global__ void stream_kernel(const uint4* x, uint4* out) {
  extern __shared__ uint4 held[];
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(held + i * n + t))),
                 "l"(x + i * n + t));
    asm volatile("cp.async.commit_group;");
    if (!together) asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) out[i * n + t] = held[i * n + t];
}

// Four wgmma a group; touching the sums between them makes ptxas wait for each.
template <bool touched>
__global__ void __launch_bounds__(128) wgmma_kernel(float* out, uint64_t a, uint64_t b, int n) {
  float d[4] = {};
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.fence.sync.aligned;");
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
          "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "l"(a + k), "l"(b + k));
      if (touched) d[0] += 1;
    }
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}

// A mask of scores whose positions are of 64 bits.
template <class Position>
__global__ void __launch_bounds__(128)
    masked_kernel(float* out, uint64_t a, Position limit, Position row) {
  float d[4] = {};
  for (Position i = 0; i < limit; i += 8) {
    asm volatile("wgmma.fence.sync.aligned;");
    for (int k = 0; k < 2; ++k)
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
          "{%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "l"(a + k));
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    for (int j = 0; j < 4; ++j)
      if (i + j > row + threadIdx.x) d[j] = 0;
  }
  for (int j = 0; j < 4; ++j) out[threadIdx.x * 4 + j] = d[j];
}

// A producer that leaves registers to two consumers: enough, or too few.
template <int released>
__global__ void __launch_bounds__(384, 1) pool_kernel(float* out) {
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(released));
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    out[threadIdx.x] = 1;
  }
}

// Reads what a kernel before it may still be writing, or waits first.
template <bool early>
__global__ void dependent_kernel(const float* x, float* out) {
  float first = 0;
  if (early) first = *reinterpret_cast<const volatile float*>(x);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  out[threadIdx.x] = x[threadIdx.x] + first;
}

template __global__ void dependent_kernel<true>(const float*, float*);
template __global__ void dependent_kernel<false>(const float*, float*);
template __global__ void masked_kernel<int>(float*, uint64_t, int, int);
template __global__ void masked_kernel<int64_t>(float*, uint64_t, int64_t, int64_t);
template __global__ void pool_kernel<24>(float*);
template __global__ void pool_kernel<32>(float*);
template __global__ void copy_kernel<true>(const uint4*, uint4*);
template __global__ void copy_kernel<false>(const uint4*, uint4*);
template __global__ void scale_kernel<true>(const float4*, float4*, float, int64_t);
template __global__ void scale_kernel<false>(const float4*, float4*, float, int64_t);
template __global__ void stream_kernel<true>(const uint4*, uint4*);
template __global__ void stream_kernel<false>(const uint4*, uint4*);
template __global__ void wgmma_kernel<true>(float*, uint64_t, uint64_t, int);
template __global__ void wgmma_kernel<false>(float*, uint64_t, uint64_t, int);

}  // namespace
