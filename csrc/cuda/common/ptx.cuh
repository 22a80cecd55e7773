// PTX instructions of sm_80 and up that C++ cannot express, one small function each. Under
// LF_CUDA_EMULATOR the same names come from tests/cuda_emulator/ptx.h, which executes them on a CPU
// as the PTX ISA defines them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#if defined(LF_CUDA_EMULATOR)
#include "ptx.h"
#else

#define LF_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace lf::ptx {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- cp.async: global to shared memory without registers; lands at the wait ----

// Copies 16 bytes, both addresses 16-byte aligned. Bytes past `valid` (0 to 16) are zero, not read.
__device__ inline void cp_async_16(void* to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's newest groups are in flight. Other threads see the
// data after a barrier.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- ldmatrix: four 8 x 8 matrices of 16 bits; lane l names row l % 8 of matrix l / 8 ----

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- mma.sync: d += a b^T, fp32 sums; a [16, k] row-major, b [8, k] (column-major [k, 8]) ----

__device__ inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// sm_89 and up. The tensor cores of sm_89 keep about 14 bits of a sum of e4m3 products. sm_90
// compiles this mma.sync to two fp16 ones, which keep fp32 precision.
#if __CUDA_ARCH__ == 890
constexpr bool kShortSums = true;
#else
constexpr bool kShortSums = false;
#endif
__device__ inline void mma_16832_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();  // unreachable: the launcher requires sm_89 for FP8 x FP8
#endif
}

// ---- barriers among some of a block's threads; id 1 to 15, count a multiple of 32 ----

__device__ inline void named_barrier_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ inline void named_barrier_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// ---- programmatic dependent launch (sm_90 and up; no-op elsewhere) ----

// Waits until the previous kernels have ended and their writes are visible. In a kernel launched
// with LaunchShape::programmatic, every thread calls this before it reads global memory.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next programmatic kernel start once every block has called this or ended.
__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Stores 16 bytes to global memory at a multiple of 16, by one instruction. The compiler may split
// an assignment into four, and does near divisions.
__device__ inline void store_16(void* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- for the compiler ----

// Returns x with its value hidden from the compiler, so that values computed from it in a loop are
// not kept in registers.
__device__ inline int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- arithmetic ----

__device__ inline float exp2_approx(float x) {  // 2 ulp; -inf gives 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float rcp_approx(float x) {  // 1 ulp; below 2^-126 inputs and results flush to 0
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace lf::ptx

#endif
