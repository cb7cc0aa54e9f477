// One vector type of floats per instruction set, and the few operations on it that kernels need.
//
//   AVX-512 (F, BW, DQ, VL): 16 lanes.  AVX2 + FMA + F16C: 8 lanes.  Anything else: 4 lanes of GCC's generic vectors.
//
// Vec, IVec, UVec are GCC vector types: + - * / & | ^ << >> and comparisons work on them, `a * b + c` contracts to an
// FMA, and `a < b ? x : y` selects lane by lane (a comparison gives an IVec of 0 / -1).
//   load / store         float, bfloat16, float16 in memory <-> float lanes; with a count: the first n lanes, memory past
//                        them is neither read nor written, lanes past them load as zero
//   broadcast, maximum, minimum, reduce_add, reduce_max, lane_index
//   exp2, exp2_coarse    x <= 127, -inf gives 0, NaN stays, 0 may stand for what is below 2^-126; relative error 1e-7 and
//                        8e-5 (for a result rounded to bfloat16)
//   tanh, log            relative error about 1e-7
//   transpose            a kLanes x kLanes tile held in kLanes vectors
//   multiply_wide        32 x 32 -> 64 bits, for Philox
//
// Every name has internal linkage: this header is compiled once per instruction set, in a namespace of that name, and no
// copy may be merged with another's by the linker.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#pragma GCC diagnostic push  // g++ 12 warns of its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef XFORMER_FAST_ISA
#error "XFORMER_FAST_ISA names the instruction set this file is compiled for"
#endif

#define XF_INLINE inline __attribute__((always_inline))
#define XF_NOINLINE inline __attribute__((noinline))  // a pass of its own: its registers are allocated alone

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define XF_AVX512 1
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define XF_AVX2 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(XF_AVX512) && defined(__AVX512BF16__)
#define XF_BF16_DOT 1  // bfloat16 pairs are multiplied where they lie, into float32
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint64_t U64Vec __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2), may_alias));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// ---- lanes ----

XF_INLINE Vec broadcast(float x) {
#if defined(XF_AVX512)
  return _mm512_set1_ps(x);
#elif defined(XF_AVX2)
  return _mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}
XF_INLINE UVec broadcast_bits(uint32_t x) { return UVec{} + x; }
XF_INLINE IVec broadcast_int(int32_t x) { return IVec{} + x; }
XF_INLINE Vec zero() { return Vec{}; }

XF_INLINE IVec lane_index() {
#if defined(XF_AVX512)
  return IVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(XF_AVX2)
  return IVec{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return IVec{0, 1, 2, 3};
#endif
}

XF_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN
XF_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
XF_INLINE Vec absolute(Vec a) { return (Vec)((UVec)a & broadcast_bits(0x7fffffffu)); }
XF_INLINE Vec to_float(IVec a) { return __builtin_convertvector(a, Vec); }

XF_INLINE float reduce_add(Vec a) {
#if defined(XF_AVX512)
  return _mm512_reduce_add_ps(a);
#else
  float sum = 0.f;
  for (int i = 0; i < kLanes; ++i) sum += a[i];
  return sum;
#endif
}
XF_INLINE float reduce_max(Vec a) {
#if defined(XF_AVX512)
  return _mm512_reduce_max_ps(a);
#else
  float best = a[0];
  for (int i = 1; i < kLanes; ++i) best = a[i] > best ? a[i] : best;
  return best;
#endif
}

// ---- memory ----

template <class V>
XF_INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

XF_INLINE UVec widen(HVec h) {  // g++ 12 makes two halves of __builtin_convertvector
#if defined(XF_AVX512)
  return (UVec)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(XF_AVX2)
  return (UVec)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, UVec);
#endif
}
XF_INLINE Vec from_bf16(HVec h) { return (Vec)(widen(h) << 16); }
XF_INLINE HVec to_bf16(Vec v) {  // to nearest even; NaN stays NaN
  const UVec u = (UVec)v;
  const UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UVec quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((UVec)(v == v ? rounded : quiet), HVec);
}

#if !defined(XF_AVX512) && !defined(XF_AVX2)
XF_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 0) {
    const float tiny = float(mantissa) * 0x1p-24f;
    return sign ? -tiny : tiny;
  }
  const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
XF_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
  if (u < 0x38800000u) {                                  // below 2^-14: adding 2^-1 * 2^0 rounds at the 2^-24 place
    float magnitude;
    __builtin_memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&u, &magnitude, 4);
    return uint16_t(sign | (u - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1u) - (112u << 23);
  return uint16_t(sign | (u >> 13));
}
#endif

XF_INLINE Vec from_f16(HVec h) {
#if defined(XF_AVX512)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(XF_AVX2)
  return _mm256_cvtph_ps((__m128i)h);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(h[i]);
  return v;
#endif
}
XF_INLINE HVec to_f16(Vec v) {
#if defined(XF_AVX512)
  return (HVec)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(XF_AVX2)
  return (HVec)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  HVec h;
  for (int i = 0; i < kLanes; ++i) h[i] = float_to_half(v[i]);
  return h;
#endif
}

XF_INLINE HVec load_half_lanes(const void* p, int n) {
#if defined(XF_AVX512)
  return (HVec)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
#else
  HVec h{};
  __builtin_memcpy(&h, p, size_t(n) * 2);
  return h;
#endif
}
XF_INLINE void store_half_lanes(void* p, HVec h, int n) {
#if defined(XF_AVX512)
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)h);
#else
  __builtin_memcpy(p, &h, size_t(n) * 2);
#endif
}

XF_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
XF_INLINE Vec load(const bfloat16* p) { return from_bf16(load_as<HVec>(p)); }
XF_INLINE Vec load(const float16* p) { return from_f16(load_as<HVec>(p)); }
XF_INLINE Vec load(const float* p, int n) {
#if defined(XF_AVX512)
  return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#elif defined(XF_AVX2)
  return _mm256_maskload_ps(p, (__m256i)(lane_index() < broadcast_int(n)));
#else
  Vec v{};
  __builtin_memcpy(&v, p, size_t(n) * 4);
  return v;
#endif
}
XF_INLINE Vec load(const bfloat16* p, int n) { return from_bf16(load_half_lanes(p, n)); }
XF_INLINE Vec load(const float16* p, int n) { return from_f16(load_half_lanes(p, n)); }

XF_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
XF_INLINE void store(bfloat16* p, Vec v) {
  const HVec h = to_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
XF_INLINE void store(float16* p, Vec v) {
  const HVec h = to_f16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
XF_INLINE void store(float* p, Vec v, int n) {
#if defined(XF_AVX512)
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
#elif defined(XF_AVX2)
  _mm256_maskstore_ps(p, (__m256i)(lane_index() < broadcast_int(n)), v);
#else
  __builtin_memcpy(p, &v, size_t(n) * 4);
#endif
}
XF_INLINE void store(bfloat16* p, Vec v, int n) { store_half_lanes(p, to_bf16(v), n); }
XF_INLINE void store(float16* p, Vec v, int n) { store_half_lanes(p, to_f16(v), n); }

// ---- functions ----

// 2^x = 2^n * 2^f, n = round(x), |f| <= 1/2; the second factor is a minimax polynomial
// (of those with 2^0 = 1 exactly: rescaling by an unchanged maximum must not drift).
template <bool Coarse>
XF_INLINE Vec exp2_polynomial(Vec f) {
  if (Coarse) return ((5.517162372e-02f * f + 2.426111187e-01f) * f + 6.932609938e-01f) * f + 9.999280740e-01f;
  Vec p = 1.326472389e-03f * f + 9.671512870e-03f;
  p = p * f + 5.550733754e-02f;
  p = p * f + 2.402224208e-01f;
  p = p * f + 6.931469776e-01f;
  return p * f + 1.f;
}
template <bool Coarse>
XF_INLINE Vec exp2_impl(Vec x) {
#if defined(XF_AVX512)
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // x - n, and 0 for -inf
  return _mm512_scalef_ps(exp2_polynomial<Coarse>(f), n);
#else
  const Vec shifted = x + 12582912.f;  // 1.5 * 2^23: the sum's low bits are n
  const Vec f = x - (shifted - 12582912.f);
  const Vec power = (Vec)(((UVec)shifted << 23) + (127u << 23));  // may wrap where the result is 0 or past the range
  const Vec result = exp2_polynomial<Coarse>(f) * power;
  return x < -126.f ? zero() : result;
#endif
}
XF_INLINE Vec exp2(Vec x) { return exp2_impl<false>(x); }
XF_INLINE Vec exp2_coarse(Vec x) { return exp2_impl<true>(x); }

XF_INLINE Vec tanh(Vec x) {
  const Vec a = absolute(x);
  const Vec z = x * x;
  Vec p = -5.660780474e-03f * z + 2.060199917e-02f;
  p = p * z - 5.372922705e-02f;
  p = p * z + 1.333132892e-01f;
  p = p * z - 3.333327831e-01f;
  const Vec near_zero = p * z * x + x;
  const Vec e = exp2(minimum(a, broadcast(10.f)) * (2.f * kLog2e));
  const Vec far = 1.f - 2.f / (e + 1.f);
  const Vec signed_far = (Vec)((UVec)far | ((UVec)x & 0x80000000u));
  const Vec result = a < 0.63f ? near_zero : signed_far;
  return x == x ? result : x;
}

// Natural logarithm of x >= 2^-126; 0 gives -inf, +inf and NaN stay.
XF_INLINE Vec log(Vec x) {
  const IVec bits = (IVec)x;
  const IVec exponent = (bits - 0x3f3504f3) >> 23;  // x = m * 2^exponent, m in [sqrt(1/2), sqrt(2))
  const Vec m = (Vec)(bits - (exponent << 23));
  const Vec t = (m - 1.f) / (m + 1.f), z = t * t;
  Vec p = 2.987459972e-01f * z + 3.997744330e-01f;
  p = p * z + 6.666677710e-01f;
  const Vec result = to_float(exponent) * kLn2 + (p * z * t + 2.f * t);
  const Vec finite = x < kInfinity ? result : x;
  return x == 0.f ? broadcast(-kInfinity) : finite;
}

// ---- shuffles ----

// (a0, b0, a1, b1, ...) of the lower and of the upper halves.
XF_INLINE Vec interleave_low(Vec a, Vec b) {
#if defined(XF_AVX512)
  return __builtin_shuffle(a, b, IVec{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#elif defined(XF_AVX2)
  return __builtin_shuffle(a, b, IVec{0, 8, 1, 9, 2, 10, 3, 11});
#else
  return __builtin_shuffle(a, b, IVec{0, 4, 1, 5});
#endif
}
XF_INLINE Vec interleave_high(Vec a, Vec b) {
#if defined(XF_AVX512)
  return __builtin_shuffle(a, b, IVec{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#elif defined(XF_AVX2)
  return __builtin_shuffle(a, b, IVec{4, 12, 5, 13, 6, 14, 7, 15});
#else
  return __builtin_shuffle(a, b, IVec{2, 6, 3, 7});
#endif
}

// Interleaving row i with row i + kLanes/2, log2(kLanes) times over, transposes.
XF_INLINE void transpose(Vec (&rows)[kLanes]) {
  Vec other[kLanes];
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      other[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      other[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = other[i];
  }
}

// high:low = a * m, lane by lane.
XF_INLINE void multiply_wide(UVec a, uint32_t m, UVec& high, UVec& low) {
  const UVec odd_lanes = (UVec)((U64Vec)a >> 32);
#if defined(XF_AVX512)
  const U64Vec even = (U64Vec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32(int(m)));
  const U64Vec odd = (U64Vec)_mm512_mul_epu32((__m512i)odd_lanes, _mm512_set1_epi32(int(m)));
#elif defined(XF_AVX2)
  const U64Vec even = (U64Vec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(int(m)));
  const U64Vec odd = (U64Vec)_mm256_mul_epu32((__m256i)odd_lanes, _mm256_set1_epi32(int(m)));
#else
  const U64Vec even = ((U64Vec)a & 0xffffffffull) * uint64_t(m);
  const U64Vec odd = (U64Vec)odd_lanes * uint64_t(m);
#endif
  high = (UVec)((even >> 32) | (odd & 0xffffffff00000000ull));
  low = (UVec)((even & 0xffffffffull) | (odd << 32));
}

// Two rows of floats -> lanes of bfloat16 pairs (a low, b high): one row of a pair-interleaved operand.
XF_INLINE UVec to_bf16_pairs(Vec a, Vec b) {
#if defined(XF_BF16_DOT)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (UVec)_mm512_permutexvar_epi16(order, both);
#else
  const UVec low = __builtin_convertvector(to_bf16(a), UVec), high = __builtin_convertvector(to_bf16(b), UVec);
  return low | (high << 16);
#endif
}

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
