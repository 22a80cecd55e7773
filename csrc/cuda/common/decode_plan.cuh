// Work partition of decode_attention: which rows and keys a block takes, and where its results go:
// to out or, if the sequence is split, to the workspace.
#pragma once

#include "attention_tile.cuh"

namespace lf::cuda {

// Decided on the host. Keys are counted in tiles of a block: the keys of all its warps.
struct DecodePlan {
  int64_t capacity;  // most keys of a sequence
  int group;         // query heads per key/value head
  int row_tiles;     // tiles of tile_rows in a key/value head's Sq * G rows
  int tile_rows, tile_keys;
  int most;    // most splits of a sequence; sizes the grid
  int forced;  // num_splits
  bool q_aligned, cache_aligned;
};

LF_DEVICE int length_of(const DecodeAttentionParams& p, const DecodePlan& plan, int64_t b) {
  const int length = p.cache_seqlens[b], capacity = static_cast<int>(plan.capacity);
  return length < 0 ? 0 : length > capacity ? capacity : length;
}

// How many keys, from the first, the last query of a tile of rows sees.
LF_DEVICE int keys_of(const DecodeAttentionParams& p, const DecodePlan& plan, int length,
                      int row_tile) {
  const int last = static_cast<int>(p.seqlen_q) - 1;
  if (!p.causal || last == 0) return length;
  const int query = ((row_tile + 1) * plan.tile_rows - 1) / plan.group;
  const int keys = length - last + (query < last ? query : last);
  return keys < 0 ? 0 : keys;
}

// Depends on the keys alone: 128 per split up to eight splits, then 512, until `most` fill the
// chip. More keys never give fewer splits, because the host sizes the grid by the capacity.
constexpr int splits_of(const DecodePlan& plan, int keys) {
  const int few = keys / 128 < 8 ? keys / 128 : 8;
  int splits = keys / 512 > few ? keys / 512 : few;
  if (plan.forced) {  // no split without a tile; those of the rule have 128 keys, at least a tile
    const int tiles = (keys + plan.tile_keys - 1) / plan.tile_keys;
    splits = plan.forced < tiles ? plan.forced : tiles;
  }
  if (splits > plan.most) splits = plan.most;
  return splits < 1 ? 1 : splits;
}

// The rows and keys of a block (fp32: of a warp).
struct Part {
  int row_tile, split, splits, keys, first_tile, last_tile;
  int64_t kv_head, b, length;
};

// index counts [batch, kv_heads, row_tiles].
LF_DEVICE Part part_of(const DecodeAttentionParams& p, const DecodePlan& plan, unsigned index,
                       unsigned split) {
  Part w;
  const unsigned row_tiles = plan.row_tiles, kv_heads = static_cast<unsigned>(p.kv_heads);
  w.b = index / (row_tiles * kv_heads);
  w.length = length_of(p, plan, w.b);
  w.kv_head = row_tiles == 1 ? index % kv_heads : index / row_tiles % kv_heads;
  w.row_tile = row_tiles == 1 ? 0 : static_cast<int>(index % row_tiles);
  w.split = static_cast<int>(split);
  w.keys = keys_of(p, plan, static_cast<int>(w.length), w.row_tile);
  w.splits = splits_of(plan, w.keys);
  if (w.split >= w.splits) return w;  // the grid covers the capacity: this block has no work
  const int tiles = (w.keys + plan.tile_keys - 1) / plan.tile_keys;
  const int each = tiles / w.splits, more = tiles % w.splits;
  w.first_tile = w.split * each + (w.split < more ? w.split : more);
  w.last_tile = w.first_tile + each + (w.split < more);
  return w;
}

// Row r of a key/value head: its place in q or out, and its index in [B, Sq, H].
struct Row {
  int64_t query, head;
  LF_DEVICE Row(const DecodePlan& plan, int64_t kv_head, int r) {
    const unsigned group = static_cast<unsigned>(plan.group);
    query = static_cast<unsigned>(r) / group;
    head = kv_head * group + static_cast<unsigned>(r) % group;
  }
  LF_DEVICE int64_t in(const int64_t (&stride)[3], int64_t b) const {
    return b * stride[0] + query * stride[1] + head * stride[2];
  }
  LF_DEVICE int64_t index(const DecodeAttentionParams& p, int64_t b) const {
    return (b * p.seqlen_q + query) * p.heads + head;
  }
};

// The workspace: sums [B, Sq, H, most, D], then maxima and totals [B, Sq, H, most, 2].
LF_DEVICE float* partial_sums(const DecodeAttentionParams& p, const DecodePlan& plan, int64_t row,
                              int split) {
  return p.workspace + (row * plan.most + split) * p.head_dim;
}
LF_DEVICE float* partial_stats(const DecodeAttentionParams& p, const DecodePlan& plan, int64_t row,
                               int split) {
  const int64_t rows = p.batch * p.seqlen_q * p.heads;
  return p.workspace + rows * plan.most * p.head_dim + (row * plan.most + split) * 2;
}

// Stores four columns of a row, rounded to out's dtype.
LF_DEVICE void store_io(const DecodeAttentionParams& p, int64_t at, const float (&x)[4],
                        bool aligned) {
  if (p.dtype == DType::f32) {
#pragma unroll
    for (int e = 0; e < 4; ++e) static_cast<float*>(p.out)[at + e] = x[e];
    return;
  }
  const bool half = p.dtype == DType::f16;
  const uint2 pairs{half ? pack<__half>(x[0], x[1]) : pack<__nv_bfloat16>(x[0], x[1]),
                    half ? pack<__half>(x[2], x[3]) : pack<__nv_bfloat16>(x[2], x[3])};
  uint16_t* to = static_cast<uint16_t*>(p.out) + at;
  if (aligned) {
    *reinterpret_cast<uint2*>(to) = pairs;
  } else {
    to[0] = static_cast<uint16_t>(pairs.x), to[1] = static_cast<uint16_t>(pairs.x >> 16);
    to[2] = static_cast<uint16_t>(pairs.y), to[3] = static_cast<uint16_t>(pairs.y >> 16);
  }
}

}  // namespace lf::cuda
