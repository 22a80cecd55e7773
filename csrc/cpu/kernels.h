// Every CPU kernel, declared once per instruction set. Each op's .cpp is compiled four times, with
// LF_ISA naming the namespace. dispatch.cpp collects the four into tables of function pointers.
#pragma once
#include "../params.h"

namespace lf {

// The kernels that have no params struct.
//   pack_weight    [N, K] of itemsize bytes -> [N / 64, K / 2, 64, 2].
//   decode_weight  e4m3 or bf16, [N, K] or, with stride -1, packed -> bf16 [N, K].
//   read_memory    XOR of the 64-bit words of data; bytes a multiple of 8.
//   multiply_add   runs at least `flops` operations of multiply-add in registers and returns how
//                  many it ran. pairs: of bf16, summed in fp32, if an instruction does that;
//                  otherwise fp32.
#define LF_OTHERS(F)                                                                              \
  F(void, pack_weight,                                                                            \
    (const void* weight, void* packed, int64_t n, int64_t k, int64_t stride, int itemsize,        \
     int threads))                                                                                \
  F(void, decode_weight,                                                                          \
    (const void* weight, void* out, int64_t n, int64_t k, int64_t stride, bool fp8, int threads)) \
  F(uint64_t, read_memory, (const void* data, int64_t bytes, int threads))                        \
  F(double, multiply_add, (bool pairs, double flops, int threads))

// The functions of one instruction set, as a table and as declarations.
struct Kernels {
  const char* isa;
#define LF_FIELD(op, Params) void (*op)(const Params&, int threads);
#define LF_OTHER_FIELD(Result, name, arguments) Result(*name) arguments;
  LF_OPS(LF_FIELD)
  LF_OTHERS(LF_OTHER_FIELD)
};

#define LF_DECLARE(op, Params) void op(const Params& p, int threads);
#define LF_DECLARE_OTHER(Result, name, arguments) Result name arguments;
#define LF_DECLARE_KERNELS(isa) \
  namespace isa {               \
  LF_OPS(LF_DECLARE)            \
  LF_OTHERS(LF_DECLARE_OTHER)   \
  }

LF_DECLARE_KERNELS(generic)
#if defined(LF_X86)
LF_DECLARE_KERNELS(avx2)
LF_DECLARE_KERNELS(avx512)
LF_DECLARE_KERNELS(avx512_bf16)
#endif

// Lists the tables that this machine can run, slowest first (the last is the default), and returns
// their number.
int available_kernels(const Kernels* out[4]);

}  // namespace lf
