// decode_attention's copies: a warp's own stream of keys and values out of the cache.
#pragma once

#include "decode_plan.cuh"

namespace lf::cuda {

// One warp's tile of keys is 4 KB (or 32 keys, or 16: what mma.sync sums over), its values as much;
// three stages of four warps are 96 KB. Tiles half as large have five.
template <class Cache, int D, int row_tiles>
struct DecodeShape {
  static constexpr int row_bytes = D * static_cast<int>(sizeof(Cache)), chunks = row_bytes / 16;
  static constexpr int keys = row_bytes <= 128 && D * row_tiles <= 128 ? 32 : 16;
  static constexpr int warps = row_bytes > 256 ? 2 : 4;
  static constexpr int stage_bytes = 2 * keys * row_bytes;
  static constexpr int stages = stage_bytes > 4096 ? 3 : 5;
  static constexpr int warp_bytes = stages * stage_bytes,
                       shared_bytes = warps * warp_bytes + sizeof(Part);
};

// Copies tiles of keys and their values, each key wherever its block is, into this warp's stages.
template <class Cache, int D, int row_tiles>
class KeyStream {
 public:
  using S = DecodeShape<Cache, D, row_tiles>;

  LF_DEVICE KeyStream(const KvCacheAttentionParams& p, const DecodePlan& plan, int64_t b,
                      int64_t kv_head, int keys, unsigned char* memory)
      : p_(p), plan_(plan), b_(static_cast<int>(b)), keys_(keys), memory_(memory) {
    k_ = static_cast<const Cache*>(p.k_cache) + kv_head * p.k_cache_stride[2];
    v_ = static_cast<const Cache*>(p.v_cache) + kv_head * p.v_cache_stride[2];
  }

  // Looks up where this lane's key of the tile that starts at `first` lies.
  LF_DEVICE void look_up(int first) {
    const int key = first + lane_id() % S::keys;
    block_ = key < keys_ ? b_ : -1;
    inside_ = key;
    if (!p_.block_table || block_ < 0) return;
    const unsigned size = static_cast<unsigned>(p_.block_size);
    inside_ = static_cast<int>(static_cast<unsigned>(key) % size);
    block_ = p_.block_table[b_ * p_.table_stride + static_cast<unsigned>(key) / size];
    if (block_ >= p_.num_blocks) block_ = -1;
  }

  // Starts the copy of the tile looked up into a stage. Returns which of its keys exist, as bits;
  // the others are zero.
  LF_DEVICE unsigned copy(int stage) {
    constexpr int per_pass = 32 / S::chunks, size = 16 / static_cast<int>(sizeof(Cache));
    const bool exists = block_ >= 0;
    const unsigned seen = __ballot_sync(0xffffffffu, exists);
    const int64_t block = exists ? block_ : 0, inside = exists ? inside_ : 0;
    const int64_t k_mine = block * p_.k_cache_stride[0] + inside * p_.k_cache_stride[1];
    const int64_t v_mine = block * p_.v_cache_stride[0] + inside * p_.v_cache_stride[1];
    const int lane = ptx::opaque(lane_id()), chunk = lane % S::chunks;
    const int left = static_cast<int>(p_.head_dim) - chunk * size;  // of the row, from here on
    const int valid = left <= 0 ? 0 : left < size ? left : size;
    unsigned char* to = keys_at(stage);
#pragma unroll
    for (int i = 0; i < S::keys / per_pass; ++i) {
      const int row = i * per_pass + lane / S::chunks;
      const int64_t k_at = __shfl_sync(0xffffffffu, k_mine, row);
      const int64_t v_at = __shfl_sync(0xffffffffu, v_mine, row);
      const int count = seen >> row & 1 ? valid : 0;
      const int column = count ? chunk * size : 0;
      const int at = swizzled<S::chunks>(row, chunk);
      copy_chunk(to + at, k_ + k_at + column, count);
      copy_chunk(to + S::keys * S::row_bytes + at, v_ + v_at + column, count);
    }
    return seen;
  }

  LF_DEVICE unsigned char* keys_at(int stage) const { return memory_ + stage * S::stage_bytes; }
  LF_DEVICE unsigned char* values_at(int stage) const {
    return keys_at(stage) + S::keys * S::row_bytes;
  }

 private:
  LF_DEVICE void copy_chunk(unsigned char* to, const Cache* from, int count) const {
    if (plan_.cache_aligned) {
      ptx::cp_async_16(to, from, count * static_cast<int>(sizeof(Cache)));
      return;
    }
    Cache* target = reinterpret_cast<Cache*>(to);
#pragma unroll 1
    for (int e = 0; e < 16 / static_cast<int>(sizeof(Cache)); ++e)
      target[e] = e < count ? from[e] : Cache();
  }

  const KvCacheAttentionParams& p_;
  const DecodePlan& plan_;
  const int b_;
  const int keys_;
  unsigned char* memory_;
  const Cache *k_, *v_;
  int block_ = -1, inside_ = 0;  // of this lane's key; -1: there is none
};

}  // namespace lf::cuda
