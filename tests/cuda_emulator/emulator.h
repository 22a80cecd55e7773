// Runs CUDA kernels on a CPU, for tests: every CUDA thread of a block is a fiber, and blocks run
// one after another. Included in place of cuda_runtime.h's device side when a .cu file is compiled
// by an ordinary C++ compiler with -DLF_CUDA_EMULATOR.
//
// What it is for is finding bugs, so it is as unkind as the hardware may be:
//  - between two synchronisations the threads of a block run in an order shuffled by a seed, and
//  now
//    and then one warp runs ahead of the others as far as it can;
//  - shared memory starts as NaN, and ends at a page that faults;
//  - asynchronous copies poison their destination and land only when waited for (ptx.h);
//  - a barrier that not all threads reach, or lanes that meet in different warp instructions, end
//    in an error that names the place.
// It says nothing about speed, memory ordering weaker than program order, or registers.
#pragma once

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#undef __shared__
#define __shared__ static_assert(false, "use LF_DYNAMIC_SHARED: the emulator guards that memory");
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace lf::emu {

// ---- fibers ----

// Saves the callee-saved registers on the running stack, and goes on where `to` was saved.
extern "C" void lf_emu_switch(void** from, void* to);

constexpr size_t kStackBytes = 128 << 10;  // a kernel's local arrays live here

struct Block;

// ---- what a block is made of ----

// Lanes of a warp (or threads of a warpgroup) that have reached a collective instruction.
struct Meeting {
  const char* what = nullptr;
  uint64_t generation = 0;
  int arrived = 0;
  std::vector<void*> arguments;  // one a lane
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes, zeros;  // copied, then zero-filled
};

struct Thread {
  Block* block = nullptr;
  uint3 index;
  int linear = 0;
  void* stack_pointer = nullptr;
  bool done = false;
  const char* waiting = nullptr;               // at what, for messages
  std::function<bool()> ready;                 // empty: runnable
  std::vector<std::vector<AsyncCopy>> groups;  // committed cp.async groups, oldest first
  std::vector<std::vector<std::function<void()>>> stores;  // hopper.h: TMA stores, committed
  std::vector<std::function<void()>> stores_open;
  std::shared_ptr<void> wgmma;                                          // hopper.h
  bool proxy_fenced = false, wgmma_fenced = false, inits_open = false;  // likewise
  std::vector<AsyncCopy> open;                                          // issued, not yet committed
};

struct Block {
  dim3 grid, size, index;
  unsigned rank = 0;  // in its cluster
  std::vector<Thread> threads;
  std::map<std::pair<int, uint64_t>, Meeting> meetings;  // (first thread, mask)
  Barrier barriers[16];
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::set<const void*> mbarriers;  // those initialised
  size_t finished = 0;              // threads
};

// What runs at the same time: the blocks of one cluster, usually one.
struct State {
  Thread* thread = nullptr;
  void* scheduler = nullptr;
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  std::vector<std::function<void()>> in_flight;  // hardware at work: done in any order, any time
  std::function<void()> body;
  std::string error;
  std::mt19937 random{0};
};

inline State& state() {
  static thread_local State s;
  return s;
}
inline Thread& self() { return *state().thread; }
inline Block& block() { return *self().block; }

[[noreturn]] inline void fail(const std::string& message);

// Gives the processor up until `ready` holds.
inline void wait_until(const char* what, std::function<bool()> ready) {
  if (ready()) return;
  Thread& t = self();
  t.waiting = what;
  t.ready = std::move(ready);
  lf_emu_switch(&t.stack_pointer, state().scheduler);
}

// An error inside a fiber cannot be thrown across the switch: it is kept, and the fiber ends.
[[noreturn]] inline void fail(const std::string& message) {
  Thread& t = self();
  std::string& error = state().error;
  if (error.empty())
    error = message + " (block " + std::to_string(block().index.x) + ", thread " +
            std::to_string(t.linear) + ")";
  t.done = true;
  lf_emu_switch(&t.stack_pointer, state().scheduler);
  std::abort();
}

// All `count` threads from `first` on meet (mask: which of them; they must agree on it and on the
// instruction); the last to arrive runs act over everyone's arguments, in order of their lanes.
inline void meet(const char* what, int first, int count, uint64_t mask, void* argument,
                 const std::function<void(std::vector<void*>&)>& act) {
  Meeting& m = block().meetings[{first * 2048 + count, mask}];
  const int lane = self().linear - first;
  if (m.arrived == 0) {
    m.what = what;
    m.arguments.assign(count, nullptr);
  }
  if (std::strcmp(m.what, what) != 0)
    fail(std::string("lanes of one warp meet in different instructions: ") + m.what + " and " +
         what);
  if (count <= 64 && !(mask >> lane & 1)) fail(std::string(what) + ": lane not in its own mask");
  m.arguments[lane] = argument;
  const int wanted = count <= 64 ? __builtin_popcountll(mask) : count;
  if (++m.arrived == wanted) {
    act(m.arguments);
    m.arrived = 0;
    ++m.generation;
    return;
  }
  const uint64_t before = m.generation;
  wait_until(what, [&m, before] { return m.generation != before; });
}

inline int warp_first() { return self().linear / 32 * 32; }
inline uint64_t warp_mask(uint32_t mask) {  // a last warp may be short of lanes
  const int left = static_cast<int>(block().threads.size()) - warp_first();
  return left >= 32 ? mask : mask & ((1ull << left) - 1);
}

inline void barrier(Barrier& b, int count, bool wait, const char* what) {
  if (self().inits_open) fail(std::string(what) + ": no fence after mbarrier.init");
  const uint64_t before = b.generation;
  if (++b.arrived == count) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  if (wait) wait_until(what, [&b, before] { return b.generation != before; });
}

// ---- running ----

inline void fiber_main() {
  state().body();
  self().done = true;
  void* ignored;
  lf_emu_switch(&ignored, state().scheduler);
  std::abort();
}

// Memory that faults past its end; what lies between the end and the page is a canary.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    usable_ = (bytes + page - 1) / page * page;
    base_ = static_cast<unsigned char*>(mmap(nullptr, usable_ + 2 * page, PROT_NONE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    begin_ = base_ + page;
    total_ = usable_ + 2 * page;
    if (usable_) mprotect(begin_, usable_, PROT_READ | PROT_WRITE);
  }
  ~Guarded() { munmap(base_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  // Starts as NaN in every float format: all bits set.
  void poison() { std::memset(begin_, 0xff, usable_); }
  bool intact() const {
    return std::all_of(begin_ + bytes_, begin_ + usable_,
                       [](unsigned char c) { return c == 0xff; });
  }
  unsigned char* data() { return begin_; }

 private:
  size_t bytes_, usable_, total_;
  unsigned char *base_, *begin_;
};

unsigned& seed();  // of the order of threads

// One piece of background work, any of them; false when there is none.
inline bool finish_one(State& s) {
  if (s.in_flight.empty()) return false;
  std::swap(s.in_flight[s.random() % s.in_flight.size()], s.in_flight.back());
  const auto work = std::move(s.in_flight.back());
  s.in_flight.pop_back();
  work();
  return true;
}

inline void start(Thread& t, unsigned char* stack) {
  // As if lf_emu_switch had been called from fiber_main's first line: six registers, then a return
  // address; 16-byte aligned as at a function's entry.
  auto* top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
}

// Runs the threads of all blocks in state() until they are done, or one has failed.
inline void run() {
  State& s = state();
  std::vector<Thread*> order, warp;
  for (Block& b : s.blocks)
    for (Thread& t : b.threads) order.push_back(&t);
  // Background work ends now and then, or as late as it can: one piece when all threads wait.
  const bool late = s.random() % 2;
  // Lets each of them go on to where it has to wait. Whether one did.
  const auto advance = [&s, late](std::vector<Thread*>& threads) {
    std::shuffle(threads.begin(), threads.end(), s.random);
    bool moved = false;
    for (Thread* t : threads) {
      if (t->done) continue;
      s.thread = t;
      if (t->ready) {
        if (!t->ready()) continue;
        t->ready = nullptr;
        t->waiting = nullptr;
      }
      moved = true;
      lf_emu_switch(&s.scheduler, t->stack_pointer);
      if (!s.error.empty()) return moved;
      // A block that has ended leaves its shared memory to others.
      if (t->done && ++t->block->finished == t->block->threads.size())
        std::memset(t->block->shared, 0xff, t->block->shared_bytes);
      if (!late && s.random() % 64 == 0) finish_one(s);
    }
    return moved;
  };
  while (s.error.empty()) {
    if (s.random() % 2) {
      Block& b = s.blocks[s.random() % s.blocks.size()];
      const size_t first = s.random() % b.threads.size() / 32 * 32;
      warp.clear();
      for (size_t i = first; i < b.threads.size() && i < first + 32; ++i)
        warp.push_back(&b.threads[i]);
      while (advance(warp) && s.error.empty()) {
      }
      if (!s.error.empty()) return;
    }
    const bool moved = advance(order);
    if (!s.error.empty()) return;
    if (std::all_of(order.begin(), order.end(), [](Thread* t) { return t->done; })) return;
    if (!moved && !finish_one(s)) break;
  }
  if (!s.error.empty()) return;
  s.error = "deadlock:";
  int shown = 0;
  for (Thread* t : order)
    if (!t->done && shown++ < 4)
      s.error += " thread " + std::to_string(t->linear) + " of block " +
                 std::to_string(t->block->index.x) + " waits at " + (t->waiting ? t->waiting : "?");
}

// A fault inside a kernel ends its fiber with an error instead of the process.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction mine{};
    mine.sa_sigaction = [](int, siginfo_t* info, void*) {
      char text[80];
      std::snprintf(text, sizeof text, "memory fault at %p", info->si_addr);
      fail(text);
    };
    mine.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &mine, &before_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[2] = {SIGSEGV, SIGBUS};
  struct sigaction before_[2];
};

// kernel<<<grid, size, shared_bytes>>>, with clusters of `cluster` blocks along x. Throws
// std::runtime_error for what a kernel did wrong.
inline void launch(dim3 grid, dim3 size, size_t shared_bytes, unsigned cluster,
                   const std::function<void()>& body) {
  const int count = static_cast<int>(size.x * size.y * size.z);
  if (count < 1 || count > 1024 || cluster < 1 || grid.x % cluster || grid.y > 65535 ||
      grid.z > 65535)
    throw std::runtime_error("invalid configuration argument");
  if (shared_bytes > 232448) throw std::runtime_error("too much shared memory");
  static thread_local std::vector<unsigned char*> stacks;
  while (stacks.size() < count * cluster)
    stacks.push_back(static_cast<unsigned char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  std::vector<std::unique_ptr<Guarded>> shared;
  for (unsigned i = 0; i < cluster; ++i) shared.push_back(std::make_unique<Guarded>(shared_bytes));
  const FaultHandler faults;
  State& s = state();
  s.random.seed(seed());
  s.body = body;
  s.error.clear();
  const uint64_t clusters = static_cast<uint64_t>(grid.x / cluster) * grid.y * grid.z;
  // A GPU starts blocks in about this order; the seeds past 0 promise nothing.
  std::vector<uint64_t> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  if (seed() != 0) std::shuffle(order.begin(), order.end(), s.random);
  for (uint64_t c : order) {
    if (!s.error.empty()) break;
    s.cluster_barrier = {};
    s.in_flight.clear();
    s.blocks.clear();
    s.blocks.resize(cluster);
    for (unsigned i = 0; i < cluster; ++i) {
      Block& b = s.blocks[i];
      const uint64_t per_row = grid.x / cluster;
      b.grid = grid;
      b.size = size;
      b.rank = i;
      b.index = dim3(static_cast<unsigned>(c % per_row) * cluster + i,
                     static_cast<unsigned>(c / per_row % grid.y),
                     static_cast<unsigned>(c / per_row / grid.y));
      b.shared = shared[i]->data();
      b.shared_bytes = shared_bytes;
      shared[i]->poison();
      b.threads.resize(count);
      for (int k = 0; k < count; ++k) {
        Thread& t = b.threads[k];
        const unsigned u = static_cast<unsigned>(k);
        t.block = &b;
        t.linear = k;
        t.index = uint3{u % size.x, u / size.x % size.y, u / size.x / size.y};
        start(t, stacks[i * count + k]);
      }
    }
    run();
    for (unsigned i = 0; i < cluster && s.error.empty(); ++i) {
      if (!shared[i]->intact()) s.error = "write past the end of shared memory";
      for (Thread& t : s.blocks[i].threads)
        if (!(t.open.empty() && t.groups.empty())) s.error = "a cp.async is never waited for";
    }
    if (s.error.empty() && !s.in_flight.empty())
      s.error = "an asynchronous copy is never waited for";
  }
  s.blocks.clear();
  if (!s.error.empty()) throw std::runtime_error("emulated kernel: " + s.error);
}

}  // namespace lf::emu

// ---- CUDA C++'s own names ----

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
// Every lane gets the value of lane source(lane); a source outside its segment is itself.
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

// One thread runs at a time and only waits give the processor up: plain code is atomic.
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
inline float __expf(float x) { return std::exp(x); }
