// decode_attention on the host: how many splits the keys of a call are cut into.
#pragma once

#include "decode_plan.cuh"

namespace lf::cuda {

// How many splits of a sequence's `parts` fill a chip that runs `slots` at a time: the fewest that
// fill their waves to 19/20 of what the best choice within four waves does.
inline int64_t filling(int64_t parts, int64_t slots) {
  const auto full = [&](int64_t splits) {
    const int64_t blocks = parts * splits;
    return static_cast<double>(blocks) / static_cast<double>((blocks + slots - 1) / slots * slots);
  };
  const int64_t most = 4 * slots / parts < 1 ? 1 : 4 * slots / parts;
  double best = 0;
  for (int64_t s = 1; s <= most; ++s) best = full(s) > best ? full(s) : best;
  for (int64_t s = 1;; ++s)
    if (full(s) >= 0.95 * best) return s;
}

inline DecodePlan plan_of(const DecodeAttentionParams& p, const Device& device, int tile_rows,
                          int tile_keys, size_t shared_bytes, int parts_per_block) {
  constexpr int64_t kMostKeys = (int64_t{1} << 31) - (1 << 16);  // positions are ints
  constexpr int64_t kMostSplits = 65535;  // the limit of a grid's second dimension
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  DecodePlan plan{};
  plan.capacity = smaller(p.block_size * (p.block_table ? p.table_blocks : 1), kMostKeys);
  plan.group = static_cast<int>(p.heads / p.kv_heads);
  const int64_t rows = p.seqlen_q * plan.group;
  plan.tile_rows = tile_rows;
  plan.tile_keys = tile_keys;
  plan.row_tiles = static_cast<int>((rows + tile_rows - 1) / tile_rows);
  // Counts two blocks per multiprocessor if its shared memory has room.
  const int64_t resident = device.shared_bytes >= 2 * shared_bytes ? 2 : 1;
  const int64_t slots = device.multiprocessors * resident * parts_per_block;
  const int64_t most = p.num_splits ? p.num_splits : filling(p.kv_heads * plan.row_tiles, slots);
  plan.forced = static_cast<int>(smaller(p.num_splits, kMostSplits));
  plan.most = static_cast<int>(smaller(most, kMostSplits));
  plan.most = splits_of(plan, static_cast<int>(plan.capacity));
  return plan;
}

// Whether every row starts at a multiple of `to` elements from an aligned base.
inline bool rows_aligned(const void* base, const int64_t (&stride)[3], int64_t to) {
  return is_aligned(base) && stride[0] % to == 0 && stride[1] % to == 0 && stride[2] % to == 0;
}

}  // namespace lf::cuda
