// CUDA C++'s names for the threads of block.h: indices, barriers, shuffles and votes, atomics,
// intrinsics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

#undef __shared__
#define __shared__ static_assert(false, "use LF_DYNAMIC_SHARED: the emulator guards that memory");
#undef __launch_bounds__
#define __launch_bounds__(...)

#define threadIdx (::lf::emu::self().index)
#define blockIdx (::lf::emu::block().index)
#define blockDim (::lf::emu::block().size)
#define gridDim (::lf::emu::block().grid)

inline void __syncthreads() {
  using namespace lf::emu;
  barrier(block().barriers[0], static_cast<int>(block().threads.size()), true, "__syncthreads");
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  using namespace lf::emu;
  meet("__syncwarp", warp_first(), 32, warp_mask(mask), nullptr, [](std::vector<void*>&) {});
}

namespace lf::emu {
// Gives every lane the value of lane source(lane), which is the lane itself outside its segment.
template <class T, class F>
T shuffle(const char* what, unsigned mask, T value, F source) {
  struct Slot {
    T in, out;
    F source;
  } slot{value, value, source};
  const uint64_t lanes = warp_mask(mask);
  meet(what, warp_first(), 32, lanes, &slot, [lanes](std::vector<void*>& a) {
    for (int i = 0; i < 32; ++i)
      if (a[i]) {
        auto* mine = static_cast<Slot*>(a[i]);
        const int from = mine->source(i);
        if (from < 0 || from > 31 || !a[from]) continue;  // undefined on hardware: keeps its own
        mine->out = static_cast<Slot*>(a[from])->in;
      }
  });
  return slot.out;
}

template <class F>
unsigned vote(const char* what, unsigned mask, bool value, F combine) {
  struct Slot {
    bool in;
    unsigned out;
  } slot{value, 0};
  meet(what, warp_first(), 32, warp_mask(mask), &slot, [&](std::vector<void*>& a) {
    unsigned ballot = 0, active = 0;
    for (int i = 0; i < 32; ++i)
      if (a[i]) {
        active |= 1u << i;
        if (static_cast<Slot*>(a[i])->in) ballot |= 1u << i;
      }
    for (void* p : a)
      if (p) static_cast<Slot*>(p)->out = combine(ballot, active);
  });
  return slot.out;
}
}  // namespace lf::emu

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return lf::emu::shuffle("__shfl_xor_sync", mask, value, [=](int lane) {
    const int from = lane ^ lane_mask;
    return from / width > lane / width ? lane : from;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return lf::emu::shuffle("__shfl_down_sync", mask, value, [=](int lane) {
    const int from = lane + static_cast<int>(delta);
    return from / width != lane / width ? lane : from;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return lf::emu::shuffle("__shfl_up_sync", mask, value, [=](int lane) {
    const int from = lane - static_cast<int>(delta);
    return from < lane / width * width ? lane : from;
  });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return lf::emu::shuffle("__shfl_sync", mask, value,
                          [=](int lane) { return lane / width * width + source % width; });
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return lf::emu::vote("__ballot_sync", mask, p != 0, [](unsigned b, unsigned) { return b; });
}
inline int __any_sync(unsigned mask, int p) {
  return lf::emu::vote("__any_sync", mask, p != 0, [](unsigned b, unsigned) { return b != 0; });
}
inline int __all_sync(unsigned mask, int p) {
  return lf::emu::vote("__all_sync", mask, p != 0, [](unsigned b, unsigned a) { return b == a; });
}

// One thread runs at a time and only waits yield, so plain code is atomic.
template <class T>
T atomicAdd(T* p, T v) {
  const T before = *p;
  *p = before + v;
  return before;
}
template <class T>
T atomicMax(T* p, T v) {
  const T before = *p;
  *p = before < v ? v : before;
  return before;
}
template <class T>
T atomicExch(T* p, T v) {
  const T before = *p;
  *p = v;
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* p) {
  return *p;
}
// Each digit of the selector names a byte of a (0 to 3) or b (4 to 7), lowest first.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i)
    r |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {  // of each half
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}
inline float __int_as_float(int i) {
  float f;
  std::memcpy(&f, &i, 4);
  return f;
}
inline int __float_as_int(float f) {
  int i;
  std::memcpy(&i, &f, 4);
  return i;
}
inline unsigned __float_as_uint(float f) { return static_cast<unsigned>(__float_as_int(f)); }
inline float __uint_as_float(unsigned u) { return __int_as_float(static_cast<int>(u)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
