// attention_with_kvcache: few queries over a long cache, contiguous or paged.
//
//   s = softmax_scale * log2(e) * q k^T,  p = 2^(s - max s),  out = p v / sum p
//
// The work is reading the cache, so everything serves that. The query heads of a kv head share each
// load of a key; a sequence is cut into chunks of keys, and a thread walks a chunk through all kv
// heads whose rows lie together, prefetching the block of keys after the one it works on (across
// chunks too). A second pass joins the chunks in order by their log-sum-exp. The cuts depend on the
// sequence's length alone, never on the batch or the threads; so neither does a result.
// Cost: the cache once, 2 * D elements per token and kv head; 4 * D flops per query head for them.
#include "decode_tile.h"
#include "kernels.h"
#include "parallel.h"

namespace lf::LF_ISA {
namespace {

constexpr int64_t kChunk = 256;      // keys; 1 MiB of an 8-head bf16 cache
constexpr int64_t kMaxChunks = 64;   // bounds what the second pass reads
constexpr int64_t kRunBytes = 4096;  // of one token's heads, walked together: two blocks fit L2
constexpr int64_t kPartialBytes = int64_t{64} << 20;

alignas(64) constexpr char kZeroRow[256 * sizeof(float)] = {};

// Keys [first, first + n) of a sequence: where each one's kv head 0 lies.
template <class T>
struct KeyBlock {
  const T* k[kKeyBlock];
  const T* v[kKeyBlock];
  int64_t first = 0;
  int n = 0;
};

// Prefetches a block's rows to L2, token by token, a few rows for every vector of scores (weights)
// computed meanwhile: in one burst they would stall the loads of the block at hand.
template <class T>
class Ahead {
 public:
  Ahead(const KeyBlock<T>& block, const KvCacheAttentionParams& p, int64_t first_head,
        int64_t heads, int64_t key_steps, int64_t value_steps)
      : k_{block.k, first_head * p.k_cache_stride[2], p.k_cache_stride[2], 0, 0, 0},
        v_{block.v, first_head * p.v_cache_stride[2], p.v_cache_stride[2], 0, 0, 0},
        tokens_(block.n),
        heads_(heads),
        row_bytes_(p.head_dim * static_cast<int64_t>(sizeof(T))) {
    k_.per_step = (tokens_ * heads + key_steps - 1) / key_steps;
    v_.per_step = (tokens_ * heads + value_steps - 1) / value_steps;
  }
  void keys() { advance(k_); }
  void values() { advance(v_); }

 private:
  struct Cursor {
    const T* const* rows;
    int64_t offset, stride, per_step, token, head;
  };
  void advance(Cursor& c) {
    for (int64_t i = 0; i < c.per_step && c.token < tokens_; ++i) {
      const char* row =
          reinterpret_cast<const char*>(c.rows[c.token] + c.offset + c.head * c.stride);
      for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      if (++c.head == heads_) c.head = 0, ++c.token;
    }
  }
  Cursor k_, v_;
  int64_t tokens_, heads_, row_bytes_;
};
struct NothingAhead {
  void keys() {}
  void values() {}
};

// One chunk of one sequence, for a run of its kv heads.
struct Item {
  int64_t sequence, chunk, first_head, heads;
};

template <class T>
class Decode {
  using Q = typename Operand<T>::type;

 public:
  Decode(const KvCacheAttentionParams& params, int threads) : p_(params), threads_(threads) {
    const int64_t row_bytes = p_.head_dim * static_cast<int64_t>(sizeof(T));
    const bool token_major = p_.k_cache_stride[2] < p_.k_cache_stride[1];
    if (token_major) run_ = kRunBytes / row_bytes < 1 ? 1 : kRunBytes / row_bytes;
    if (run_ > p_.kv_heads) run_ = p_.kv_heads;
  }

  void run() {
    thread_local Scratch first_scratch, partial_scratch;
    for (int64_t begin = 0, end; begin < p_.batch; begin = end) {
      first_ = first_scratch.get<int64_t>(static_cast<size_t>(p_.batch - begin + 1));
      first_[0] = 0;
      const int64_t most = kPartialBytes / (p_.kv_heads * head_floats_ * 4);
      for (end = begin; end < p_.batch; ++end) {
        const int64_t chunks = first_[end - begin] + num_chunks(end);
        if (end > begin && chunks > most) break;
        first_[end - begin + 1] = chunks;
      }
      partial_ = partial_scratch.get<float>(
          static_cast<size_t>(first_[end - begin] * p_.kv_heads * head_floats_));
      attend(begin, end);
      parallel_for((end - begin) * p_.kv_heads, threads_,
                   [&](int64_t i) { combine(begin, begin + i / p_.kv_heads, i % p_.kv_heads); });
    }
  }

 private:
  int64_t length(int64_t sequence) const { return p_.cache_seqlens[sequence]; }
  int64_t chunk_keys(int64_t sequence) const {
    const int64_t n = length(sequence);
    if (p_.num_splits > 0) return n <= p_.num_splits ? 1 : (n + p_.num_splits - 1) / p_.num_splits;
    const int64_t even = (n + kMaxChunks - 1) / kMaxChunks;
    return (even + kChunk - 1) / kChunk * kChunk;
  }
  int64_t num_chunks(int64_t sequence) const {
    const int64_t n = length(sequence);
    return n > 0 ? (n + chunk_keys(sequence) - 1) / chunk_keys(sequence) : 0;
  }
  // Keys that query row `row` (query-major, then head in group) sees.
  int64_t visible(int64_t sequence, int64_t row) const {
    const int64_t n = length(sequence);
    return p_.causal ? n - p_.seqlen_q + row / group_ + 1 : n;
  }
  TileState& state(int64_t chunk, int64_t kv_head, int64_t row) const {
    return *reinterpret_cast<TileState*>(partial_ + (chunk * p_.kv_heads + kv_head) * head_floats_ +
                                         row / 4 * tile_floats_);
  }
  // Calls f(std::integral_constant<int, R>, first row) for tiles of 4, 4, ... and 4, 2 or 1 rows.
  template <class F>
  void for_each_tile(F&& f) const {
    int64_t row = 0;
    for (; rows_ - row >= 3; row += 4) f(std::integral_constant<int, 4>{}, row);
    if (rows_ - row == 2) f(std::integral_constant<int, 2>{}, row);
    if (rows_ - row == 1) f(std::integral_constant<int, 1>{}, row);
  }

  void attend(int64_t begin, int64_t end) {
    const int64_t chunks = first_[end - begin];
    int64_t run = run_;  // shorter runs when threads would idle; no result depends on it
    while (run > 1 && chunks * ((p_.kv_heads + run - 1) / run) < 2 * threads_) run = (run + 1) / 2;
    const int64_t runs = (p_.kv_heads + run - 1) / run;
    const auto item = [&](int64_t i) {
      const int64_t chunk = i / runs, head = i % runs * run;
      int64_t low = 0, high = end - begin;  // the last sequence whose first chunk is <= chunk
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (first_[middle] <= chunk ? low : high) = middle;
      }
      while (first_[low + 1] <= chunk) ++low;
      return Item{begin + low, chunk - first_[low], head,
                  head + run < p_.kv_heads ? run : p_.kv_heads - head};
    };
    parallel_for_ahead(chunks * runs, threads_, [&](int64_t i, int64_t next) {
      const Item here = item(i);
      const Item then = next < 0 ? Item{} : item(next);
      walk(here, first_[here.sequence - begin] + here.chunk, next < 0 ? nullptr : &then);
    });
  }

  void locate(KeyBlock<T>& block, int64_t sequence, int64_t first, int64_t end) const {
    block.first = first;
    block.n = static_cast<int>(end - first < kKeyBlock ? end - first : kKeyBlock);
    int64_t index = first / p_.block_size, offset = first % p_.block_size;
    for (int done = 0; done < block.n; ++index, offset = 0) {
      const int64_t id =
          p_.block_table ? p_.block_table[sequence * p_.table_stride + index] : sequence;
      const T* k = static_cast<const T*>(p_.k_cache) + id * p_.k_cache_stride[0];
      const T* v = static_cast<const T*>(p_.v_cache) + id * p_.v_cache_stride[0];
      for (; done < block.n && offset < p_.block_size; ++done, ++offset) {
        block.k[done] = k + offset * p_.k_cache_stride[1];
        block.v[done] = v + offset * p_.v_cache_stride[1];
      }
    }
  }

  void load_queries(Q* q, int64_t sequence, int64_t kv_head) const {
    for (int64_t row = 0; row < (rows_ + 3) / 4 * 4; ++row, q += stride_) {
      std::memset(q, 0, static_cast<size_t>(stride_) * sizeof(Q));
      if (row >= rows_) continue;
      const T* x = static_cast<const T*>(p_.q) + sequence * p_.q_stride[0] +
                   row / group_ * p_.q_stride[1] +
                   (kv_head * group_ + row % group_) * p_.q_stride[2];
      if constexpr (std::is_same_v<Q, T>)
        std::memcpy(q, x, static_cast<size_t>(p_.head_dim) * sizeof(T));
      else
        for (int64_t i = 0; i < p_.head_dim; ++i) q[i] = to_float(x[i]);
    }
  }

  // `slot`: the chunk's place among the partial results.
  void walk(const Item& item, int64_t slot, const Item* next) const {
    thread_local Scratch q_scratch;
    const int64_t q_size = (rows_ + 3) / 4 * 4 * stride_;
    Q* q = q_scratch.get<Q>(static_cast<size_t>(item.heads * q_size));
    for (int64_t h = 0; h < item.heads; ++h) {
      load_queries(q + h * q_size, item.sequence, item.first_head + h);
      for_each_tile([&](auto tile_rows, int64_t row) {
        TileState& s = state(slot, item.first_head + h, row);
        store_all(s.max, kLanes, kNoScore);
        store_all(s.total, kLanes, 0.0f);
        store_all(s.sums(), tile_rows * stride_, 0.0f);
      });
    }

    KeyBlock<T> blocks[2];
    const int64_t chunk = chunk_keys(item.sequence), n = length(item.sequence);
    const int64_t begin = item.chunk * chunk, end = begin + chunk < n ? begin + chunk : n;
    locate(blocks[0], item.sequence, begin, end);
    for (int64_t i = 0, at = begin; at < end; at += kKeyBlock, ++i) {
      const KeyBlock<T>& block = blocks[i & 1];
      KeyBlock<T>& then = blocks[(i + 1) & 1];
      Item source = item;
      if (at + kKeyBlock < end) {
        locate(then, item.sequence, at + kKeyBlock, end);
      } else if (next) {
        const int64_t c = chunk_keys(next->sequence), m = length(next->sequence);
        const int64_t from = next->chunk * c;
        locate(then, next->sequence, from, from + c < m ? from + c : m);
        source = *next;
      } else {
        then.n = 0;
      }
      const int first_tile = rows_ >= 3 ? 4 : static_cast<int>(rows_);
      const int64_t vectors = item.heads * ((block.n * first_tile + kLanes - 1) / kLanes);
      Ahead<T> ahead(then, p_, source.first_head, source.heads, vectors,
                     vectors * value_passes<T>(p_.head_dim));
      for (int64_t h = 0; h < item.heads; ++h)
        attend_head(block, item.sequence, slot, item.first_head + h, q + h * q_size, ahead);
    }

    for (int64_t h = 0; h < item.heads; ++h)
      for_each_tile([&](auto tile_rows, int64_t row) {
        TileState& s = state(slot, item.first_head + h, row);
        finish_sums(s.sums(), tile_rows * stride_, static_cast<T*>(nullptr));
      });
  }

  void attend_head(const KeyBlock<T>& block, int64_t sequence, int64_t slot, int64_t kv_head,
                   const Q* q, Ahead<T>& ahead) const {
    const T *k[kKeyBlock], *v[kKeyBlock];
    const int64_t k_offset = kv_head * p_.k_cache_stride[2];
    const int64_t v_offset = kv_head * p_.v_cache_stride[2];
    for (int j = 0; j < block.n; ++j) k[j] = block.k[j] + k_offset, v[j] = block.v[j] + v_offset;
    for (int j = block.n; j < kKeyBlock && j % kLanes; ++j)
      k[j] = v[j] = reinterpret_cast<const T*>(kZeroRow);
    for_each_tile([&](auto tile_rows, int64_t row) {
      constexpr int R = decltype(tile_rows)::value;
      int64_t seen[R];
      for (int r = 0; r < R; ++r) {
        const int64_t real = row + r < rows_ ? row + r : rows_ - 1;
        seen[r] = visible(sequence, real) - block.first;
        if (seen[r] > block.n) seen[r] = block.n;
      }
      if (seen[R - 1] <= 0) return;
      TileState& s = state(slot, kv_head, row);
      const float scale = p_.softmax_scale * 1.44269504088896341f;
      if (row == 0)
        attend_block<R>(s, q, stride_, k, v, block.n, seen, p_.head_dim, scale, ahead);
      else
        attend_block<R>(s, q + row * stride_, stride_, k, v, block.n, seen, p_.head_dim, scale,
                        NothingAhead{});
    });
  }

  // Joins the chunks of a sequence's kv head, in order, and writes its rows.
  void combine(int64_t begin, int64_t sequence, int64_t kv_head) const {
    const int64_t first = first_[sequence - begin], chunks = num_chunks(sequence);
    for_each_tile([&](auto tile_rows, int64_t row) {
      constexpr int R = decltype(tile_rows)::value, kKeys = kLanes / R;
      for (int r = 0; r < R && row + r < rows_; ++r) {
        T* out = static_cast<T*>(p_.out) + sequence * p_.out_stride[0] +
                 (row + r) / group_ * p_.out_stride[1] +
                 (kv_head * group_ + (row + r) % group_) * p_.out_stride[2];
        if (visible(sequence, row + r) <= 0) {
          std::memset(out, 0, static_cast<size_t>(p_.head_dim) * sizeof(T));
          continue;
        }
        alignas(64) float sums[256] = {};
        float top = kNoScore, total = 0.0f;
        for (int64_t c = 0; c < chunks; ++c) {
          const float m = state(first + c, kv_head, row).max[r * kKeys];
          if (!(m <= top)) top = m;
        }
        for (int64_t c = 0; c < chunks; ++c) {
          TileState& s = state(first + c, kv_head, row);
          const Vec w = exp2_nonpositive(broadcast(s.max[r * kKeys] - top));
          float part = 0.0f;
          for (int i = 0; i < kKeys; ++i) part += s.total[r * kKeys + i];
          alignas(64) float weight[kLanes];
          store(weight, w);
          total += part * weight[0];
          const float* x = s.sums() + r * stride_;
          for (int64_t i = 0; i < p_.head_dim; i += kLanes)
            store(sums + i, fma(load(x + i), w, load(sums + i)));
        }
        for (int64_t i = 0; i < p_.head_dim; i += kLanes) {
          const int64_t left = p_.head_dim - i;
          const Vec x = load(sums + i) / broadcast(total);
          if (left >= kLanes)
            store(out + i, x);
          else
            store_n(out + i, x, static_cast<int>(left));
        }
      }
    });
  }

  static void store_all(float* x, int64_t n, float value) {
    for (int64_t i = 0; i < n; i += kLanes) store(x + i, broadcast(value));
  }

  const KvCacheAttentionParams& p_;
  const int threads_;
  const int64_t group_ = p_.heads / p_.kv_heads;
  const int64_t rows_ = p_.seqlen_q * group_;  // query rows that share a kv head
  const int64_t stride_ = padded_dim(p_.head_dim);
  const int64_t tile_floats_ = 2 * kLanes + 4 * stride_;
  const int64_t head_floats_ = (rows_ + 3) / 4 * tile_floats_;
  int64_t run_ = 1;           // kv heads walked together
  int64_t* first_ = nullptr;  // [sequences + 1] of a wave: its first chunk's slot
  float* partial_ = nullptr;  // [slots, kv_heads, tiles] TileState
};

}  // namespace

void kvcache_attention(const KvCacheAttentionParams& p, int threads) {
  if (p.batch == 0 || p.seqlen_q == 0 || p.heads == 0) return;
  with_dtype(p.dtype,
             [&](auto* t) { Decode<std::remove_pointer_t<decltype(t)>>(p, threads).run(); });
}

}  // namespace lf::LF_ISA
