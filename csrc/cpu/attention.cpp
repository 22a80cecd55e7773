// attention: softmax(q k^T * scale) v, causal or not, batched or packed.
//
// A work item is a tile of queries of one sequence and one key/value head (attention_tile.h). Query
// heads that share the head are rows of the same tile, so grouped heads cost no extra packing. A
// tile's scratch has a fixed size, whatever the lengths.
#include "attention_tile.h"
#include "kernels.h"

namespace lf::LF_ISA {
namespace {

constexpr int64_t kRows = 384;  // per tile; queries, sums and packed blocks fit in half of 1 MB L2

struct Sequence {
  int64_t q_start, q_len, k_start, k_len;
};

Sequence sequence(const AttentionParams& p, int64_t b) {
  if (!p.cu_seqlens_q) return {0, p.seqlen_q, 0, p.seqlen_k};
  const int32_t *q = p.cu_seqlens_q + b, *k = p.cu_seqlens_k + b;
  return {q[0], q[1] - q[0], k[0], k[1] - k[0]};
}

template <class T>
void run(const AttentionParams& p, int threads) {
  if (p.kv_heads == 0) return;
  const int64_t group = p.heads / p.kv_heads;
  // first_tile[b]: number of tiles of the sequences before b.
  thread_local Scratch scratch;
  int64_t* first_tile = scratch.get<int64_t>(static_cast<size_t>(p.batch + 1));
  int64_t tokens = kRows / group > 0 ? kRows / group : 1;
  const auto count_tiles = [&] {
    first_tile[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b)
      first_tile[b + 1] = first_tile[b] + round_up(sequence(p, b).q_len, tokens) / tokens;
    return first_tile[p.batch];
  };
  // Smaller tiles pack more often, but an idle thread costs more.
  int64_t tiles = count_tiles();
  while (tiles * p.kv_heads < 4 * threads && tokens > 1 && tokens * group > 4 * kStripRows) {
    tokens = (tokens + 1) / 2;
    tiles = count_tiles();
  }

  parallel_for(tiles * p.kv_heads, threads, [&](int64_t item) {
    const int64_t head = item % p.kv_heads, index = item / p.kv_heads;
    int64_t b = 0;
    for (int64_t step = p.batch; step > 0;) {  // the last sequence with first_tile <= index
      if (b + step < p.batch && first_tile[b + step] <= index)
        b += step;
      else
        step /= 2;
    }
    const Sequence s = sequence(p, b);
    // A causal tile costs what it sees. The heaviest come first, so that no thread ends with one.
    const int64_t start = (first_tile[b + 1] - 1 - index) * tokens;
    const AttentionTile tile{clamp(s.q_len - start, 0, tokens),
                             group,
                             p.head_dim,
                             s.k_len,
                             p.causal ? s.k_len - s.q_len + start + 1 : s.k_len,
                             p.softmax_scale};
    const int64_t batch = p.cu_seqlens_q ? 0 : b;
    const auto row = [batch](auto* base, const int64_t (&stride)[3], int64_t token, int64_t head) {
      return base + batch * stride[0] + token * stride[1] + head * stride[2];
    };
    const int64_t first_row = s.q_start + start;
    attend_tile<T>(
        tile,
        [&](int64_t t, int64_t g) {
          return row(static_cast<const T*>(p.q), p.q_stride, first_row + t, head * group + g);
        },
        [&](int64_t j) { return row(static_cast<const T*>(p.k), p.k_stride, s.k_start + j, head); },
        [&](int64_t j) { return row(static_cast<const T*>(p.v), p.v_stride, s.k_start + j, head); },
        [&](int64_t t, int64_t g) {
          return row(static_cast<T*>(p.out), p.out_stride, first_row + t, head * group + g);
        });
  });
}

}  // namespace

void attention(const AttentionParams& p, int threads) {
  with_dtype(p.dtype, [&](auto* t) { run<std::remove_pointer_t<decltype(t)>>(p, threads); });
}

}  // namespace lf::LF_ISA
