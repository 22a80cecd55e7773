// Selects the compiled instruction sets that this machine can run.
#include "kernels.h"

namespace lf {
namespace {

#define LF_ENTRY(op, Params) op,
#define LF_OTHER_ENTRY(Result, name, arguments) name,
#define LF_TABLE(isa)                                                 \
  [] {                                                                \
    using namespace isa;                                              \
    return Kernels{#isa, LF_OPS(LF_ENTRY) LF_OTHERS(LF_OTHER_ENTRY)}; \
  }()

constexpr Kernels kGeneric = LF_TABLE(generic);
#if defined(LF_X86)
constexpr Kernels kAvx2 = LF_TABLE(avx2);
constexpr Kernels kAvx512 = LF_TABLE(avx512);
constexpr Kernels kAvx512Bf16 = LF_TABLE(avx512_bf16);
#endif

}  // namespace

int available_kernels(const Kernels* out[4]) {
  int n = 0;
  out[n++] = &kGeneric;
#if defined(LF_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  // Requires VBMI too: its 128-entry byte table decodes e4m3 in 2.5 instructions per vector.
  const bool avx512_bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (avx2) out[n++] = &kAvx2;
  if (avx512) out[n++] = &kAvx512;
  if (avx512_bf16) out[n++] = &kAvx512Bf16;
#endif
  return n;
}

}  // namespace lf
