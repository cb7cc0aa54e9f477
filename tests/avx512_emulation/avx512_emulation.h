// The AVX-512 instructions that csrc/cpu uses, given their meaning on a CPU that has AVX2 alone, so that the kernels of the
// higher instruction sets are executed by the tests anywhere. Included before everything else when a kernel is compiled
// for `avx512` or, with XF_EMULATE_BF16, `avx512_bf16`. Semantics: Intel SDM volume 2; speed does not matter here.
#pragma once
#include <immintrin.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(XF_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

namespace {
namespace emulated {

#define XF_EMULATED static inline __attribute__((always_inline))

template <class T>
struct Lanes {  // a 512-bit register as an array
  static constexpr int kCount = 64 / int(sizeof(T));
  T at[kCount];
  template <class V>
  XF_EMULATED Lanes of(V v) {
    static_assert(sizeof(V) <= 64);
    Lanes lanes{};
    __builtin_memcpy(lanes.at, &v, sizeof v);
    return lanes;
  }
  template <class V>
  __attribute__((always_inline)) V as() const {
    V v;
    __builtin_memcpy(&v, at, sizeof v);
    return v;
  }
};
typedef Lanes<float> Floats;
typedef Lanes<int> Ints;
typedef Lanes<unsigned> Words;
typedef Lanes<unsigned short> Halves;
typedef Lanes<unsigned long long> Quads;

template <class Function>
XF_EMULATED __m512 each(Function function) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = function(i);
  return r.as<__m512>();
}

XF_EMULATED __m512 set1_ps(float x) { return each([=](int) { return x; }); }
XF_EMULATED __m512 setzero_ps() { return set1_ps(0.f); }
XF_EMULATED __m512i set1_epi32(int x) {
  Ints r;
  for (int& lane : r.at) lane = x;
  return r.as<__m512i>();
}
XF_EMULATED __m512i set1_epi16(short x) {
  Halves r;
  for (unsigned short& lane : r.at) lane = static_cast<unsigned short>(x);
  return r.as<__m512i>();
}
template <class... Shorts>
XF_EMULATED __m512i set_epi16(Shorts... highest_first) {
  const int given[] = {highest_first...};
  Halves r;
  for (int i = 0; i < 32; ++i) r.at[31 - i] = static_cast<unsigned short>(given[i]);
  return r.as<__m512i>();
}

XF_EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Floats x = Floats::of(a), y = Floats::of(b), z = Floats::of(c);
  return each([&](int i) { return __builtin_fmaf(x.at[i], y.at[i], z.at[i]); });
}
XF_EMULATED __m512 round_to_nearest(__m512 a) {
  const Floats x = Floats::of(a);
  return each([&](int i) { return __builtin_rintf(x.at[i]); });
}
XF_EMULATED __m512 reduce_to_nearest(__m512 a) {  // what rounding takes, 0 of an infinity
  const Floats x = Floats::of(a);
  return each([&](int i) { return __builtin_isinf(x.at[i]) ? 0.f : x.at[i] - __builtin_rintf(x.at[i]); });
}
XF_EMULATED __m512 scalef_ps(__m512 a, __m512 b) {  // a * 2^floor(b)
  const Floats x = Floats::of(a), y = Floats::of(b);
  return each([&](int i) {
    if (!(y.at[i] == y.at[i])) return y.at[i];
    const double n = __builtin_floor(y.at[i] < -400.f ? -400. : y.at[i] > 400.f ? 400. : double(y.at[i]));
    return float(double(x.at[i]) * __builtin_ldexp(1., int(n)));
  });
}
XF_EMULATED float reduce_add_ps(__m512 a) {
  Floats x = Floats::of(a);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x.at[i] += x.at[i + n];
  return x.at[0];
}
XF_EMULATED float reduce_max_ps(__m512 a) {
  const Floats x = Floats::of(a);
  float best = x.at[0];
  for (float lane : x.at) best = lane > best ? lane : best;
  return best;
}

XF_EMULATED __m512i cvtepu16_epi32(__m256i a) {
  const Halves x = Halves::of(a);
  Ints r;
  for (int i = 0; i < 16; ++i) r.at[i] = x.at[i];
  return r.as<__m512i>();
}
XF_EMULATED __m256i half_of(__m512i a, int which) {
  __m256i halves[2];
  __builtin_memcpy(halves, &a, 64);
  return halves[which];
}
XF_EMULATED __m512 cvtph_ps(__m256i a) {
  const __m128i low = _mm256_castsi256_si128(a), high = _mm256_extracti128_si256(a, 1);
  const __m256 halves[2] = {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
  __m512 r;
  __builtin_memcpy(&r, halves, 64);
  return r;
}
XF_EMULATED __m256i cvtps_ph(__m512 a) {
  __m256 halves[2];
  __builtin_memcpy(halves, &a, 64);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}

// Memory whose mask bit is not set is not touched.
XF_EMULATED __m512 maskz_loadu_ps(unsigned mask, const void* p) {
  Floats r{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) __builtin_memcpy(&r.at[i], static_cast<const char*>(p) + 4 * i, 4);
  return r.as<__m512>();
}
XF_EMULATED void mask_storeu_ps(void* p, unsigned mask, __m512 a) {
  const Floats x = Floats::of(a);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) __builtin_memcpy(static_cast<char*>(p) + 4 * i, &x.at[i], 4);
}
XF_EMULATED __m256i maskz_loadu_epi16(unsigned mask, const void* p) {
  Halves r{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) __builtin_memcpy(&r.at[i], static_cast<const char*>(p) + 2 * i, 2);
  return r.as<__m256i>();
}
XF_EMULATED __m512i maskz_loadu_epi16_512(unsigned mask, const void* p) {
  Halves r{};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) __builtin_memcpy(&r.at[i], static_cast<const char*>(p) + 2 * i, 2);
  return r.as<__m512i>();
}
XF_EMULATED void mask_storeu_epi16(void* p, unsigned mask, __m256i a) {
  const Halves x = Halves::of(a);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) __builtin_memcpy(static_cast<char*>(p) + 2 * i, &x.at[i], 2);
}

XF_EMULATED __m512i mul_epu32(__m512i a, __m512i b) {
  const Quads x = Quads::of(a), y = Quads::of(b);
  Quads r;
  for (int i = 0; i < 8; ++i) r.at[i] = (x.at[i] & 0xffffffffull) * (y.at[i] & 0xffffffffull);
  return r.as<__m512i>();
}
XF_EMULATED __m512 permute_ps(__m512 a, int order) {
  const Floats x = Floats::of(a);
  return each([&](int i) { return x.at[(i & ~3) + ((order >> (2 * (i & 3))) & 3)]; });
}
XF_EMULATED __m512i permutexvar_epi16(__m512i index, __m512i a) {
  const Halves from = Halves::of(index), x = Halves::of(a);
  Halves r;
  for (int i = 0; i < 32; ++i) r.at[i] = x.at[from.at[i] & 31];
  return r.as<__m512i>();
}
XF_EMULATED __m512i alignr_epi32(__m512i high, __m512i low, int shift) {
  const Ints x = Ints::of(low), y = Ints::of(high);
  Ints r;
  for (int i = 0; i < 16; ++i) r.at[i] = i + shift < 16 ? x.at[i + shift] : y.at[i + shift - 16];
  return r.as<__m512i>();
}
XF_EMULATED __m512i unpack_epi16(__m512i a, __m512i b, int first) {  // of each 128 bits, words first..first+3
  const Halves x = Halves::of(a), y = Halves::of(b);
  Halves r;
  for (int i = 0; i < 32; ++i) {
    const int word = (i & ~7) + first + (i & 7) / 2;
    r.at[i] = i % 2 ? y.at[word] : x.at[word];
  }
  return r.as<__m512i>();
}
XF_EMULATED void stream_si512(void* p, __m512i a) { __builtin_memcpy(p, &a, 64); }

// bfloat16: subnormal numbers count as zero, results round to nearest even.
XF_EMULATED float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.f, x) : x; }
XF_EMULATED unsigned short to_bf16(float value) {
  const float x = flushed(value);
  unsigned bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return static_cast<unsigned short>((bits >> 16) | 0x40u);
  return static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
XF_EMULATED float from_bf16(unsigned short half) {
  const unsigned bits = unsigned(half) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return flushed(x);
}
XF_EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const Floats x = Floats::of(low), y = Floats::of(high);
  Halves r;
  for (int i = 0; i < 16; ++i) r.at[i] = to_bf16(x.at[i]), r.at[16 + i] = to_bf16(y.at[i]);
  return r.as<__m512bh>();
}
XF_EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Floats s = Floats::of(sum);
  const Halves x = Halves::of(a), y = Halves::of(b);
  return each([&](int i) {
    const float odd = __builtin_fmaf(from_bf16(x.at[2 * i + 1]), from_bf16(y.at[2 * i + 1]), flushed(s.at[i]));
    return flushed(__builtin_fmaf(from_bf16(x.at[2 * i]), from_bf16(y.at[2 * i]), flushed(odd)));
  });
}

}  // namespace emulated
}  // namespace

#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_undefined_ps emulated::setzero_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set_epi16 emulated::set_epi16
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_roundscale_ps(a, mode) emulated::round_to_nearest(a)
#define _mm512_reduce_ps(a, mode) emulated::reduce_to_nearest(a)
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_castsi512_si256(a) emulated::half_of(a, 0)
#define _mm512_extracti64x4_epi64(a, which) emulated::half_of(a, which)
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(a, mode) emulated::cvtps_ph(a)
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16_512
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_mul_epu32 emulated::mul_epu32
#define _mm512_permute_ps emulated::permute_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_alignr_epi32 emulated::alignr_epi32
#define _mm512_unpacklo_epi16(a, b) emulated::unpack_epi16(a, b, 0)
#define _mm512_unpackhi_epi16(a, b) emulated::unpack_epi16(a, b, 4)
#define _mm512_stream_si512 emulated::stream_si512
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
