// wgmma: a warpgroup multiplies a [64, depth] tile by a [depth, n] tile in shared memory,
// asynchronously. depth is 16 elements of 16 bits or 32 of 8. Needs sm_90a. Under LF_CUDA_EMULATOR
// the same names come from tests/cuda_emulator/hopper.h.
#pragma once

#include "hopper.cuh"

namespace lf::ptx {

// Describes an operand in shared memory under the 128-byte swizzle. Tiles start at multiples of
// 1024 bytes; a step along k within the 128 bytes adds to the address. Byte distances: `stride`
// between groups of 8 rows (k-major) or of 8 values of k (mn-major); `leading` between blocks of
// 128 bytes along mn (mn-major only). Source: PTX ISA, "Matrix Descriptor Format".
#if !defined(LF_CUDA_EMULATOR)
__device__
#endif
    inline uint64_t wgmma_descriptor(const void* tile, int stride = 1024, int leading = 16) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

#if !defined(LF_CUDA_EMULATOR)

// Call before the first wgmma, and after writing registers that a wgmma reads.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` groups are in flight. Only then may their accumulators be read.
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The instruction's text differs in its shape and types only. Operands of n = 64, 128 and 256:
// d's n / 2, then a (a descriptor or four registers), b's descriptor, and whether d is added.
#define LF_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LF_D16(i) LF_D4(i), LF_D4(i + 4), LF_D4(i + 8), LF_D4(i + 12)
#define LF_D32 LF_D16(0), LF_D16(16)
#define LF_D64 LF_D32, LF_D16(32), LF_D16(48)
#define LF_D128 LF_D64, LF_D16(64), LF_D16(80), LF_D16(96), LF_D16(112)
#define LF_T32                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LF_T64                                                                         \
  LF_T32                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LF_T128                                                                        \
  LF_T64                                                                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "   \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "   \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "     \
  "%123, %124, %125, %126, %127"

// b is k-major (mn = 0) or mn-major (1: 16-bit types only). Scales are 1.
#define LF_WGMMA(registers, count, shape, types, tail_shared, tail_registers, Type, mn, p0, p1,    \
                 p2, p3, p4, p5, p6)                                                               \
  template <>                                                                                      \
  __device__ inline void wgmma<Type, mn, registers>(float (&d)[registers], uint64_t a, uint64_t b, \
                                                    bool accumulate) {                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p2                                            \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned." shape ".f32." types " {" LF_T##registers          \
                 "}, " p0 ", " p1 ", p, 1, 1" tail_shared ";\n}"                                   \
                 : LF_D##registers                                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                             \
  }                                                                                                \
  template <>                                                                                      \
  __device__ inline void wgmma<Type, mn, registers>(float (&d)[registers], const uint32_t (&a)[4], \
                                                    uint64_t b, bool accumulate) {                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p5                                            \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned." shape ".f32." types " {" LF_T##registers          \
                 "}, {" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", p, 1, 1" tail_registers ";\n}"      \
                 : LF_D##registers                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                   "r"(static_cast<int>(accumulate)));                                             \
  }

template <class T, bool b_mn_major, int registers>
__device__ void wgmma(float (&d)[registers], uint64_t a, uint64_t b, bool accumulate);
template <class T, bool b_mn_major, int registers>
__device__ void wgmma(float (&d)[registers], const uint32_t (&a)[4], uint64_t b, bool accumulate);

#define LF_P32 "%32", "%33", "%34", "%35", "%36", "%37", "%38"
#define LF_P64 "%64", "%65", "%66", "%67", "%68", "%69", "%70"
#define LF_P128 "%128", "%129", "%130", "%131", "%132", "%133", "%134"
#define LF_EXPAND(...) LF_WGMMA(__VA_ARGS__)
#define LF_WGMMA_16(types, Type, registers, n)                                                   \
  LF_EXPAND(registers, n, "m64n" #n "k16", types, ", 0, 0", ", 0", Type, false, LF_P##registers) \
  LF_EXPAND(registers, n, "m64n" #n "k16", types, ", 0, 1", ", 1", Type, true, LF_P##registers)
LF_WGMMA_16("bf16.bf16", __nv_bfloat16, 32, 64)
LF_WGMMA_16("bf16.bf16", __nv_bfloat16, 64, 128)
LF_WGMMA_16("f16.f16", __half, 32, 64)
LF_WGMMA_16("f16.f16", __half, 64, 128)
LF_WGMMA_16("bf16.bf16", __nv_bfloat16, 128, 256)
LF_WGMMA_16("f16.f16", __half, 128, 256)
LF_EXPAND(64, 128, "m64n128k32", "e4m3.e4m3", "", "", __nv_fp8_e4m3, false, LF_P64)

#endif

}  // namespace lf::ptx
