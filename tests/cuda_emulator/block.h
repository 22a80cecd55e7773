// An emulated block: threads that are fibers, the places where they wait for each other, and their
// pending asynchronous operations.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace lf::emu {

// ---- fibers ----

// Saves the callee-saved registers on the running stack and resumes where `to` was saved.
extern "C" void lf_emu_switch(void** from, void* to);

constexpr size_t kStackBytes = 128 << 10;  // holds a kernel's local arrays

struct Block;

// ---- the parts of a block ----

// Lanes of a warp (or threads of a warpgroup) that have reached a collective instruction.
struct Meeting {
  const char* what = nullptr;
  uint64_t generation = 0;
  int arrived = 0;
  std::vector<void*> arguments;  // one per lane
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
  const char* waiting = nullptr;               // the instruction, for messages
  std::function<bool()> ready;                 // empty: runnable
  std::vector<std::vector<AsyncCopy>> groups;  // committed cp.async groups, oldest first
  std::vector<std::vector<std::function<void()>>> stores;  // committed TMA stores (hopper.h)
  std::vector<std::function<void()>> stores_open;
  std::shared_ptr<void> wgmma;                                          // hopper.h
  bool proxy_fenced = false, wgmma_fenced = false, inits_open = false;  // hopper.h
  bool grid_waited = false;                                             // griddepcontrol.wait
  std::vector<AsyncCopy> open;                                          // issued, not yet committed
};

// A block's registers, counted per thread of a warpgroup. With setmaxnreg, ptxas gives a kernel all
// that its launch bounds allow: the most that a block of this size can have.
struct RegisterPool {
  int at_launch = 0, free = 0;
  std::vector<int> held;  // per warpgroup
  explicit RegisterPool(int threads = 128)
      : at_launch(65536 / threads < 255 ? 65536 / threads / 8 * 8 : 255),
        held(static_cast<size_t>(threads + 127) / 128, at_launch) {}
};

struct Block {
  dim3 grid, size, index;
  unsigned rank = 0;  // in its cluster
  std::vector<Thread> threads;
  std::map<std::pair<int, uint64_t>, Meeting> meetings;  // (first thread, mask)
  Barrier barriers[16];
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::set<const void*> mbarriers;  // the initialized ones
  RegisterPool registers;
  size_t finished = 0;  // threads
};

// What runs at the same time: the blocks of one cluster, usually one block.
struct State {
  Thread* thread = nullptr;
  void* scheduler = nullptr;
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  std::vector<std::function<void()>> in_flight;  // hardware work: ends in any order, at any time
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

// Yields until `ready` holds.
inline void wait_until(const char* what, std::function<bool()> ready) {
  if (ready()) return;
  Thread& t = self();
  t.waiting = what;
  t.ready = std::move(ready);
  lf_emu_switch(&t.stack_pointer, state().scheduler);
}

// An error inside a fiber cannot be thrown across the switch: it is recorded, and the fiber ends.
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

// Waits until `count` threads from `first` on (up to 64: those in mask) have arrived. They must
// agree on the instruction and mask. The last to arrive runs act over all arguments, in lane order.
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
inline uint64_t warp_mask(uint32_t mask) {  // the last warp may have fewer lanes
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

}  // namespace lf::emu
