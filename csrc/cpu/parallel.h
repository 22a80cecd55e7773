// Threads and scratch memory. Compiled once per instruction set (namespace lf::LF_ISA), so that the
// linker never picks an inline function built with AVX-512 for a machine without it.
#pragma once
#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#if defined(LF_X86)
#include <xmmintrin.h>
#endif

namespace lf::LF_ISA {

// Lets this thread compute with denormals for its lifetime, even if another library has set flush
// to zero (torch.set_flush_denormal).
class KeepDenormals {
#if defined(LF_X86)
 public:
  KeepDenormals() : before_(_mm_getcsr()) {
    if (before_ & kFlush) _mm_setcsr(before_ & ~kFlush);
  }
  ~KeepDenormals() {
    if (before_ & kFlush) _mm_setcsr(before_);
  }
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;

 private:
  static constexpr unsigned kFlush = 0x8040;  // flush to zero, denormals are zero
  const unsigned before_;
#else
 public:
  KeepDenormals() {}
  ~KeepDenormals() {}
#endif
};

// Calls body(i) once for every i in [0, n). Work is handed out one item at a time: on shared
// machines a thread that loses its core then delays one item, not its whole share.
template <class Body>
inline void parallel_for(int64_t n, int threads, Body&& body) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    const KeepDenormals keep;
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const KeepDenormals keep;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) body(i);
  }
}

// Like parallel_for, but every thread claims one item early: body(i, next) gets the item that the
// thread takes after i (-1: none) and can prefetch for it.
template <class Body>
inline void parallel_for_ahead(int64_t n, int threads, Body&& body) {
  if (threads > n) threads = static_cast<int>(n);
  int64_t claimed = 0;
  const auto work = [&] {
    const KeepDenormals keep;
    const auto claim = [&] {
      int64_t i;
#pragma omp atomic capture
      i = claimed++;
      return i < n ? i : -1;
    };
    for (int64_t i = claim(), next; i >= 0; i = next) {
      next = claim();
      body(i, next);
    }
  };
  if (threads <= 1) return work();
#pragma omp parallel num_threads(threads)
  work();
}

// Cuts [0, n) into chunks of about `grain` items and calls body(begin, end) for each. A thread
// starts with a share of neighboring chunks, the same in every call of that size, so that its
// caches still hold what it last read or wrote; rows that moved between cores took up to 1.4 times
// as long. A thread that is done takes chunks from other shares: losing a core delays one chunk.
template <class Body>
inline void parallel_chunks(int64_t n, int64_t grain, int threads, Body&& body) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t chunks = (n + grain - 1) / grain;
  const auto run = [&](int64_t c) {
    const int64_t begin = c * grain;
    body(begin, begin + grain < n ? begin + grain : n);
  };
  if (threads > chunks) threads = static_cast<int>(chunks);
  if (threads <= 1) {
    const KeepDenormals keep;
    for (int64_t c = 0; c < chunks; ++c) run(c);
    return;
  }
  struct alignas(64) Share {
    int64_t next, end;
  };
  constexpr int kMost = 64;  // beyond that, two or three threads start in the same share
  Share shares[kMost];
  const int used = threads < kMost ? threads : kMost;
  for (int i = 0; i < used; ++i) shares[i] = {chunks * i / used, chunks * (i + 1) / used};
#pragma omp parallel num_threads(threads)
  {
    const KeepDenormals keep;
    const int mine = omp_get_thread_num();
    for (int i = 0; i < used; ++i) {
      Share& share = shares[(mine + i) % used];
      for (;;) {
        int64_t c;
#pragma omp atomic capture
        c = share.next++;
        if (c >= share.end) break;
        run(c);
      }
    }
  }
}

// 64-byte aligned memory that lives as long as the object; get() grows it. Meant to be
// thread_local: after the first call an op allocates nothing.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  template <class T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) std::abort();  // cannot throw out of a parallel region
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lf::LF_ISA
