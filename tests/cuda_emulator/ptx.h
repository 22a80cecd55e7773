// csrc/cuda/common/ptx.cuh, executed on a CPU as the PTX ISA defines each instruction.
#pragma once

#include <cfloat>

#include "emulator.h"

#define LF_DYNAMIC_SHARED(name) unsigned char* const name = ::lf::emu::block().shared

namespace lf::emu {

inline void check_shared(const char* what, const void* p, size_t bytes, size_t alignment) {
  const auto* at = static_cast<const unsigned char*>(p);
  const Block& b = block();
  if (at < b.shared || at + bytes > b.shared + b.shared_bytes)
    fail(std::string(what) + ": outside shared memory");
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fail(std::string(what) + ": address not aligned to " + std::to_string(alignment));
}

inline void land(const std::vector<AsyncCopy>& group) {
  for (const AsyncCopy& c : group) {
    if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
    std::memset(static_cast<unsigned char*>(c.to) + c.bytes, 0, c.zeros);
  }
}

// Poisons its destination: a read of the old data, or before the wait, gives NaN.
inline void cp_async(const char* what, void* to, const void* from, size_t size, int valid) {
  check_shared(what, to, size, size);
  if (reinterpret_cast<uintptr_t>(from) % size)
    fail(std::string(what) + ": source not " + std::to_string(size) + "-byte aligned");
  if (valid < 0 || valid > static_cast<int>(size))
    fail(std::string(what) + ": valid bytes not in 0 to " + std::to_string(size));
  std::memset(to, 0xff, size);
  const size_t bytes = static_cast<size_t>(valid);
  self().open.push_back({to, from, bytes, size - bytes});
}

inline float to_float(uint16_t bits, __nv_bfloat16) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
inline float to_float(uint16_t bits, __half) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}
inline float e4m3_to_float(uint8_t bits) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
}

// d [16, 8] += a [16, depth] b [8, depth]^T with the fragments of all 32 lanes. With `per` elements
// in a register, lane = 4 * group + i holds of a: rows group and group + 8, columns per * i .. of
// each half of depth; of b: row group, the same columns; of d: rows group and group + 8, columns
// 2 * i and 2 * i + 1. (PTX ISA, "Matrix Fragments for mma.m16n8k16/k32".)
struct MmaArguments {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <int depth, class Element>
void mma(std::vector<void*>& lanes, Element element) {
  constexpr int per = depth / 8;
  float a[16][depth], b[8][depth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& args = *static_cast<MmaArguments*>(lanes[lane]);
    const int group = lane / 4, i = lane % 4;
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < per; ++e) {
        const int column = half * depth / 2 + i * per + e;
        a[group][column] = element(args.a[2 * half], e);
        a[group + 8][column] = element(args.a[2 * half + 1], e);
        b[group][column] = element(args.b[half], e);
      }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<MmaArguments*>(lanes[lane])->d;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      float sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[column][k];
      d[e] += sum;
    }
  }
}

inline void warp_mma(const char* what, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                     uint32_t b1, const std::function<void(std::vector<void*>&)>& act) {
  MmaArguments arguments{d, a, {b0, b1}};
  if (warp_mask(~0u) != 0xffffffffull) fail(std::string(what) + ": needs a whole warp");
  meet(what, warp_first(), 32, 0xffffffffull, &arguments, act);
}

inline void ldmatrix(const char* what, uint32_t (&r)[4], const void* row, bool transposed) {
  struct Arguments {
    uint32_t* r;
    const uint16_t* row;
  } arguments{r, static_cast<const uint16_t*>(row)};
  check_shared(what, row, 16, 16);
  meet(what, warp_first(), 32, 0xffffffffull, &arguments, [transposed](std::vector<void*>& lanes) {
    uint16_t m[4][8][8];
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(m[lane / 8][lane % 8], static_cast<Arguments*>(lanes[lane])->row, 16);
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        const int at = lane / 4, pair = lane % 4 * 2;
        const uint32_t low = transposed ? m[j][pair][at] : m[j][at][pair];
        const uint32_t high = transposed ? m[j][pair + 1][at] : m[j][at][pair + 1];
        static_cast<Arguments*>(lanes[lane])->r[j] = low | high << 16;
      }
  });
}

}  // namespace lf::emu

namespace lf::ptx {

inline void store_16(void* to, const uint4& v) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emu::fail("store_16: target not 16-byte aligned");
  std::memcpy(to, &v, 16);
}

inline void cp_async_16(void* to, const void* from, int valid = 16) {
  emu::cp_async("cp.async", to, from, 16, valid);
}
inline void cp_async_commit() {
  emu::self().groups.push_back(std::move(emu::self().open));
  emu::self().open.clear();
}
template <int pending>
void cp_async_wait() {
  auto& groups = emu::self().groups;
  while (groups.size() > pending) {
    emu::land(groups.front());
    groups.erase(groups.begin());
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emu::ldmatrix("ldmatrix.x4", r, row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emu::ldmatrix("ldmatrix.x4.trans", r, row, true);
}

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  emu::warp_mma("mma.m16n8k16", d, a, b0, b1, [type](std::vector<void*>& lanes) {
    emu::mma<16>(lanes, [type](uint32_t r, int e) {
      return emu::to_float(static_cast<uint16_t>(r >> 16 * e), type);
    });
  });
}
constexpr bool kShortSums = false;  // those of sm_90
inline void mma_16832_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emu::warp_mma("mma.m16n8k32.e4m3", d, a, b0, b1, [](std::vector<void*>& lanes) {
    emu::mma<32>(lanes, [](uint32_t r, int e) {
      return emu::e4m3_to_float(static_cast<uint8_t>(r >> 8 * e));
    });
  });
}

inline void named_barrier_sync(int id, int count) {
  emu::barrier(emu::block().barriers[id], count, true, "bar.sync");
}
inline void griddepcontrol_wait() { emu::self().grid_waited = true; }
inline void griddepcontrol_launch_dependents() {}

inline void named_barrier_arrive(int id, int count) {
  emu::barrier(emu::block().barriers[id], count, false, "bar.arrive");
}

inline int opaque(int x) { return x; }

inline float exp2_approx(float x) { return std::exp2(x); }

// rcp.approx.ftz may be off by an ulp; here it is off by one either way, except where a Newton step
// would not correct that (33 of 2^23 mantissas): __frcp_rn is this instruction and that step.
inline float rcp_approx(float x) {
  const float exact = 1 / x;
  if (!(std::fabs(exact) >= FLT_MIN)) return std::copysign(exact == exact ? 0.0f : exact, exact);
  if (!(std::fabs(x) >= FLT_MIN)) return std::copysign(INFINITY, x);
  const float off =
      __uint_as_float(__float_as_uint(exact) + (__float_as_uint(x) * 0x9e3779b9u >> 31 ? 1 : -1));
  return std::fma(off, std::fma(-x, off, 1.0f), off) == exact ? off : exact;
}

}  // namespace lf::ptx
