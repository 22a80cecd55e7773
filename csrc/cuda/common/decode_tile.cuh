// decode_attention's copies: each warp streams its own keys and values from the cache.
#pragma once

#include "decode_plan.cuh"

namespace lf::cuda {

// One warp's tile of keys is 4 KB (or 32 keys, or 16, the depth of mma.sync), and its values the
// same. Three stages of four warps are 96 KB. Tiles half as large have five stages.
template <class Cache, int D, int row_tiles>
struct DecodeShape {
  static constexpr int row_bytes = D * static_cast<int>(sizeof(Cache)), chunks = row_bytes / 16;
  static constexpr int keys = row_bytes <= 128 && D * row_tiles <= 128 ? 32 : 16;
  static constexpr int warps = row_bytes > 256 ? 2 : 4;
  static constexpr int stage_bytes = 2 * keys * row_bytes;
  static constexpr int stages = stage_bytes > 4096 ? 3 : 5;
  static constexpr int warp_bytes = stages * stage_bytes;
  // Follows the stages. These values would only fill registers in the loop.
  struct Kept {
    Part part;
    unsigned seen[warps][stages];        // bit mask of a stage's keys that exist
    float scale[warps][16 * row_tiles];  // FP8: of each row's scores
  };
  static constexpr int shared_bytes = warps * warp_bytes + static_cast<int>(sizeof(Kept));
  LF_DEVICE static Kept& kept(unsigned char* memory) {
    return *reinterpret_cast<Kept*>(memory + warps * warp_bytes);
  }
};

// Copies tiles of keys and values into this warp's stages, each key from its own block.
template <class Cache, int D, int row_tiles>
class KeyStream {
 public:
  using S = DecodeShape<Cache, D, row_tiles>;

  // memory: the block's, with Kept::part set.
  LF_DEVICE KeyStream(const DecodeAttentionParams& p, const DecodePlan& plan, unsigned char* memory,
                      int warp)
      : p_(p),
        plan_(plan),
        memory_(memory + warp * S::warp_bytes),
        kept_(S::kept(memory)),
        warp_(warp) {}

  // Finds where this lane's key of the tile that starts at `first` lies.
  LF_DEVICE void look_up(int first) {
    const int key = first + lane_id() % S::keys;
    const int b = static_cast<int>(kept_.part.b);
    block_ = key < kept_.part.keys ? b : -1;
    inside_ = key;
    if (!p_.block_table || block_ < 0) return;
    const unsigned size = static_cast<unsigned>(p_.block_size);
    inside_ = static_cast<int>(static_cast<unsigned>(key) % size);
    block_ = p_.block_table[b * p_.table_stride + static_cast<unsigned>(key) / size];
    if (block_ >= p_.num_blocks) block_ = -1;
  }

  // Starts the copy of the tile found into a stage. Keys that do not exist become zero.
  LF_DEVICE void copy(int stage) {
    constexpr int per_pass = 32 / S::chunks, size = 16 / static_cast<int>(sizeof(Cache));
    const bool exists = block_ >= 0;
    const unsigned seen = __ballot_sync(0xffffffffu, exists);
    if (lane_id() == 0) kept_.seen[warp_][stage] = seen;
    const Cache* const k_mine = row_at(p_.k_cache, p_.k_cache_stride);
    const Cache* const v_mine = row_at(p_.v_cache, p_.v_cache_stride);
    const int lane = ptx::opaque(lane_id()), chunk = lane % S::chunks;
    const int left = static_cast<int>(p_.head_dim) - chunk * size;  // in the row
    const int valid = left <= 0 ? 0 : left < size ? left : size;
    unsigned char* to = keys_at(stage);
#pragma unroll
    for (int i = 0; i < S::keys / per_pass; ++i) {
      const int row = i * per_pass + lane / S::chunks;
      const Cache* const k = of_lane(k_mine, row);
      const Cache* const v = of_lane(v_mine, row);
      const int count = seen >> row & 1 ? valid : 0;
      const int column = count ? chunk * size : 0;
      const int at = swizzled<S::chunks>(row, chunk);
      copy_chunk(to + at, k + column, count);
      copy_chunk(to + S::keys * S::row_bytes + at, v + column, count);
    }
  }

  // Bit mask of a stage's keys that exist.
  LF_DEVICE unsigned seen(int stage) const { return kept_.seen[warp_][stage]; }
  LF_DEVICE unsigned char* keys_at(int stage) const { return memory_ + stage * S::stage_bytes; }
  LF_DEVICE unsigned char* values_at(int stage) const {
    return keys_at(stage) + S::keys * S::row_bytes;
  }

 private:
  // This lane's key in a cache; some valid row if there is none.
  LF_DEVICE const Cache* row_at(const void* cache, const int64_t (&stride)[3]) const {
    const int64_t block = block_ < 0 ? 0 : block_, inside = block_ < 0 ? 0 : inside_;
    return static_cast<const Cache*>(cache) + block * stride[0] + inside * stride[1] +
           kept_.part.kv_head * stride[2];
  }
  LF_DEVICE static const Cache* of_lane(const Cache* p, int lane) {
    const auto address = reinterpret_cast<unsigned long long>(p);
    return reinterpret_cast<const Cache*>(__shfl_sync(0xffffffffu, address, lane));
  }
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

  const DecodeAttentionParams& p_;
  const DecodePlan& plan_;
  unsigned char* const memory_;  // this warp's stages
  typename S::Kept& kept_;
  const int warp_;
  int block_ = -1, inside_ = 0;  // of this lane's key; block_ is -1 if there is none
};

}  // namespace lf::cuda
