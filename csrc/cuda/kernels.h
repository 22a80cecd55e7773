// The CUDA kernels' launchers, one a file. Each enqueues on where.stream of where.device and
// returns at once; a failure is a std::runtime_error that names the op and its shapes.
#pragma once

#include "../params.h"

namespace lf::cuda {

struct Where {
  int device;
  void* stream;  // cudaStream_t
};

#define LF_DECLARE(op, Params) void op(const Params& p, const Where& where);
LF_OPS(LF_DECLARE)
#undef LF_DECLARE

// How many partial results of each query's head decode_attention's workspace must hold: 1, and
// then it needs none, or more. Of p: sizes, dtypes, num_splits.
int64_t decode_attention_splits(const DecodeAttentionParams& p, const Where& where);

}  // namespace lf::cuda
