// attention_with_kvcache: few queries over a long cache, contiguous or paged.
//
//   s = softmax_scale * log2(e) * q k^T,  p = 2^(s - max s),  out = p v / sum p
//
// Reading the cache sets the time. The query heads of a kv head share each load of a key. A
// sequence is cut into chunks of keys, and a thread walks a chunk through all kv heads with
// adjacent rows, prefetching the next block of keys (across chunks too). A second pass joins the
// chunks in order by their log-sum-exp. The cuts depend on the sequence's length alone, never on
// the batch or the threads, so neither does a result.
// Cost: one read of the cache, 2 * D elements per token and kv head; 4 * D FLOPs per query head for
// them. Many queries (chunked prefill) use the tiles of prefill attention, gathered through the
// table. Elements are of q's dtype, or e4m3: half the bytes or less. k_scale multiplies the scores,
// and v_scale the results.
#include "decode_tile.h"
#include "kernels.h"
#include "parallel.h"

namespace lf::LF_ISA {
namespace {

constexpr int kStep = 2 * kLanes;
constexpr int64_t kChunk = 512;      // keys; 2 MiB of an 8-head bf16 cache
constexpr int64_t kMaxChunks = 64;   // bounds what the second pass reads
constexpr int64_t kRunBytes = 4096;  // per token, of heads walked together: two blocks fit L2
constexpr int64_t kPartialBytes = int64_t{64} << 20;
// Packing a kv head's keys pays from this many rows that share it.
constexpr int64_t kPrefillRows = 48;
constexpr int64_t kPrefillTile = 384;  // rows, as in attention.cpp

alignas(64) constexpr char kZeroRow[256 * sizeof(float)] = {};

float scale_of(const float* scale, bool per_head, int64_t kv_head) {
  return scale ? scale[per_head ? kv_head : 0] : 1.0f;
}

// Locates the keys of a sequence.
template <class T>
class Rows {
 public:
  Rows(const void* cache, const int64_t (&stride)[3], const DecodeAttentionParams& p,
       int64_t sequence)
      : cache_(static_cast<const T*>(cache)),
        table_(p.block_table ? p.block_table + sequence * p.table_stride : nullptr),
        stride_(stride),
        block_size_(p.block_size),
        sequence_(sequence) {}
  // Address of key j at kv head 0. Keys mostly come in order: one division per block, not per key.
  const T* operator()(int64_t j) {
    if (!block_ || j < first_ || j >= first_ + block_size_) {
      const int64_t index = j / block_size_;
      first_ = index * block_size_;
      block_ = cache_ + (table_ ? table_[index] : sequence_) * stride_[0];
    }
    return block_ + (j - first_) * stride_[1];
  }

 private:
  const T* cache_;
  const int32_t* table_;
  const int64_t (&stride_)[3];
  int64_t block_size_, sequence_;
  int64_t first_ = 0;
  const T* block_ = nullptr;
};

// Keys [first, first + n) of a sequence, kv head 0.
template <class T>
struct KeyBlock {
  const T* k[kKeyBlock];
  const T* v[kKeyBlock];
  int64_t first = 0;
  int n = 0;
};

// One chunk of keys of one sequence, for consecutive kv heads.
struct Item {
  int64_t sequence, slot;  // slot: the chunk's index among the partial results
  int64_t begin, end;
  int64_t first_head, heads;
};

// Up to 4 heads of a query that share a kv head, starting at `first`.
struct Tile {
  int64_t query, first;
};

// T: the dtype of q, C: of the cache.
template <class T, class C>
class Decode {
  using Q = typename Operand<T>::type;

 public:
  Decode(const DecodeAttentionParams& params, int threads) : p_(params), threads_(threads) {}

  // Runs in waves of sequences, which bounds the memory of the partial results.
  void run() {
    thread_local Scratch slots, partials;
    for (int64_t begin = 0, end; begin < p_.batch; begin = end) {
      first_slot_ = slots.get<int64_t>(static_cast<size_t>(p_.batch + 1));
      first_slot_[begin] = 0;
      const int64_t most = kPartialBytes / (p_.kv_heads * head_floats_ * 4);
      for (end = begin; end < p_.batch; ++end) {
        const int64_t sum = first_slot_[end] + num_chunks(end);
        if (end > begin && sum > most) break;
        first_slot_[end + 1] = sum;
      }
      partial_ =
          partials.get<float>(static_cast<size_t>(first_slot_[end] * p_.kv_heads * head_floats_));
      attend(begin, end);
      parallel_for((end - begin) * p_.kv_heads, threads_,
                   [&](int64_t i) { combine(begin + i / p_.kv_heads, i % p_.kv_heads); });
    }
  }

 private:
  int64_t length(int64_t sequence) const { return p_.cache_seqlens[sequence]; }
  int64_t chunk_keys(int64_t sequence) const {
    const int64_t n = length(sequence), splits = p_.num_splits < 1024 ? p_.num_splits : 1024;
    if (splits > 0) return n > splits ? (n + splits - 1) / splits : 1;
    return round_up((n + kMaxChunks - 1) / kMaxChunks, kChunk);
  }
  int64_t num_chunks(int64_t sequence) const {
    const int64_t n = length(sequence);
    return n > 0 ? (n + chunk_keys(sequence) - 1) / chunk_keys(sequence) : 0;
  }
  // Number of keys that a query sees.
  int64_t seen(int64_t sequence, int64_t query) const {
    const int64_t n = length(sequence);
    return p_.causal ? clamp(n - p_.seqlen_q + query + 1, 0, n) : n;
  }

  // Calls f(std::integral_constant<int, R>, tile). A tile never mixes queries: its rows see the
  // same keys, and a NaN among the values reaches only the queries that see it.
  template <class F>
  void for_each_tile(F&& f) const {
    for (int64_t query = 0; query < p_.seqlen_q; ++query) {
      int64_t first = 0;
      for (; group_ - first >= 3; first += 4)
        f(std::integral_constant<int, 4>{}, Tile{query, first});
      if (group_ - first == 2) f(std::integral_constant<int, 2>{}, Tile{query, first});
      if (group_ - first == 1) f(std::integral_constant<int, 1>{}, Tile{query, first});
    }
  }
  int64_t row(const Tile& tile) const { return tile.query * group_rows_ + tile.first; }
  TileState& state(int64_t slot, int64_t kv_head, const Tile& tile) const {
    return *reinterpret_cast<TileState*>(partial_ + (slot * p_.kv_heads + kv_head) * head_floats_ +
                                         row(tile) / 4 * tile_floats_);
  }

  // ---- the first pass: chunks ----

  // Number of kv heads to walk together: as many as are adjacent in kRunBytes of a token, fewer if
  // threads would idle. No result depends on it.
  int64_t heads_per_item(int64_t chunks) const {
    const int64_t row_bytes = p_.head_dim * static_cast<int64_t>(sizeof(C));
    const bool token_major = p_.k_cache_stride[2] < p_.k_cache_stride[1];
    int64_t heads = token_major ? clamp(kRunBytes / row_bytes, 1, p_.kv_heads) : 1;
    while (heads > 1 && chunks * ((p_.kv_heads + heads - 1) / heads) < 2 * threads_)
      heads = (heads + 1) / 2;
    return heads;
  }

  void attend(int64_t begin, int64_t end) const {
    const int64_t slots = first_slot_[end], heads = heads_per_item(slots);
    const int64_t runs = (p_.kv_heads + heads - 1) / heads;
    const auto item = [&](int64_t i) {
      const int64_t slot = i / runs, first_head = i % runs * heads;
      int64_t b = begin, after = end;  // until first_slot_[b] <= slot < first_slot_[b + 1]
      while (after - b > 1) {
        const int64_t middle = (b + after) / 2;
        (first_slot_[middle] <= slot ? b : after) = middle;
      }
      const int64_t chunk = chunk_keys(b), first = (slot - first_slot_[b]) * chunk;
      return Item{b,          slot,
                  first,      clamp(first + chunk, 0, length(b)),
                  first_head, clamp(p_.kv_heads - first_head, 0, heads)};
    };
    parallel_for_ahead(slots * runs, threads_, [&](int64_t i, int64_t next) {
      walk(item(i), next < 0 ? Item{} : item(next));
    });
  }

  KeyBlock<C> locate(const Item& item, int64_t first) const {
    KeyBlock<C> block;
    block.first = first;
    block.n = static_cast<int>(clamp(item.end - first, 0, kKeyBlock));
    Rows<C> k(p_.k_cache, p_.k_cache_stride, p_, item.sequence);
    Rows<C> v(p_.v_cache, p_.v_cache_stride, p_, item.sequence);
    for (int j = 0; j < block.n; ++j) block.k[j] = k(first + j), block.v[j] = v(first + j);
    return block;
  }

  // Loads a row of q in the order of the cache's elements.
  void load_query(Q* to, const T* from) const {
    const int64_t d = p_.head_dim;
    if constexpr (std::is_same_v<C, e4m3> && std::is_same_v<Q, bf16>) {
      for (int64_t i = 0; i < d; i += 8)  // within 64: 8 of a, 8 of b, 8 of a ...
        std::memcpy(to + i / 64 * 64 + i % 16 / 8 * 32 + i % 64 / 16 * 8, from + i,
                    static_cast<size_t>(clamp(d - i, 0, 8)) * sizeof(T));
    } else if constexpr (std::is_same_v<C, e4m3>) {
      constexpr int kSize = Chunk<C, false>::kSize;
      float row[256 + kStep] = {};
      for (int64_t i = 0; i < d; i += kLanes) store(row + i, load_n(from + i, lanes_left(d - i)));
      for (int64_t i = 0; i < d; i += kSize)
        for (int j = 0; j < kSize; ++j) to[i + j] = row[i + chunk_element(j)];
    } else if constexpr (std::is_same_v<Q, T>) {
      std::memcpy(to, from, static_cast<size_t>(d) * sizeof(T));
    } else {
      for (int64_t i = 0; i < d; i += kStep) {
        const int64_t left = d - i;
        const Pair x = left < kStep ? load2_n(from + i, static_cast<int>(left)) : load2(from + i);
        store(to + i, x.a), store(to + i + kLanes, x.b);
      }
    }
  }

  // Loads a tile's rows of q and returns what turns their products with keys into base-2 scores.
  float load_queries(Q* q, int64_t sequence, int64_t kv_head, int64_t rows,
                     const Tile& tile) const {
    std::memset(q, 0, static_cast<size_t>(rows * stride_) * sizeof(Q));
    for (int64_t r = 0; r < rows && tile.first + r < group_; ++r)
      load_query(q + r * stride_, static_cast<const T*>(p_.q) + sequence * p_.q_stride[0] +
                                      tile.query * p_.q_stride[1] +
                                      (kv_head * group_ + tile.first + r) * p_.q_stride[2]);
    double scale = static_cast<double>(p_.softmax_scale * 1.44269504088896341f) *
                   scale_of(p_.k_scale, p_.k_scale_per_head, kv_head);
    if constexpr (kShift<Q, C> != 0) {
      // q times a power of two, so that its products with keys times 2^-kShift keep all their bits.
      Vec most = zeros();
      for (int64_t i = 0; i < rows * stride_; i += kLanes) most = max(abs(load(q + i)), most);
      const int exponent = static_cast<int>(float_bits(reduce_max(most)) >> 23) - 127;
      const int least = kShift<Q, C> - 127;
      const int up = static_cast<int>(clamp(100 - exponent, least > -126 ? least : -126, 126));
      for (int64_t i = 0; i < rows * stride_; i += kLanes)
        store(q + i, load(q + i) * broadcast(power_of_two(up)));
      scale = std::ldexp(scale, kShift<Q, C> - up);
    }
    return plain_nan(static_cast<float>(scale));
  }

  void walk(const Item& item, const Item& next) const {
    thread_local Scratch scratch;
    const int64_t q_size = p_.seqlen_q * group_rows_ * stride_;
    Q* q = scratch.get<Q>(static_cast<size_t>(item.heads * q_size));
    for (int64_t h = 0; h < item.heads; ++h) {
      const int64_t head = item.first_head + h;
      for_each_tile([&](auto rows, const Tile& tile) {
        Q* const to = q + h * q_size + row(tile) * stride_;
        const float scale = load_queries(to, item.sequence, head, rows, tile);
        state(item.slot, head, tile).start(rows * stride_, scale);
      });
    }

    KeyBlock<C> block = locate(item, item.begin);
    while (block.n) {
      const int64_t after = block.first + block.n;
      const Item& source = after < item.end ? item : next;
      const KeyBlock<C> then = locate(source, after < item.end ? after : next.begin);
      // Adjacent heads are one run of memory.
      const auto ahead = [&](const C* const* rows, const int64_t (&stride)[3], int64_t calls) {
        const int64_t last = source.heads > 1 ? (source.heads - 1) * stride[2] : 0;
        return RowStream(rows, source.first_head * stride[2], then.n,
                         (last + p_.head_dim) * static_cast<int64_t>(sizeof(C)), calls);
      };
      const int64_t rows = group_ >= 3 ? 4 : group_;
      const int64_t d = p_.head_dim, n = block.n, key_calls = (n * rows + kLanes - 1) / kLanes;
      const int64_t value_calls = rows == 4   ? value_advances<4, Q>(n, d)
                                  : rows == 2 ? value_advances<2, Q>(n, d)
                                              : value_advances<1, Q>(n, d);
      RowStream keys = ahead(then.k, p_.k_cache_stride, item.heads * key_calls);
      RowStream values = ahead(then.v, p_.v_cache_stride, item.heads * value_calls);
      for (int64_t h = 0; h < item.heads; ++h)
        attend_head(block, item, item.first_head + h, q + h * q_size, keys, values);
      if (after >= item.end) break;
      block = then;
    }

    for (int64_t h = 0; h < item.heads; ++h)
      for_each_tile([&](auto rows, const Tile& tile) {
        finish_tile<decltype(rows)::value, Q, C>(state(item.slot, item.first_head + h, tile),
                                                 stride_);
      });
  }

  void attend_head(const KeyBlock<C>& block, const Item& item, int64_t kv_head, const Q* q,
                   RowStream& keys_ahead, RowStream& values_ahead) const {
    const C *k[kKeyBlock], *v[kKeyBlock];
    const int64_t k_offset = kv_head * p_.k_cache_stride[2];
    const int64_t v_offset = kv_head * p_.v_cache_stride[2];
    for (int j = 0; j < block.n; ++j) k[j] = block.k[j] + k_offset, v[j] = block.v[j] + v_offset;
    const bool nan = holds_nan<Q>(k, block.n, p_.head_dim) || holds_nan<Q>(v, block.n, p_.head_dim);
    RowStream nothing;
    for_each_tile([&](auto rows, const Tile& tile) {
      constexpr int R = decltype(rows)::value;
      const int64_t left = seen(item.sequence, tile.query) - block.first;
      const int n = static_cast<int>(clamp(left, 0, block.n));
      if (n == 0) return;
      const C *tail_k[kKeyBlock], *tail_v[kKeyBlock];
      const bool whole = n % (kLanes / R) == 0, first = row(tile) == 0;
      if (!whole)
        for (int j = 0; j < kKeyBlock; ++j) {
          tail_k[j] = j < n ? k[j] : reinterpret_cast<const C*>(kZeroRow);
          tail_v[j] = j < n ? v[j] : reinterpret_cast<const C*>(kZeroRow);
        }
      const auto attend = [&](auto exact) {
        attend_block<R, decltype(exact)::value>(
            state(item.slot, kv_head, tile), q + row(tile) * stride_, stride_, whole ? k : tail_k,
            whole ? v : tail_v, n, p_.head_dim, first ? keys_ahead : nothing,
            first ? values_ahead : nothing);
      };
      if constexpr (kShift<Q, C> != 0)
        if (nan) return attend(std::true_type{});
      attend(std::false_type{});
    });
  }

  // ---- the second pass ----

  // Joins the chunks of a sequence's kv head, in order, and writes its rows.
  void combine(int64_t sequence, int64_t kv_head) const {
    for_each_tile([&](auto rows, const Tile& tile) {
      for (int r = 0; r < rows && tile.first + r < group_; ++r) {
        T* out = static_cast<T*>(p_.out) + sequence * p_.out_stride[0] +
                 tile.query * p_.out_stride[1] +
                 (kv_head * group_ + tile.first + r) * p_.out_stride[2];
        combine_row(out, sequence, kv_head, tile, r, r * kLanes / rows);
      }
    });
  }
  void combine_row(T* out, int64_t sequence, int64_t kv_head, const Tile& tile, int64_t r,
                   int64_t lane) const {
    const int64_t begin = first_slot_[sequence], end = first_slot_[sequence + 1];
    float top = -FLT_MAX;
    for (int64_t slot = begin; slot < end; ++slot) {
      const float m = state(slot, kv_head, tile).max[lane];
      if (!(m <= top)) top = m;
    }
    alignas(64) float sums[256] = {};
    Vec total = zeros();
    for (int64_t slot = begin; slot < end; ++slot) {
      TileState& s = state(slot, kv_head, tile);
      const Vec weight = exp2_nonpositive<false>(broadcast(s.max[lane] - top));
      total = fma(weight, broadcast(s.total[lane]), total);
      const float* x = s.sums() + r * stride_;
      for (int64_t i = 0; i < stride_; i += kLanes)
        store(sums + i, fma(load(x + i), weight, load(sums + i)));
    }
    const bool none = seen(sequence, tile.query) == 0;
    if constexpr (std::is_same_v<C, e4m3>) {
      const float scale = plain_nan(scale_of(p_.v_scale, p_.v_scale_per_head, kv_head));
      float row[256 + kStep];
      for (int64_t i = 0; i < stride_; ++i) row[value_element<Q>(i)] = sums[i];
      for (int64_t i = 0; i < p_.head_dim; i += kLanes) {
        const Vec x = none ? zeros() : load(row + i) / total * broadcast(scale);
        store_n(out + i, x, lanes_left(p_.head_dim - i));
      }
      return;
    }
    for (int64_t i = 0; i < p_.head_dim; i += kStep) {
      Pair x = {zeros(), zeros()};
      if (!none) x = {load(sums + i) / total, load(sums + i + kLanes) / total};
      const int64_t left = p_.head_dim - i;
      if (left >= kStep)
        store2(out + i, x);
      else
        store2_n(out + i, x, static_cast<int>(left));
    }
  }

  const DecodeAttentionParams& p_;
  const int threads_;
  const int64_t group_ = p_.heads / p_.kv_heads;
  const int64_t group_rows_ = round_up(group_, 4);  // a query's tiles start at multiples of 4
  const int64_t stride_ = padded_dim(p_.head_dim);
  const int64_t tile_floats_ = 3 * kLanes + 4 * stride_;
  const int64_t head_floats_ = p_.seqlen_q * group_rows_ / 4 * tile_floats_;
  int64_t* first_slot_ = nullptr;  // [batch + 1], valid for a wave's sequences and its end
  float* partial_ = nullptr;       // [slots, kv_heads, tiles] TileState
};

// As in attention.cpp: a work item is a tile of queries of one sequence and kv head.
template <class T, class C>
void prefill(const DecodeAttentionParams& p, int threads) {
  const int64_t group = p.heads / p.kv_heads;
  int64_t tokens = kPrefillTile / group > 0 ? kPrefillTile / group : 1;
  const auto tiles = [&] { return (p.seqlen_q + tokens - 1) / tokens; };
  while (tokens > 1 && p.batch * tiles() * p.kv_heads < 4 * threads &&
         tokens * group > 4 * kStripRows)
    tokens = (tokens + 1) / 2;
  const int64_t per_sequence = tiles() * p.kv_heads;
  parallel_for(p.batch * per_sequence, threads, [&](int64_t i) {
    const int64_t b = i / per_sequence, head = i % p.kv_heads;
    // The last queries see the most keys. They come first, so that no thread ends with them.
    const int64_t start = (tiles() - 1 - i % per_sequence / p.kv_heads) * tokens;
    const int64_t keys = p.cache_seqlens[b];
    const AttentionTile tile{
        clamp(p.seqlen_q - start, 0, tokens),
        group,
        p.head_dim,
        keys,
        p.causal ? keys - p.seqlen_q + start + 1 : keys,
        plain_nan(p.softmax_scale * scale_of(p.k_scale, p.k_scale_per_head, head)),
        plain_nan(scale_of(p.v_scale, p.v_scale_per_head, head))};
    Rows<C> k(p.k_cache, p.k_cache_stride, p, b), v(p.v_cache, p.v_cache_stride, p, b);
    attend_tile<T>(
        tile,
        [&](int64_t t, int64_t g) {
          return static_cast<const T*>(p.q) + b * p.q_stride[0] + (start + t) * p.q_stride[1] +
                 (head * group + g) * p.q_stride[2];
        },
        [&](int64_t j) { return k(j) + head * p.k_cache_stride[2]; },
        [&](int64_t j) { return v(j) + head * p.v_cache_stride[2]; },
        [&](int64_t t, int64_t g) {
          return static_cast<T*>(p.out) + b * p.out_stride[0] + (start + t) * p.out_stride[1] +
                 (head * group + g) * p.out_stride[2];
        });
  });
}

template <class T, class C>
void run(const DecodeAttentionParams& p, int threads) {
  if (p.seqlen_q > 1 && p.seqlen_q * (p.heads / p.kv_heads) >= kPrefillRows)
    prefill<T, C>(p, threads);
  else
    Decode<T, C>(p, threads).run();
}

}  // namespace

void decode_attention(const DecodeAttentionParams& p, int threads) {
  if (p.batch == 0 || p.seqlen_q == 0 || p.heads == 0) return;
  with_dtype(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (p.cache_dtype == DType::e4m3)
      run<T, e4m3>(p, threads);
    else
      run<T, T>(p, threads);
  });
}

}  // namespace lf::LF_ISA
