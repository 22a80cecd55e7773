// Launchers of the CUDA kernels, one per file. Each enqueues on where.stream of where.device and
// returns at once. A failure is a std::runtime_error that names the op and its shapes.
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

// Number of partial results per query head that decode_attention's workspace must hold; 1: it needs
// no workspace. Uses p's sizes, dtypes and num_splits.
int64_t decode_attention_splits(const DecodeAttentionParams& p, const Where& where);

}  // namespace lf::cuda
