// The part of selftest.cpp for what sm_90 has: TMA, wgmma, clusters, setmaxnreg.
#pragma once

// A tensor [rows, columns] of T as TMA sees it, with boxes of 128 bytes a row.
template <class T>
CUtensorMap map_of(const std::vector<T>& data, int rows, int columns, int box_rows, DType dtype) {
  return cuda::tensor_map({data.data(),
                           dtype,
                           2,
                           {uint64_t(columns), uint64_t(rows)},
                           {1, uint64_t(columns)},
                           {128 / sizeof(T), uint32_t(box_rows)},
                           true},
                          "");
}

void tma(const std::string& without = "") {
  const bool wait = without != "wait";
  std::vector<uint16_t> from(100 * 64), to(100 * 64, 7);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i);
  const CUtensorMap source_map = map_of(from, 100, 64, 64, DType::bf16);
  const CUtensorMap target_map = map_of(to, 100, 64, 64, DType::bf16);
  run(32, 8192 + 8, [&] {
    LF_DYNAMIC_SHARED(memory);
    auto* bar = reinterpret_cast<uint64_t*>(memory + 8192);
    if (lane() == 0 && without != "init") ptx::mbarrier_init(bar, 1);
    if (lane() == 0 && without != "init fence") ptx::mbarrier_init_fence();
    __syncthreads();
    for (int phase = 0; phase < 2; ++phase) {
      if (lane() == 0) {
        ptx::mbarrier_arrive_expect(bar, 8192);
        ptx::tma_load_2d(memory, &source_map, bar, 0, phase * 64);
      }
      if (wait) ptx::mbarrier_wait(bar, phase);
      // Row r's 16-byte chunk c lies at chunk c ^ (r % 8); rows past the tensor are zero.
      for (int r = lane(); r < 64; r += 32)
        for (int c = 0; c < 8; ++c) {
          const auto* chunk =
              reinterpret_cast<const uint16_t*>(memory + r * 128 + (c ^ (r % 8)) * 16);
          const int row = phase * 64 + r;
          EXPECT(chunk[3] == (row < 100 ? row * 64 + c * 8 + 3 : 0));
        }
      __syncthreads();
      if (lane() == 0) {
        if (without != "proxy fence") ptx::fence_proxy_async();
        ptx::tma_store_2d(&target_map, memory, 0, phase * 64);
        ptx::tma_store_commit();
        ptx::tma_store_wait<0>();
      }
      __syncthreads();
    }
  });
  if (wait) EXPECT(from == to);
}

// [64, depth * steps] x [n, depth * steps]^T; a from shared memory or registers, b k-major or
// mn-major. Tiles lie in shared memory as TMA would write them.
template <class T, int registers>
void wgmma(bool a_in_registers, bool mn_major, const std::string& without = "") {
  const bool wait = without != "wait";
  constexpr int n = 2 * registers, size = sizeof(T), depth = 32 / size, all_k = 128 / size;
  const auto store = [](unsigned char* p, int value) {
    if constexpr (size == 1)
      *p = e4m3(value);
    else {
      const uint16_t b = bits(static_cast<float>(value), T{});
      std::memcpy(p, &b, 2);
    }
  };
  run(128, 8192 + n * 128, [&] {
    LF_DYNAMIC_SHARED(memory);
    unsigned char *a = memory, *b = memory + 8192;
    const int t = static_cast<int>(threadIdx.x);
    for (int i = t; i < 64 * all_k; i += 128) {
      const int row = i / all_k, k = i % all_k, at = row * 128 + k * size;
      store(a + (at ^ (row % 8) << 4), a_value(row, k));
    }
    for (int i = t; i < n * all_k; i += 128) {
      const int column = i / all_k, k = i % all_k;
      const int row = mn_major ? k : column;
      const int at = mn_major ? column / 64 * all_k * 128 + k * 128 + column % 64 * size
                              : column * 128 + k * size;
      store(b + (at ^ (row % 8) << 4), b_value(column, k));
    }
    ptx::fence_proxy_async();
    __syncthreads();
    float d[registers];
    for (float& x : d) x = 100;
    if (without != "fence") ptx::wgmma_fence();
    for (int k0 = 0; k0 < all_k; k0 += depth) {
      const uint64_t b_at = mn_major ? ptx::wgmma_descriptor(b + k0 * 128, 1024, all_k * 128)
                                     : ptx::wgmma_descriptor(b + k0 * size);
      if (a_in_registers) {
        uint32_t r[4] = {};
        const int per = 4 / size;
        for (int i = 0; i < 4 * per; ++i) {
          const int row = t / 32 * 16 + lane() / 4 + i / per % 2 * 8;
          const int k = k0 + lane() % 4 * per + i % per + i / per / 2 * depth / 2;
          unsigned char value[4] = {};
          store(value, a_value(row, k));
          uint32_t v;
          std::memcpy(&v, value, 4);
          r[i / per] |= v << 8 * size * (i % per);
        }
        if constexpr (size == 2) {
          if (mn_major) ptx::wgmma<T, true>(d, r, b_at, k0 > 0);
        }
        if (!mn_major) ptx::wgmma<T, false>(d, r, b_at, k0 > 0);
      } else {
        if (!mn_major) ptx::wgmma<T, false>(d, ptx::wgmma_descriptor(a + k0 * size), b_at, k0 > 0);
      }
    }
    ptx::wgmma_commit();
    if (wait) ptx::wgmma_wait<0>();
    for (int i = 0; i < registers; ++i) {
      const int row = t / 32 * 16 + lane() / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
      EXPECT(d[i] == expected(row, column, all_k));
    }
    ptx::wgmma_wait<0>();
  });
}

// Hopper's e4m3 sum drops what lies below 2^-13 of its largest term, a product or the sum so far.
// Sums started from zero keep what a chain loses.
void wgmma_e4m3_sum() {
  const auto sum = [](std::vector<float> products, float so_far) {
    std::vector<float> ones(products.size(), 1.0f);
    const std::vector<int> zeros(products.size(), 0);
    const std::vector<int> exponents = emu::Wgmma::exponents(products);
    return emu::hopper_e4m3_sum(products.data(), ones.data(), exponents.data(), zeros.data(),
                                static_cast<int>(products.size()), so_far);
  };
  EXPECT(sum({256, 1}, 0) == 257);
  EXPECT(sum({256, 1.0f / 32}, 0) == 256 + 1.0f / 32);  // 13 bits below
  EXPECT(sum({256, 1.0f / 64}, 0) == 256);              // 14: gone
  EXPECT(sum({256, -1.0f / 64}, 0) == 256);             // truncated towards zero
  EXPECT(sum({-256, -3.0f / 64}, 0) == -256 - 1.0f / 32);
  EXPECT(sum({1, 1.0f / 4}, 8192) == 8193);
  EXPECT(sum({1.0f / 4, 1.0f / 4, 1.0f / 4, 1.0f / 4}, 8192) == 8192);  // each on its own
  EXPECT(sum({256, 256, 1.0f / 32}, 0) == 512);  // 14 bits below the sum, 13 below a term
  EXPECT(sum({0, 0}, 3.25f) == 3.25f && sum({0, 0}, 0) == 0);
  EXPECT(std::isnan(sum({1, NAN}, 0)) && std::isnan(sum({1, 2}, NAN)));
}

// Each block of a cluster writes a number where the others read it.
void cluster(bool barrier, bool last = true) {
  run(
      32, 16,
      [=] {
        LF_DYNAMIC_SHARED(memory);
        auto* mine = reinterpret_cast<float*>(memory);
        if (lane() == 0) *mine = static_cast<float>(blockIdx.x);
        if (barrier) ptx::cluster_sync();
        for (unsigned rank = 0; rank < 4; ++rank)
          EXPECT(ptx::cluster_load(mine, rank) == static_cast<float>(blockIdx.x / 4 * 4 + rank));
        if (last) ptx::cluster_sync();
      },
      8, 4);
}

// Two blocks, four times: each copies half of a tile to both, waits for all of it, and signals both
// that it has read it. Both blocks' halves count in each block's barrier.
void multicast(bool tell_both) {
  std::vector<uint16_t> from(4 * 64 * 64);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i);
  const CUtensorMap map = map_of(from, 4 * 64, 64, 32, DType::bf16);
  run(
      32, 8192 + 16,
      [&] {
        LF_DYNAMIC_SHARED(memory);
        auto* full = reinterpret_cast<uint64_t*>(memory + 8192);
        auto* empty = full + 1;
        const int half = static_cast<int>(ptx::cluster_rank()) * 32;
        if (lane() == 0) {
          ptx::mbarrier_init(full, 1);
          ptx::mbarrier_init(empty, tell_both ? 2 : 1);
          ptx::mbarrier_init_fence();
        }
        ptx::cluster_sync();
        for (int i = 0; i < 4; ++i) {
          if (lane() == 0) {
            ptx::mbarrier_wait(empty, i % 2 ^ 1);
            ptx::mbarrier_arrive_expect(full, 8192);
            ptx::tma_load_2d_multicast(memory + half * 128, &map, full, 0, i * 64 + half, 3);
          }
          ptx::mbarrier_wait(full, i % 2);
          for (int r = lane(); r < 64; r += 32)
            for (int c = 0; c < 8; ++c)
              EXPECT(reinterpret_cast<const uint16_t*>(memory + r * 128 + (c ^ r % 8) * 16)[3] ==
                     (i * 64 + r) * 64 + c * 8 + 3);
          __syncwarp();
          for (unsigned other = 0; other < 2; ++other)
            if (lane() == 0 && (tell_both || other == ptx::cluster_rank()))
              ptx::mbarrier_arrive_at(empty, other);
        }
        ptx::cluster_sync();
      },
      4, 2);
}

// Sums over a block through one scratch: a warp that runs ahead writes the next sum while others
// still read.
void scratch_used_again() {
  run(256, 32, [] {
    LF_DYNAMIC_SHARED(memory);
    auto* scratch = reinterpret_cast<int*>(memory);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    for (int round = 0; round < 20; ++round) {
      if (lane() == 0) scratch[warp] = round;
      __syncthreads();
      for (int other = 0; other < 8; ++other) EXPECT(scratch[other] == round);
      __syncwarp();
    }
  });
}

// A producer releases registers for two consumers: a block of 384 threads has 3 x 168.
template <int released, int taken>
void registers() {
  run(384, 0, [] {
    if (threadIdx.x < 128)
      ptx::registers_decrease<released>();
    else
      ptx::registers_increase<taken>();
  });
}
