// Address of an FP8 operand's scale for a row and a block of 128 of k. One formula covers every
// granularity, where a choice per load would be a branch.
#pragma once

#include "vector.cuh"

namespace lf::cuda {

struct ScaleAt {
  const float* data;
  int64_t of_row, of_k;  // elements from one row, or one block of k, to the next
  int row_bits;          // 2^row_bits rows share a scale

  LF_DEVICE const float* operator()(int64_t row, int64_t block = 0) const {
    return data + (row >> row_bits) * of_row + block * of_k;
  }
};

inline ScaleAt scale_at(const float* data, Scale granularity, int64_t k, int64_t block_rows = 1) {
  if (granularity == Scale::tensor) return {data, 0, 0, 0};
  if (granularity == Scale::row) return {data, 1, 0, 0};
  return {data, (k + 127) / 128, 1, block_rows == 128 ? 7 : 0};
}

}  // namespace lf::cuda
