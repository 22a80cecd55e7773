// Measures how fast this machine reads memory and multiplies: the limits that the benchmarks print
// beside each kernel that streams a weight or a KV cache, or computes. torch.sum and the like stay
// well below the first; without AMX, PyTorch's products stay below the second.
#include <atomic>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

// Eight streams per chunk read 1.15 times as fast as one (two Zen 4 cores, medians of 15,
// interleaved). Chunk size and prefetch distance are the best of those tried with eight streams.
constexpr int64_t kChunk = 1024 * 1024;
constexpr int64_t kStreams = 8;
constexpr int64_t kAhead = 2048;  // bytes between a load and its prefetch, into L2

// XOR of all 64-bit words. Nothing can be skipped, the order does not matter, and an accumulator
// costs one instruction per load. n is a multiple of 8.
uint64_t fold(const char* p, int64_t n) {
#if defined(LF_AVX512)
  __m512i acc[4] = {};
#elif defined(LF_AVX2)
  __m256i acc[8] = {};
#else
  uint64_t acc[8] = {};
#endif
  constexpr int64_t kStep = sizeof(acc);
  const int64_t stream = n / kStreams / kStep * kStep;
  for (int64_t i = 0; i < stream; i += kStep)
    for (int64_t s = 0; s < kStreams; ++s) {
      const char* from = p + s * stream + i;
      for (int64_t line = 0; line < kStep; line += 64)
        __builtin_prefetch(from + kAhead + line, 0, 1);
      for (int64_t u = 0; u < kStep; u += sizeof(acc[0])) {
        auto& a = acc[u / sizeof(acc[0])];
#if defined(LF_AVX512)
        a = _mm512_xor_si512(a, _mm512_loadu_si512(from + u));
#elif defined(LF_AVX2)
        a = _mm256_xor_si256(a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + u)));
#else
        uint64_t word;
        std::memcpy(&word, from + u, 8);
        a ^= word;
#endif
      }
    }
  uint64_t words[kStep / 8], sum = 0;
  std::memcpy(words, acc, sizeof(acc));
  for (const uint64_t word : words) sum ^= word;
  for (int64_t i = kStreams * stream; i < n; i += 8) {
    uint64_t word;
    std::memcpy(&word, p + i, 8);
    sum ^= word;
  }
  return sum;
}

// Enough chains to hide the latency of a multiply-add (4 to 6 cycles, two per cycle), and few
// enough to leave registers for both factors.
#if defined(LF_AVX512)
constexpr int kChains = 16;
#elif defined(LF_AVX2)
constexpr int kChains = 12;
#else
constexpr int kChains = 6;
#endif
constexpr int64_t kSteps = 4096;

// Runs step(acc) on each chain kSteps times and returns the sum, so that nothing is optimized away.
template <class Step>
float chains(const Step& step) {
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = broadcast(static_cast<float>(i + 1));
  for (int64_t s = 0; s < kSteps; ++s)
    for (int i = 0; i < kChains; ++i) acc[i] = step(acc[i]);
  Vec sum = zeros();
  for (int i = 0; i < kChains; ++i) sum = sum + acc[i];
  return reduce_add(sum);
}

std::atomic<float> g_sum;  // keeps the loop from being optimized away

}  // namespace

double multiply_add(bool pairs, double flops, int threads) {
  double each = 2.0 * kLanes * kChains * kSteps;
#if defined(LF_AVX512_BF16)
  if (pairs) each *= 2;
#else
  (void)pairs;
#endif
  const auto items = static_cast<int64_t>(flops / each) + 1;
  parallel_for(items, threads, [&](int64_t) {
#if defined(LF_AVX512_BF16)
    const auto x = (__m512bh)_mm512_set1_epi32(0x3b003b00);  // 2^-9, twice
    if (pairs)
      return g_sum.store(chains([x](Vec acc) { return Vec{_mm512_dpbf16_ps(acc.v, x, x)}; }),
                         std::memory_order_relaxed);
#endif
    // Converges to 1: neither factor can be folded into the other, and nothing overflows.
    const Vec factor = broadcast(0.75f), addend = broadcast(0.25f);
    g_sum.store(chains([=](Vec acc) { return fma(acc, factor, addend); }),
                std::memory_order_relaxed);
  });
  return each * static_cast<double>(items);
}

uint64_t read_memory(const void* data, int64_t bytes, int threads) {
  uint64_t sum = 0;
  parallel_chunks(bytes, kChunk, threads, [&](int64_t begin, int64_t end) {
    const uint64_t part = fold(static_cast<const char*>(data) + begin, end - begin);
#pragma omp atomic
    sum ^= part;
  });
  return sum;
}

}  // namespace lf::LF_ISA
