#include "ceiling.h"

#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xformer_fast {
namespace {

constexpr int kRounds = 4096, kChains = 12;  // enough independent chains for two pipes of latency 4 to 5

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bf16"), noinline)) float dot_rounds() {
  __m512 acc[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_setzero_ps();
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = (__m512bh)_mm512_set1_epi16(0x3f00);
  for (int r = 0; r < kRounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm512_dpbf16_ps(acc[i], x, y);
      asm volatile("" : "+v"(acc[i]));
    }
  }
  float s = 0;

#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) s += acc[i][0];
  return s;
}

__attribute__((target("avx512f"), noinline)) float fma512_rounds() {
  __m512 acc[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_setzero_ps();
  const __m512 x = _mm512_set1_ps(0.5f), y = _mm512_set1_ps(0.25f);
  for (int r = 0; r < kRounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm512_fmadd_ps(acc[i], x, y);
      asm volatile("" : "+v"(acc[i]));
    }
  }
  float s = 0;

#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) s += acc[i][0];
  return s;
}

__attribute__((target("avx2,fma"), noinline)) float fma256_rounds() {
  __m256 acc[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_setzero_ps();
  const __m256 x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(0.25f);
  for (int r = 0; r < kRounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm256_fmadd_ps(acc[i], x, y);
      asm volatile("" : "+x"(acc[i]));
    }
  }
  float s = 0;

#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) s += acc[i][0];
  return s;
}
#endif

using Lane4 = float __attribute__((vector_size(16)));
__attribute__((noinline)) float portable_rounds() {
  Lane4 acc[kChains] = {};
  const Lane4 x = {0.5f, 0.5f, 0.5f, 0.5f}, y = {0.25f, 0.25f, 0.25f, 0.25f};
  for (int r = 0; r < kRounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      acc[i] = acc[i] * x + y;
#if defined(__x86_64__)
      asm volatile("" : "+x"(acc[i]));
#elif defined(__aarch64__)
      asm volatile("" : "+w"(acc[i]));
#endif
    }
  float s = 0;

#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) s += acc[i][0];
  return s;
}

struct Loop {
  float (*rounds)();
  double flops;  // in one call of rounds
};

Loop loop_for(const std::string& element) {
  const Isa isa = selected_isa();
  constexpr double kLaneFlops = 2.0 * kRounds * kChains;
#if defined(__x86_64__)
  if (element == "bfloat16" && isa == Isa::avx512_bf16) return {dot_rounds, kLaneFlops * 32};
  if (isa >= Isa::avx512) return {fma512_rounds, kLaneFlops * 16};
  if (isa == Isa::avx2) return {fma256_rounds, kLaneFlops * 8};
#endif
  return {portable_rounds, kLaneFlops * 4};
}

}  // namespace

double fma_gflops(const std::string& element, int threads, double seconds) {
  if (element != "float32" && element != "bfloat16") throw std::invalid_argument("element must be float32 or bfloat16");
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  const Loop loop = loop_for(element);
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(static_cast<size_t>(threads));
  std::vector<std::thread> workers;
  for (auto& rate : rates)
    workers.emplace_back([&rate, &loop, seconds] {
      volatile float sink = loop.rounds();
      const auto start = Clock::now();
      double calls = 0, spent = 0;
      while (spent < seconds) {
        for (int i = 0; i < 64; ++i) sink = loop.rounds();
        calls += 64;
        spent = std::chrono::duration<double>(Clock::now() - start).count();
      }
      (void)sink;
      rate = calls * loop.flops / spent / 1e9;
    });
  for (auto& worker : workers) worker.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace xformer_fast
