// The CUDA kernels' launchers, one a file. Each enqueues on where.stream of where.device and
// returns at once; a failure is a std::runtime_error that names the op and its shapes.
#pragma once

#include "../params.h"

namespace lf::cuda {

struct Where {
  int device;
  void* stream;  // cudaStream_t
};

void rms_norm(const RmsNormParams& p, const Where& where);
void silu_and_mul(const SiluAndMulParams& p, const Where& where);
void quantize_fp8(const QuantizeFp8Params& p, const Where& where);
void rope(const RopeParams& p, const Where& where);
void attention(const AttentionParams& p, const Where& where);
void kvcache_attention(const KvCacheAttentionParams& p, const Where& where);
void linear(const LinearParams& p, const Where& where);

// How many partial results of each query's head kvcache_attention's workspace must hold: 1, and
// then it needs none, or more. Of p: sizes, dtypes, num_splits.
int64_t kvcache_attention_splits(const KvCacheAttentionParams& p, const Where& where);

}  // namespace lf::cuda
