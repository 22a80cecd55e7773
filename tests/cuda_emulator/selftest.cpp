// The emulator's own tests: selftest <case> [seed]. Exit status 0: passed. Cases named bug_*
// contain a planted bug and exit 3 when the emulator exposes it.
#include <cstdio>
#include <functional>

#include "../../csrc/cuda/common/tensor_map.h"

using namespace lf;

namespace {

int failures = 0;
void expect(bool condition, const char* text, int line) {
  if (!condition && failures++ < 5) std::printf("line %d: %s\n", line, text);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

void run(int threads, size_t shared, const std::function<void()>& kernel, unsigned grid = 1,
         unsigned cluster = 1) {
  emu::launch(dim3(grid), dim3(threads), shared, cluster, kernel);
}

int lane() { return static_cast<int>(threadIdx.x) % 32; }

// Numbers that every format represents exactly, with products that sum exactly in fp32.
int a_value(int row, int k) { return (row * 3 + k * 5) % 7 - 3; }
int b_value(int column, int k) { return (column * 2 + k) % 5 - 2; }
float expected(int row, int column, int depth) {
  int sum = 0;
  for (int k = 0; k < depth; ++k) sum += a_value(row, k) * b_value(column, k);
  return static_cast<float>(sum);
}

uint16_t bits(float x, __nv_bfloat16) {
  return static_cast<uint16_t>(__float_as_uint(x) >> 16);  // exact for small integers
}
uint16_t bits(float x, __half) { return __half_raw(__float2half(x)).x; }
uint8_t e4m3(int x) {
  return __nv_cvt_float_to_fp8(static_cast<float>(x), __NV_SATFINITE, __NV_E4M3);
}

// From the PTX ISA, not the emulator: element i of a lies in row groupID for i in {0, 1, 4, 5},
// else groupID + 8, and column threadID_in_group * 2 + (i & 1), + 8 for i >= 4 (mma.m16n8k16).
template <class T>
void mma_16(bool wrong_fragment) {
  run(32, 0, [=] {
    const int group = lane() >> 2, in_group = lane() % 4;
    uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      if (wrong_fragment) column ^= 8;
      a[i / 2] |= static_cast<uint32_t>(bits(static_cast<float>(a_value(row, column)), T{}))
                  << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int k = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
      b[i / 2] |= static_cast<uint32_t>(bits(static_cast<float>(b_value(group, k)), T{}))
                  << 16 * (i % 2);
    }
    float d[4] = {1, 1, 1, 1};
    ptx::mma_16816(d, a, b[0], b[1], T{});
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
      EXPECT(d[i] == 1 + expected(row, column, 16));
    }
  });
}

void mma_e4m3() {
  run(32, 0, [] {
    const int group = lane() >> 2, in_group = lane() % 4;
    uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < 16; ++i) {
      const int row = (i < 4 || (i >= 8 && i < 12)) ? group : group + 8;
      const int column = in_group * 4 + (i & 3) + (i < 8 ? 0 : 16);
      a[i / 4] |= static_cast<uint32_t>(e4m3(a_value(row, column))) << 8 * (i % 4);
    }
    for (int i = 0; i < 8; ++i) {
      const int k = in_group * 4 + (i & 3) + (i < 4 ? 0 : 16);
      b[i / 4] |= static_cast<uint32_t>(e4m3(b_value(group, k))) << 8 * (i % 4);
    }
    float d[4] = {};
    ptx::mma_16832_e4m3(d, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i)
      EXPECT(d[i] == expected(i < 2 ? group : group + 8, in_group * 2 + (i & 1), 32));
  });
}

void ldmatrix() {
  run(32, 4 * 8 * 8 * 2, [] {
    LF_DYNAMIC_SHARED(memory);
    auto* m = reinterpret_cast<uint16_t*>(memory);  // [matrix, row, column]
    for (int i = lane(); i < 256; i += 32) m[i] = static_cast<uint16_t>(i);
    __syncthreads();
    uint32_t r[4], t[4];
    ptx::ldmatrix_x4(r, m + lane() * 8);
    ptx::ldmatrix_x4_trans(t, m + lane() * 8);
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t row = lane() / 4, pair = lane() % 4 * 2;
      EXPECT((r[j] & 0xffff) == j * 64 + row * 8 + pair);
      EXPECT(r[j] >> 16 == j * 64 + row * 8 + pair + 1);
      EXPECT((t[j] & 0xffff) == j * 64 + pair * 8 + row);
      EXPECT(t[j] >> 16 == j * 64 + (pair + 1) * 8 + row);
    }
  });
}

void stmatrix() {
  run(32, 4 * 8 * 8 * 2, [] {
    LF_DYNAMIC_SHARED(memory);
    auto* m = reinterpret_cast<uint16_t*>(memory);  // [matrix, row, column]
    uint32_t r[4];
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t first = j * 64 + lane() / 4 * 8 + lane() % 4 * 2;
      r[j] = first | (first + 1) << 16;
    }
    ptx::stmatrix_x4(m + lane() * 8, r);
    __syncwarp();
    for (int i = lane(); i < 256; i += 32) EXPECT(m[i] == i);
  });
}

void shuffles_and_votes() {
  run(64, 0, [] {
    const int l = lane();
    EXPECT(__shfl_xor_sync(~0u, l, 5) == (l ^ 5));
    EXPECT(__shfl_down_sync(~0u, l, 4) == (l + 4 < 32 ? l + 4 : l));
    EXPECT(__shfl_up_sync(~0u, l, 4) == (l >= 4 ? l - 4 : l));
    EXPECT(__shfl_sync(~0u, l, 9) == 9);
    EXPECT(__shfl_sync(~0u, l, 3, 8) == l / 8 * 8 + 3);
    EXPECT(__shfl_down_sync(~0u, l, 1, 16) == (l % 16 < 15 ? l + 1 : l));
    EXPECT(__ballot_sync(~0u, l % 3 == 0) == 0x49249249u);
    EXPECT(__any_sync(~0u, l == 31) && !__any_sync(~0u, l == 32));
    EXPECT(__all_sync(~0u, l < 32) && !__all_sync(~0u, l < 31));
    if (l < 16) EXPECT(__shfl_xor_sync(0xffffu, l, 8) == (l ^ 8));
  });
}

alignas(16) const float source[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

void cp_async(bool wait) {
  run(2, 64, [=] {
    LF_DYNAMIC_SHARED(memory);
    auto* s = reinterpret_cast<float*>(memory);
    const int i = static_cast<int>(threadIdx.x) * 8;
    ptx::cp_async_16(s + i, source + i);
    ptx::cp_async_commit();
    ptx::cp_async_16(s + i + 4, source + i + 4, 8);
    ptx::cp_async_commit();
    if (wait) {
      ptx::cp_async_wait<1>();
      EXPECT(s[i + 3] == source[i + 3] && std::isnan(s[i + 4]));
    }
    const float early = s[i + 4];
    ptx::cp_async_wait<0>();
    EXPECT(s[i + 5] == source[i + 5] && s[i + 6] == 0 && s[i + 7] == 0);
    if (!wait && std::isnan(early)) failures = 1;
  });
}

// Copies that arrive at an mbarrier when they land; 4 bytes each, the second half invalid.
void cp_async_arrival(bool wait) {
  run(32, 136, [=] {
    LF_DYNAMIC_SHARED(memory);
    auto* s = reinterpret_cast<float*>(memory);
    auto* bar = reinterpret_cast<uint64_t*>(memory + 128);
    if (lane() == 0) {
      ptx::mbarrier_init(bar, 32);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    ptx::cp_async_4(s + lane(), source + lane() % 16, lane() < 16 ? 4 : 0);
    ptx::cp_async_arrive(bar);
    if (wait) ptx::mbarrier_wait(bar, 0);
    EXPECT(s[31 - lane()] == (lane() < 16 ? 0 : source[31 - lane()]));
    ptx::mbarrier_wait(bar, 0);
  });
}

// Sums 256 numbers over eight warps. Without the barrier some read before others have written.
void block_sum(bool barrier) {
  run(256, 32, [=] {
    LF_DYNAMIC_SHARED(memory);
    auto* s = reinterpret_cast<float*>(memory);
    float v = static_cast<float>(threadIdx.x);
    for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
    if (lane() == 0) s[threadIdx.x / 32] = v;
    if (barrier) __syncthreads();
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += s[i];
    EXPECT(sum == 32640);
  });
}

// Half of the threads produce for the other half: bar.arrive and bar.sync on one barrier.
void named_barriers() {
  run(128, 256, [] {
    LF_DYNAMIC_SHARED(memory);
    auto* s = reinterpret_cast<int*>(memory);
    const int i = static_cast<int>(threadIdx.x);
    if (i < 64) {
      s[i] = i;
      ptx::named_barrier_arrive(1, 128);
    } else {
      ptx::named_barrier_sync(1, 128);
      EXPECT(s[i - 64] == i - 64);
    }
  });
}

void deadlock() {
  run(64, 0, [] {
    if (threadIdx.x < 32) __syncthreads();
  });
}
void different_instructions() {
  run(32, 0, [] {
    if (lane() < 16)
      __syncwarp();
    else
      __ballot_sync(~0u, 1);
  });
}
volatile float sink;
void read_past_the_end() {
  run(1, 4096, [] {
    LF_DYNAMIC_SHARED(memory);
    sink = reinterpret_cast<float*>(memory)[1024];
  });
}
void write_past_the_end() {
  run(1, 100, [] {
    LF_DYNAMIC_SHARED(memory);
    memory[101] = 0;
  });
}
void uninitialized() {
  run(1, 16, [] {
    LF_DYNAMIC_SHARED(memory);
    EXPECT(!std::isnan(reinterpret_cast<float*>(memory)[2]));
    EXPECT(!std::isnan(__bfloat162float(reinterpret_cast<__nv_bfloat16*>(memory)[1])));
  });
}
void misaligned_copy() {
  run(1, 64, [] {
    LF_DYNAMIC_SHARED(memory);
    ptx::cp_async_16(memory + 8, source);
  });
}
void never_waited() {
  run(1, 64, [] {
    LF_DYNAMIC_SHARED(memory);
    ptx::cp_async_16(memory, source);
    ptx::cp_async_commit();
  });
}

#include "selftest_hopper.h"

struct Case {
  const char* name;
  std::function<void()> body;
};
const Case cases[] = {
    {"mma_bf16", [] { mma_16<__nv_bfloat16>(false); }},
    {"mma_f16", [] { mma_16<__half>(false); }},
    {"mma_e4m3", mma_e4m3},
    {"ldmatrix", ldmatrix},
    {"stmatrix", stmatrix},
    {"shuffles_and_votes", shuffles_and_votes},
    {"cp_async", [] { cp_async(true); }},
    {"cp_async_arrival", [] { cp_async_arrival(true); }},
    {"block_sum", [] { block_sum(true); }},
    {"named_barriers", named_barriers},
    {"tma", [] { tma(); }},
    {"cluster", [] { cluster(true); }},
    {"multicast", [] { multicast(true); }},
    {"wgmma_bf16", [] { wgmma<__nv_bfloat16, 64>(false, false); }},
    {"wgmma_e4m3", [] { wgmma<__nv_fp8_e4m3, 128>(false, false); }},
    {"wgmma_e4m3_sum", wgmma_e4m3_sum},
    {"wgmma_registers", [] { wgmma<__half, 64>(true, false); }},
    {"wgmma_mn_major", [] { wgmma<__nv_bfloat16, 64>(true, true); }},
    {"setmaxnreg", registers<24, 240>},
    {"bug_setmaxnreg_too_many", registers<32, 240>},
    {"bug_setmaxnreg_not_more", registers<24, 160>},
    {"bug_wgmma_missing_wait", [] { wgmma<__half, 64>(false, false, "wait"); }},
    {"bug_wgmma_missing_fence", [] { wgmma<__half, 64>(false, false, "fence"); }},
    {"bug_tma_missing_wait", [] { tma("wait"); }},
    {"bug_tma_missing_init", [] { tma("init"); }},
    {"bug_tma_missing_init_fence", [] { tma("init fence"); }},
    {"bug_tma_missing_proxy_fence", [] { tma("proxy fence"); }},
    {"bug_cluster_missing_barrier", [] { cluster(false); }},
    {"bug_cluster_early_end", [] { cluster(true, false); }},
    {"bug_multicast_tells_one", [] { multicast(false); }},
    {"bug_scratch_used_again", scratch_used_again},
    {"bug_wrong_fragment", [] { mma_16<__half>(true); }},
    {"bug_missing_wait", [] { cp_async(false); }},
    {"bug_arrival_not_waited_for", [] { cp_async_arrival(false); }},
    {"bug_missing_barrier", [] { block_sum(false); }},
    {"bug_deadlock", deadlock},
    {"bug_different_instructions", different_instructions},
    {"bug_read_past_the_end", read_past_the_end},
    {"bug_write_past_the_end", write_past_the_end},
    {"bug_uninitialized", uninitialized},
    {"bug_misaligned_copy", misaligned_copy},
    {"bug_never_waited", never_waited},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    for (const Case& c : cases) std::printf("%s\n", c.name);
    return 0;
  }
  emu::seed() = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0;
  for (const Case& c : cases)
    if (std::string(c.name) == argv[1]) {
      try {
        c.body();
      } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
        return 3;
      }
      return failures ? 3 : 0;
    }
  std::printf("no such case\n");
  return 2;
}
