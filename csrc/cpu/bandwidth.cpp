// How fast this machine reads memory: the limit that the benchmarks print beside every kernel whose
// time is a weight or a KV cache streaming past. torch.sum and its like stay well under it.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

// Eight streams in each chunk read 1.15 times as fast as one did (two Zen 4 cores, medians of 15 by
// turns); chunk and distance are the best of those tried with them.
constexpr int64_t kChunk = 1024 * 1024;
constexpr int64_t kStreams = 8;
constexpr int64_t kAhead = 2048;  // bytes between a load and its prefetch, into L2

// XOR of all 64-bit words: nothing can be skipped, no order of additions matters, and an
// accumulator costs one instruction a load. n is a multiple of 8.
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

}  // namespace

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
