// csrc/cuda/common/hopper.cuh and wgmma.cuh, executed on a CPU as the PTX ISA defines them.
#pragma once

#include <cuda.h>

#include <array>
#include <type_traits>

#include "ptx.h"

namespace lf::emu {

// ---- mbarrier: the state lives in the 64-bit word itself, as on hardware ----

struct MBarrier {
  uint32_t phase : 1, expected : 15, left : 16;
  int32_t bytes;  // still to come in this phase
};
static_assert(sizeof(MBarrier) == 8);

inline MBarrier& mbarrier(uint64_t* bar) {
  check_shared("mbarrier", bar, 8, 8);
  if (!block().mbarriers.count(bar)) fail("mbarrier: used before its init");
  return *reinterpret_cast<MBarrier*>(bar);
}
inline void settle(MBarrier& b) {
  if (b.left || b.bytes) return;
  b.phase ^= 1;
  b.left = b.expected;
}

// ---- TMA ----

struct TensorMap {
  const unsigned char* base;
  uint32_t element_bytes, rank, swizzle_bytes;  // swizzle 0: none
  uint32_t sizes[5], box[5];
  uint64_t strides[5];  // bytes; [0] is the element's
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline TensorMap tensor_map(const CUtensorMap* map) {
  TensorMap m;
  std::memcpy(&m, map, sizeof m);
  return m;
}

// 128-byte swizzle: the index of the 16-byte chunk within 128 bytes, xor the index of those 128
// bytes modulo 8. It depends on addresses, so tiles start at multiples of 1024.
inline uintptr_t swizzle(uintptr_t address, uint32_t bytes) {
  if (bytes == 128) return address ^ (address >> 7 & 7) << 4;
  if (bytes == 64) return address ^ (address >> 7 & 3) << 4;
  if (bytes == 32) return address ^ (address >> 7 & 1) << 4;
  return address;
}

// Calls move(shared address, global address or null if outside) for each element of the box, since
// bounds may cut anywhere.
template <class Move>
void for_box(const TensorMap& m, const void* shared, const int* at, Move move) {
  uint64_t count = 1;
  for (uint32_t d = 0; d < m.rank; ++d) count *= m.box[d];
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t rest = i;
    const unsigned char* global = m.base;
    bool inside = true;
    for (uint32_t d = 0; d < m.rank; ++d) {
      const int64_t c = at[d] + static_cast<int64_t>(rest % m.box[d]);
      rest /= m.box[d];
      inside = inside && c >= 0 && c < static_cast<int64_t>(m.sizes[d]);
      global += c * static_cast<int64_t>(m.strides[d]);
    }
    const uintptr_t linear = reinterpret_cast<uintptr_t>(shared) + i * m.element_bytes;
    move(reinterpret_cast<unsigned char*>(swizzle(linear, m.swizzle_bytes)),
         inside ? global : nullptr);
  }
}
inline int box_bytes(const TensorMap& m) {
  uint32_t bytes = m.element_bytes;
  for (uint32_t d = 0; d < m.rank; ++d) bytes *= m.box[d];
  return static_cast<int>(bytes);
}

// The same offset in another block of the cluster.
template <class T>
T* in_block(T* mine, unsigned rank) {
  auto* at = reinterpret_cast<unsigned char*>(mine);
  return reinterpret_cast<T*>(state().blocks.at(rank).shared + (at - block().shared));
}
inline MBarrier& mbarrier_at(uint64_t* bar, unsigned rank) {
  uint64_t* there = in_block(bar, rank);
  if (!state().blocks[rank].mbarriers.count(there)) fail("mbarrier: used before its init");
  return *reinterpret_cast<MBarrier*>(there);
}

// Loads into every block of the cluster with its bit in `blocks`; its own barrier counts the bytes.
inline void tma_load(void* to, const CUtensorMap* map, uint64_t* bar, std::array<int, 5> at,
                     unsigned blocks) {
  const TensorMap m = tensor_map(map);
  const int bytes = box_bytes(m);
  check_shared("TMA load", to, static_cast<size_t>(bytes),
               m.swizzle_bytes ? m.swizzle_bytes * 8 : 128);
  mbarrier(bar);
  for (unsigned rank = 0; rank < state().blocks.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    unsigned char* there = in_block(static_cast<unsigned char*>(to), rank);
    std::memset(there, 0xff, static_cast<size_t>(bytes));
    MBarrier& b = mbarrier_at(bar, rank);
    state().in_flight.push_back([=, &b] {
      for_box(m, there, at.data(), [&](unsigned char* s, const unsigned char* g) {
        if (g)
          std::memcpy(s, g, m.element_bytes);
        else
          std::memset(s, 0, m.element_bytes);
      });
      b.bytes -= bytes;
      settle(b);
    });
  }
}
inline void tma_load(void* to, const CUtensorMap* map, uint64_t* bar, std::array<int, 5> at) {
  tma_load(to, map, bar, at, 1u << block().rank);
}

// The inverse of ldmatrix.
inline void stmatrix(const char* what, void* row, const uint32_t (&r)[4]) {
  struct Arguments {
    const uint32_t* r;
    unsigned char* row;
  } arguments{r, static_cast<unsigned char*>(row)};
  check_shared(what, row, 16, 16);
  meet(what, warp_first(), 32, 0xffffffffull, &arguments, [](std::vector<void*>& lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j)
        std::memcpy(static_cast<Arguments*>(lanes[8 * j + lane / 4])->row + lane % 4 * 4,
                    &static_cast<Arguments*>(lanes[lane])->r[j], 4);
  });
}

// ---- wgmma ----

// One operand in shared memory, from its descriptor: element (mn, k) of `size` bytes.
struct Operand {
  uintptr_t start, leading, stride;
  uint32_t swizzle_bytes;
  bool mn_major;
  uintptr_t shared_base;

  Operand(uint64_t descriptor, bool mn_major_) : mn_major(mn_major_) {
    const Block& b = block();
    // The descriptor holds 18 bits of the address, relative to shared memory's window.
    start = (descriptor & 0x3fff) << 4;
    leading = (descriptor >> 16 & 0x3fff) << 4;
    stride = (descriptor >> 32 & 0x3fff) << 4;
    const uint64_t mode = descriptor >> 62;
    swizzle_bytes = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
    shared_base = reinterpret_cast<uintptr_t>(b.shared);
    if (swizzle_bytes != 128) fail("wgmma: the emulator supports only the 128-byte swizzle");
  }
  const void* element(int mn, int k, int size, const Block& b) const {
    uintptr_t at = start;
    if (mn_major) {
      const int per_atom = 128 / size;
      at += static_cast<uintptr_t>(mn / per_atom) * leading +
            static_cast<uintptr_t>(mn % per_atom * size);
      at += static_cast<uintptr_t>(k / 8) * stride + static_cast<uintptr_t>(k % 8) * 128;
    } else {
      at += static_cast<uintptr_t>(mn / 8) * stride + static_cast<uintptr_t>(mn % 8) * 128;
      at += static_cast<uintptr_t>(k * size);
    }
    at = swizzle(at, 128);
    if (at + static_cast<uintptr_t>(size) > b.shared_bytes) return nullptr;
    return reinterpret_cast<const void*>(shared_base + at);
  }
};

inline float load_as(const void* p, __nv_bfloat16 t) {
  return to_float(*static_cast<const uint16_t*>(p), t);
}
inline float load_as(const void* p, __half t) {
  return to_float(*static_cast<const uint16_t*>(p), t);
}
inline float load_as(const void* p, __nv_fp8_e4m3) {
  return e4m3_to_float(*static_cast<const uint8_t*>(p));
}

// Hopper's wgmma sum of e4m3 products and the previous sum, less precise than fp32: all terms are
// truncated 13 bits below the largest (a product's exponent is the sum of its factors'), added
// exactly, and the sum keeps 13 bits after its leading one. Sources: DeepSeek-V3's report, section
// 3.5.2 (32 products, 14 bits); PyTorch's "Some Matrix Multiplication Engines Are Not As Accurate
// As We Thought" (H100's accumulator is e8m13); Fasi et al., "Numerical behavior of NVIDIA tensor
// cores" (truncation towards zero).
inline float hopper_e4m3_sum(const float* a, const float* b, const int* a_exponent,
                             const int* b_exponent, int depth, float so_far) {
  constexpr int kBits = 13, kNone = -1000;  // kNone: zero's exponent, as in exponents()
  float plain = so_far;
  int largest = so_far == 0 ? kNone : std::ilogb(so_far);
  for (int k = 0; k < depth; ++k) {
    plain += a[k] * b[k];
    const int exponent = a_exponent[k] + b_exponent[k];
    largest = exponent > largest ? exponent : largest;
  }
  if (!std::isfinite(plain) || largest < -100) return plain;
  const float up = std::ldexp(1.0f, kBits - largest);
  int sum = static_cast<int>(so_far * up);
  for (int k = 0; k < depth; ++k) sum += static_cast<int>(a[k] * b[k] * up);
  const float exact = std::ldexp(static_cast<float>(sum), largest - kBits);
  return __uint_as_float(__float_as_uint(exact) & ~0u << (23 - kBits));
}

// One wgmma of a warpgroup, from its issue until it is waited for.
struct Wgmma {
  int n, depth;
  bool b_mn_major, accumulate, a_in_registers;
  uint64_t a_descriptor, b_descriptor;
  std::array<std::array<uint32_t, 4>, 128> a;
  std::array<std::vector<float>*, 128> d;  // each thread's shadow of its accumulators
  float (*load)(const void*);              // an element of a or b
  float (*extract)(uint32_t, int);         // element e of a register of a
  int size;                                // bytes of an element
  std::vector<float> rows, columns;        // of a and b; empty until read
  bool done = false;

  // The hardware reads its operands at some time between the issue and the wait.
  void read_operands(const Block& b) {
    if (!columns.empty()) return;
    const auto read = [&](const Operand& o, int mn, int k) {
      const void* p = o.element(mn, k, size, b);
      if (!p) fail("wgmma: operand outside shared memory");
      return load(p);
    };
    rows.resize(64 * depth);
    columns.resize(static_cast<size_t>(n) * depth);
    const Operand b_memory(b_descriptor, b_mn_major);
    for (int column = 0; column < n; ++column)
      for (int k = 0; k < depth; ++k) columns[column * depth + k] = read(b_memory, column, k);
    if (a_in_registers) {
      const int per = depth / 8;
      for (int t = 0; t < 128; ++t)
        for (int r = 0; r < 4; ++r)
          for (int e = 0; e < per; ++e) {
            const int row = t / 32 * 16 + t % 32 / 4 + r % 2 * 8;
            rows[row * depth + r / 2 * (depth / 2) + t % 4 * per + e] = extract(a[t][r], e);
          }
    } else {
      const Operand a_memory(a_descriptor, false);
      for (int row = 0; row < 64; ++row)
        for (int k = 0; k < depth; ++k) rows[row * depth + k] = read(a_memory, row, k);
    }
  }

  void execute(const Block& b) {
    if (done) return;
    done = true;
    read_operands(b);
    std::vector<int> row_exponents, column_exponents;
    if (size == 1) row_exponents = exponents(rows), column_exponents = exponents(columns);
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < n / 2; ++i) {
        const int row = (t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8) * depth;
        const int column = (i / 4 * 8 + t % 4 * 2 + i % 2) * depth;
        float& d_i = (*d[t])[i];
        if (size == 1) {
          d_i = hopper_e4m3_sum(&rows[row], &columns[column], &row_exponents[row],
                                &column_exponents[column], depth, accumulate ? d_i : 0.0f);
          continue;
        }
        float sum = 0;
        for (int k = 0; k < depth; ++k) sum += rows[row + k] * columns[column + k];
        d_i = accumulate ? d_i + sum : sum;
      }
  }

  static std::vector<int> exponents(const std::vector<float>& values) {
    std::vector<int> found(values.size());
    for (size_t i = 0; i < values.size(); ++i)
      found[i] = values[i] == 0 ? -1000 : std::ilogb(values[i]);
    return found;
  }
};

// A thread's wgmmas. Its accumulators are NaN from the issue to the wait; the shadow holds their
// values meanwhile.
struct WgmmaThread {
  struct Shadow {
    std::vector<float> values;
    int pending = 0;  // groups not yet waited for, and the open one
  };
  struct Item {
    std::shared_ptr<Wgmma> op;
    float* d;
  };
  std::map<float*, Shadow> shadows;
  std::vector<Item> open;
  std::vector<std::vector<Item>> groups;
};
inline WgmmaThread& wgmma_of(Thread& t) {
  if (!t.wgmma) t.wgmma = std::make_shared<WgmmaThread>();
  return *std::static_pointer_cast<WgmmaThread>(t.wgmma);
}

template <class T>
void wgmma(int n, float* d, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
           bool b_mn_major, bool accumulate) {
  struct Argument {
    Thread* thread;
    float* d;
    const uint32_t* a;
    uint64_t a_descriptor, b_descriptor;
  } argument{&self(), d, a, a_descriptor, b_descriptor};
  if (!self().wgmma_fenced) fail("wgmma: no wgmma.fence since the last wait");
  constexpr int size = sizeof(T);
  meet("wgmma.mma_async", self().linear / 128 * 128, 128, 0, &argument,
       [=](std::vector<void*>& all) {
         auto op = std::make_shared<Wgmma>();
         op->n = n;
         op->depth = 32 / size;
         op->b_mn_major = b_mn_major;
         op->accumulate = accumulate;
         op->a_in_registers = a != nullptr;
         op->a_descriptor = a_descriptor;
         op->b_descriptor = b_descriptor;
         op->size = size;
         op->load = [](const void* p) { return load_as(p, T{}); };
         op->extract = [](uint32_t r, int e) {
           const uint32_t bits = r >> 8 * static_cast<int>(sizeof(T)) * e;
           return load_as(&bits, T{});  // the low bytes come first
         };
         for (int t = 0; t < 128; ++t) {
           const Argument& x = *static_cast<Argument*>(all[t]);
           if (x.b_descriptor != b_descriptor || (!a && x.a_descriptor != a_descriptor))
             return fail("wgmma: the warpgroup's threads disagree on a descriptor");
           if (x.a) std::copy(x.a, x.a + 4, op->a[t].begin());
           WgmmaThread& mine = wgmma_of(*x.thread);
           WgmmaThread::Shadow& shadow = mine.shadows[x.d];
           if (shadow.values.empty()) {
             shadow.values.assign(x.d, x.d + n / 2);
             std::fill(x.d, x.d + n / 2, NAN);
           }
           ++shadow.pending;
           op->d[t] = &shadow.values;  // a std::map's nodes do not move
           mine.open.push_back({op, x.d});
         }
         if (state().random() % 2) op->read_operands(block());
       });
}

inline void wgmma_wait(size_t pending) {
  WgmmaThread& mine = wgmma_of(self());
  self().wgmma_fenced = false;  // registers may change after this
  while (mine.groups.size() > pending) {
    for (const WgmmaThread::Item& item : mine.groups.front()) {
      item.op->execute(block());
      const auto at = mine.shadows.find(item.d);
      if (--at->second.pending == 0) {
        std::copy(at->second.values.begin(), at->second.values.end(), item.d);
        at->second.values.clear();
      }
    }
    mine.groups.erase(mine.groups.begin());
  }
}

// ---- setmaxnreg ----

inline void set_registers(const char* what, int count, bool more) {
  if (count % 8 || count < 24 || count > 256)
    fail(std::string(what) + ": not a multiple of 8 from 24 to 256");
  const int first = self().linear / 128 * 128;
  RegisterPool& pool = block().registers;
  int& held = pool.held[first / 128];
  if (more ? count < held : count > held)
    fail(std::string(what) + " " + std::to_string(count) + ": the warpgroup has " +
         std::to_string(held));
  meet(what, first, 128, 0, nullptr, [&](std::vector<void*>&) {
    if (more) return;
    pool.free += held - count;
    held = count;
  });
  if (!more) return;
  const std::string waits = std::string(what) + " " + std::to_string(count) + " of the block's " +
                            std::to_string(pool.held.size()) + " x " +
                            std::to_string(pool.at_launch) + " registers";
  wait_until(waits.c_str(), [&pool, &held, count] {
    if (pool.free < count - held) return false;
    pool.free -= count - held;
    held = count;
    return true;
  });
}

}  // namespace lf::emu

namespace lf::ptx {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emu::block().shared);
}

inline void mbarrier_init(uint64_t* bar, int arrivals) {
  emu::block().mbarriers.insert(bar);
  emu::self().inits_open = true;
  emu::MBarrier& b = emu::mbarrier(bar);
  b.phase = 0;
  b.expected = b.left = static_cast<uint32_t>(arrivals);
  b.bytes = 0;
}
inline void mbarrier_init_fence() { emu::self().inits_open = false; }
inline void mbarrier_arrive_expect(uint64_t* bar, int bytes) {
  emu::MBarrier& b = emu::mbarrier(bar);
  if (b.left == 0) emu::fail("mbarrier: more arrivals than its count");
  b.bytes += bytes;
  --b.left;
  emu::settle(b);
}
inline void mbarrier_arrive(uint64_t* bar) { mbarrier_arrive_expect(bar, 0); }
inline void mbarrier_arrive_at(uint64_t* bar, unsigned rank) {
  emu::MBarrier& b = emu::mbarrier_at(bar, rank);
  if (b.left == 0) emu::fail("mbarrier: more arrivals than its count");
  --b.left;
  emu::settle(b);
}
inline void mbarrier_wait(uint64_t* bar, int parity) {
  emu::MBarrier& b = emu::mbarrier(bar);
  emu::wait_until("mbarrier wait",
                  [&b, parity] { return b.phase != static_cast<unsigned>(parity); });
}

inline void cp_async_4(void* to, const void* from, int valid) {
  emu::cp_async("cp.async 4", to, from, 4, valid);
}
// The copies land in the background, then the arrival follows.
inline void cp_async_arrive(uint64_t* bar) {
  emu::Thread& t = emu::self();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
  emu::MBarrier& b = emu::mbarrier(bar);
  emu::state().in_flight.push_back([&b, groups = std::move(t.groups)] {
    for (const auto& group : groups) emu::land(group);
    --b.left;
    emu::settle(b);
  });
  t.groups.clear();
}
inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) { emu::stmatrix("stmatrix.x4", row, r); }

inline void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  emu::tma_load(to, map, bar, {x, y, 0, 0, 0});
}
inline void tma_load_2d_multicast(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y,
                                  int blocks) {
  emu::tma_load(to, map, bar, {x, y, 0, 0, 0}, static_cast<unsigned>(blocks));
}
inline void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y, int z) {
  emu::tma_load(to, map, bar, {x, y, z, 0, 0});
}
inline void tma_load_4d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y, int z,
                        int w) {
  emu::tma_load(to, map, bar, {x, y, z, w, 0});
}
// Reads shared memory as late as the program allows: in tma_store_wait.
inline void tma_store_4d(const CUtensorMap* map, const void* from, int x, int y, int z, int w) {
  const emu::TensorMap m = emu::tensor_map(map);
  // Other threads' writes are not tracked: each thread fences its own, as this one does.
  if (!emu::self().proxy_fenced) emu::fail("TMA store: no fence.proxy.async since the last group");
  emu::check_shared("TMA store", from, static_cast<size_t>(emu::box_bytes(m)), 128);
  const std::array<int, 5> at{x, y, z, w, 0};
  emu::self().stores_open.push_back([=] {
    emu::for_box(m, from, at.data(), [&](unsigned char* s, const unsigned char* g) {
      if (g) std::memcpy(const_cast<unsigned char*>(g), s, m.element_bytes);
    });
  });
}
inline void tma_store_2d(const CUtensorMap* map, const void* from, int x, int y) {
  tma_store_4d(map, from, x, y, 0, 0);
}
inline void tma_store_commit() {
  emu::self().stores.push_back(std::move(emu::self().stores_open));
  emu::self().stores_open.clear();
  emu::self().proxy_fenced = false;
}
template <int pending>
void tma_store_wait() {
  auto& stores = emu::self().stores;
  while (stores.size() > pending) {
    for (auto& store : stores.front()) store();
    stores.erase(stores.begin());
  }
}
inline void tma_prefetch(const CUtensorMap*) {}
inline void fence_proxy_async() { emu::self().proxy_fenced = true; }

inline unsigned cluster_rank() { return emu::block().rank; }
inline void cluster_sync() {
  emu::State& s = emu::state();
  emu::barrier(s.cluster_barrier, static_cast<int>(s.blocks.size() * emu::block().threads.size()),
               true, "cluster barrier");
}
inline float cluster_load(const float* mine, unsigned rank) {
  const emu::Block& other = emu::state().blocks.at(rank);
  return *reinterpret_cast<const float*>(other.shared + shared_address(mine));
}

template <int count>
void registers_decrease() {
  emu::set_registers("setmaxnreg.dec", count, false);
}
template <int count>
void registers_increase() {
  emu::set_registers("setmaxnreg.inc", count, true);
}

// ---- wgmma.cuh ----

inline void wgmma_fence() { emu::self().wgmma_fenced = true; }
inline void wgmma_commit() {
  emu::WgmmaThread& mine = emu::wgmma_of(emu::self());
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int pending>
void wgmma_wait() {
  emu::wgmma_wait(pending);
}
template <class T, bool b_mn_major, int registers>
void wgmma(float (&d)[registers], uint64_t a, uint64_t b, bool accumulate) {
  emu::wgmma<T>(2 * registers, d, nullptr, a, b, b_mn_major, accumulate);
}
template <class T, bool b_mn_major, int registers>
void wgmma(float (&d)[registers], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emu::wgmma<T>(2 * registers, d, a, 0, b, b_mn_major, accumulate);
}

}  // namespace lf::ptx
