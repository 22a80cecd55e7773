// Runs a kernel's blocks: thread order, background work, guarded shared memory, and error reports.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <numeric>
#include <stdexcept>

#include "block.h"

namespace lf::emu {

inline void fiber_main() {
  state().body();
  self().done = true;
  void* ignored;
  lf_emu_switch(&ignored, state().scheduler);
  std::abort();
}

// Memory that faults past its end. A canary fills the gap between the end and the page.
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

  // Sets all bits: NaN in every float format.
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

unsigned& seed();        // of the thread order
int& multiprocessors();  // reported to launchers
int64_t& blocks();       // number that have run

// Finishes one random piece of background work. Returns false if there is none.
inline bool finish_one(State& s) {
  if (s.in_flight.empty()) return false;
  std::swap(s.in_flight[s.random() % s.in_flight.size()], s.in_flight.back());
  const auto work = std::move(s.in_flight.back());
  s.in_flight.pop_back();
  work();
  return true;
}

inline void start(Thread& t, unsigned char* stack) {
  // As if fiber_main's first line had called lf_emu_switch: six registers, then a return address,
  // 16-byte aligned as at a function's entry.
  auto* top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
}

// Runs the threads of all blocks in state() until they are done or one has failed.
inline void run() {
  State& s = state();
  std::vector<Thread*> order, warp;
  for (Block& b : s.blocks)
    for (Thread& t : b.threads) order.push_back(&t);
  // Background work ends now and then or, if late, only when all threads wait, one piece at a time.
  const bool late = s.random() % 2;
  // Runs each thread up to its next wait. Returns whether one ran.
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
      // A block that has ended frees its shared memory for others.
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
  std::set<std::string> places;  // one thread for each
  for (Thread* t : order)
    if (!t->done && places.insert(t->waiting ? t->waiting : "?").second)
      s.error += std::string(places.size() > 1 ? ";" : "") + " thread " +
                 std::to_string(t->linear) + " of block " + std::to_string(t->block->index.x) +
                 " waits at " + t->waiting;
}

// A fault inside a kernel ends its fiber with an error, not the process.
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
// std::runtime_error for a kernel's errors.
inline void launch(dim3 grid, dim3 size, size_t shared_bytes, unsigned cluster,
                   const std::function<void()>& body, bool programmatic = false) {
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
  // A GPU starts blocks in about this order; seeds past 0 shuffle it.
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
      b.registers = RegisterPool(count);
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
    blocks() += cluster;
    for (unsigned i = 0; i < cluster && s.error.empty(); ++i) {
      if (!shared[i]->intact()) s.error = "write past the end of shared memory";
      for (Thread& t : s.blocks[i].threads) {
        if (!(t.open.empty() && t.groups.empty())) s.error = "a cp.async is never waited for";
        if (programmatic && !t.grid_waited)
          s.error = "a programmatic launch, and a thread without griddepcontrol.wait";
      }
    }
    if (s.error.empty() && !s.in_flight.empty())
      s.error = "an asynchronous copy is never waited for";
  }
  s.blocks.clear();
  if (!s.error.empty()) throw std::runtime_error("emulated kernel: " + s.error);
}

}  // namespace lf::emu
