// Rotary position embedding: pairs of channels (a, b) turn by the angle of their row's position,
//
//   a' = a cos - b sin,   b' = b cos + a sin       (inverse: sin -> -sin, which is also the backward pass)
//
// Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021). Arithmetic is float32 whatever is stored.
//
// One pass. A task takes a block of positions of one sequence and a group of its heads; the groups of one block follow each
// other, so that a table row comes from L1 or L2 for all heads but the first. Inside, the order of heads and positions is
// the input's order in memory. Large outputs are written past the caches.
//
// NOTES (two threads of a Zen 4, (1, 32, 2048, 128), memory reused between calls; the machine is shared, medians drift by 15%)
//   1.65 ms in float32 and 0.93 to 1.03 in bfloat16, where clone() of the same tensor takes 2.02 and 0.85 to 1.10.
//   Ordinary stores in place of those past the caches: 2.64 and 1.46 ms. No prefetch: 1.84 and 1.25 ms; 1, 2 or 8 KB ahead
//   in place of 4 are within 8%. Blocks of 64 positions with all heads (runs of 16 KB) were 15 to 25% slower than these;
//   tasks of 256 KB or 1 MB, and table blocks of 128 KB to 1 MB, make no difference.
//   g++ 12 widens bfloat16 in two halves where it is left to convert vectors (simd.h, widen): 5.0 to 3.6 ns for 16 pairs.
//   A result of 32 MiB and more is mapped afresh by glibc at every call; huge pages (launch.h) take that from 15 to 6 ms.
#include "rope.h"
#include "simd.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

constexpr int64_t kTableBytes = 256 << 10;  // of a task's table rows: they stay in L2
constexpr int64_t kLeastTaskBytes = 32 << 10, kMostTaskBytes = 512 << 10;  // of its input
constexpr int64_t kMostRows = 1024;
constexpr int64_t kAheadBytes = 4096;  // how far ahead of the loads input is prefetched
constexpr int64_t kStreamBytes = 8 << 20;  // an output at least this large is written past the caches

XF_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x > high ? high : x < low ? low : x; }
XF_INLINE int64_t element_bytes(const Rotation& r) { return r.element == Element::float32 ? 4 : 2; }

// The positions and the heads of a task: by shape and memory order alone.
void cut(const RopeTables& t, const Rotation& r, int64_t* rows, int64_t* heads) {
  const int64_t row_bytes = r.head_dim * element_bytes(r), all = r.batch * r.heads * r.length * row_bytes;
  const int64_t wanted = clamp(all / 32, kLeastTaskBytes, kMostTaskBytes) / row_bytes + 1;  // rows of one head
  const int64_t most = clamp(kTableBytes / (8 * t.pairs + 1), 1, r.length < kMostRows ? r.length : kMostRows);
  *rows = clamp(r.in.head < r.in.row ? wanted / r.heads : wanted, 1, most);
  *heads = clamp(wanted / *rows, 1, r.heads);
}

// ---- whole vectors to memory, through the caches or past them ----

template <bool Stream, class V>
XF_INLINE void put_bits(void* p, V v) {
#if defined(XF_AVX512) || defined(XF_AVX2)
  if constexpr (Stream && sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
  if constexpr (Stream && sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(XF_AVX512)
  if constexpr (Stream && sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
  __builtin_memcpy(p, &v, sizeof v);
}

// Two neighbouring vectors.
template <bool Stream>
XF_INLINE void put(float* p, Vec low, Vec high) {
  put_bits<Stream>(p, low);
  put_bits<Stream>(p + kLanes, high);
}
template <bool Stream>
XF_INLINE void put(float16* p, Vec low, Vec high) {
  put_bits<Stream>(p, to_f16(low));
  put_bits<Stream>(p + kLanes, to_f16(high));
}
template <bool Stream>
XF_INLINE void put(bfloat16* p, Vec low, Vec high) {
#if defined(XF_BF16_DOT)
  put_bits<Stream>(p, (UVec)_mm512_cvtne2ps_pbh(high, low));  // one instruction; a result below 2^-126 becomes 0
#else
  put_bits<Stream>(p, to_bf16(low));
  put_bits<Stream>(p + kLanes, to_bf16(high));
#endif
}

// ---- one row ----

XF_INLINE int clamp_lanes(int64_t n) { return int(clamp(n, 0, kLanes)); }

XF_INLINE Vec swap_neighbours(Vec v) {
#if defined(XF_AVX512)
  return _mm512_permute_ps(v, 0xb1);
#elif defined(XF_AVX2)
  return _mm256_permute_ps(v, 0xb1);
#else
  return __builtin_shuffle(v, IVec{1, 0, 3, 2});
#endif
}

// Turning back by an angle is turning (b, a) by it: `first` and `second` are 0 and `pairs`, or the reverse.
struct Angles {
  const float* cos;
  const float* sin;
  int64_t pairs, first, second;
  Vec sign;  // of the sine, for neighbours: -, +, -, + ... or its negative
};

template <bool Stream, class T>
XF_INLINE void turn_halves(const T* in, T* out, const Angles& t) {
  const T *in_a = in + t.first, *in_b = in + t.second;
  T *out_a = out + t.first, *out_b = out + t.second;
  int64_t k = 0;
  for (; k + 2 * kLanes <= t.pairs; k += 2 * kLanes) {
    const Vec a0 = load(in_a + k), b0 = load(in_b + k), c0 = load(t.cos + k), s0 = load(t.sin + k);
    const Vec a1 = load(in_a + k + kLanes), b1 = load(in_b + k + kLanes);
    const Vec c1 = load(t.cos + k + kLanes), s1 = load(t.sin + k + kLanes);
    put<Stream>(out_a + k, a0 * c0 - b0 * s0, a1 * c1 - b1 * s1);
    put<Stream>(out_b + k, b0 * c0 + a0 * s0, b1 * c1 + a1 * s1);
  }
  for (; k < t.pairs; k += kLanes) {
    const int n = clamp_lanes(t.pairs - k);
    const Vec a = load(in_a + k, n), b = load(in_b + k, n), c = load(t.cos + k, n), s = load(t.sin + k, n);
    store(out_a + k, a * c - b * s, n);
    store(out_b + k, b * c + a * s, n);
  }
}

// Whole vectors of neighbours; returns how many pairs they were. (a, b) turns to (a, b) * (cos, cos) + (b, a) * (-sin, sin).
template <bool Stream, class T>
XF_INLINE int64_t turn_neighbour_vectors(const T* in, T* out, const Angles& t) {
  int64_t k = 0;
  for (; k + kLanes <= t.pairs; k += kLanes) {
    const Vec c = load(t.cos + k), s = load(t.sin + k), low = load(in + 2 * k), high = load(in + 2 * k + kLanes);
    put<Stream>(out + 2 * k, low * interleave_low(c, c) + swap_neighbours(low) * (interleave_low(s, s) * t.sign),
                high * interleave_high(c, c) + swap_neighbours(high) * (interleave_high(s, s) * t.sign));
  }
  return k;
}
// A pair of bfloat16 is one 32-bit lane: no shuffles.
template <bool Stream>
XF_INLINE int64_t turn_neighbour_vectors(const bfloat16* in, bfloat16* out, const Angles& t) {
  int64_t k = 0;
  for (; k + kLanes <= t.pairs; k += kLanes) {
    const UVec both = load_as<UVec>(in + 2 * k);
    const Vec a = (Vec)(both << 16), b = (Vec)(both & 0xffff0000u), c = load(t.cos + k), s = load(t.sin + k) * t.sign[1];
    put_bits<Stream>(out + 2 * k, to_bf16_pairs(a * c - b * s, b * c + a * s));
  }
  return k;
}

template <bool Stream, class T>
XF_INLINE void turn_neighbours(const T* in, T* out, const Angles& t) {
  const int64_t k = turn_neighbour_vectors<Stream>(in, out, t);
  if (k == t.pairs) return;
  const int n = int(t.pairs - k), n_low = clamp_lanes(2 * n), n_high = clamp_lanes(2 * n - kLanes);
  const Vec c = load(t.cos + k, n), s = load(t.sin + k, n);
  const Vec low = load(in + 2 * k, n_low), high = load(in + 2 * k + kLanes, n_high);
  store(out + 2 * k, low * interleave_low(c, c) + swap_neighbours(low) * (interleave_low(s, s) * t.sign), n_low);
  store(out + 2 * k + kLanes, high * interleave_high(c, c) + swap_neighbours(high) * (interleave_high(s, s) * t.sign), n_high);
}

// ---- a block of positions ----

struct Block {
  const Rotation* r;
  const RopeTables* tables;
  int64_t batch, begin, rows, first_head, heads;
  const float* cos[kMostRows];  // the table row of each position
  const float* sin[kMostRows];
};

// Table rows in place, or put together from the rows of several axes.
XF_NOINLINE void find_rows(Block& block, float* assembled) {
  const Rotation& r = *block.r;
  const RopeTables& t = *block.tables;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t* position = r.positions
        ? r.positions + block.batch * r.position_batch + (block.begin + i) * r.position_row : nullptr;
    const int64_t row = position ? *position : r.first + block.begin + i;
    block.cos[i] = t.cos + row * t.cos_row;
    block.sin[i] = t.sin + row * t.sin_row;
    if (t.axes == 1 || !position) continue;
    float* cos = assembled + 2 * i * t.pairs;
    float* sin = cos + t.pairs;
    for (int64_t axis = 0, k = 0; axis < t.axes; ++axis) {
      const int64_t p = position[axis * r.position_axis];
      for (; k < t.section_end[axis]; ++k) cos[k] = t.cos[p * t.cos_row + k], sin[k] = t.sin[p * t.sin_row + k];
    }
    block.cos[i] = cos;
    block.sin[i] = sin;
  }
}

template <class T, bool Interleaved, bool Stream>
XF_NOINLINE void turn_rows(const Block& block) {
  const Rotation& r = *block.r;
  const RopeTables& t = *block.tables;
  Angles angles;
  angles.pairs = t.pairs;
  angles.first = t.inverse ? t.pairs : 0;
  angles.second = t.pairs - angles.first;
  angles.sign = (lane_index() & 1) == (t.inverse ? 1 : 0) ? broadcast(-1.f) : broadcast(1.f);
  const int64_t turning = 2 * t.pairs, tail = r.head_dim - turning, row_bytes = r.head_dim * int64_t(sizeof(T));
  auto turn = [&](const T* x, T* y, int64_t i) __attribute__((always_inline)) {
    for (int64_t byte = 0; byte < row_bytes; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x) + kAheadBytes + byte);
    angles.cos = block.cos[i];
    angles.sin = block.sin[i];
    if (Interleaved) turn_neighbours<Stream>(x, y, angles);
    else turn_halves<Stream>(x, y, angles);
    if (tail && x != y) __builtin_memcpy(y + turning, x + turning, size_t(tail) * sizeof(T));
  };
  const int64_t rows = block.rows, heads = block.heads;
  const int64_t in_row = r.in.row, in_head = r.in.head, out_row = r.out.row, out_head = r.out.head;
  const T* in = static_cast<const T*>(r.in.data) + block.batch * r.in.batch + block.begin * in_row + block.first_head * in_head;
  T* out = static_cast<T*>(r.out.data) + block.batch * r.out.batch + block.begin * out_row + block.first_head * out_head;
  if (in_head < in_row) {
    for (int64_t i = 0; i < rows; ++i, in += in_row, out += out_row)
      for (int64_t h = 0; h < heads; ++h) turn(in + h * in_head, out + h * out_head, i);
  } else {
    for (int64_t h = 0; h < heads; ++h, in += in_head, out += out_head)
      for (int64_t i = 0; i < rows; ++i) turn(in + i * in_row, out + i * out_row, i);
  }
#if defined(__x86_64__)
  if (Stream) _mm_sfence();
#endif
}

using TurnRows = void (*)(const Block&);

template <class T>
TurnRows pass_for(bool interleaved, bool streams) {
  if (interleaved) return streams ? turn_rows<T, true, true> : turn_rows<T, true, false>;
  return streams ? turn_rows<T, false, true> : turn_rows<T, false, false>;
}

// Stores past the caches want whole vectors at multiples of their size.
bool may_stream(const RopeTables& t, const Rotation& r) {
  const int64_t element = element_bytes(r);
  const int64_t places = reinterpret_cast<int64_t>(r.out.data) | (r.out.batch | r.out.head | r.out.row | t.pairs) * element;
  return r.batch * r.heads * r.length * r.head_dim * element >= kStreamBytes && r.in.data != r.out.data && places % 64 == 0;
}

TurnRows pass_for(const RopeTables& t, const Rotation& r) {
  const bool streams = may_stream(t, r);
  switch (r.element) {
    case Element::bfloat16: return pass_for<bfloat16>(t.interleaved, streams);
    case Element::float16: return pass_for<float16>(t.interleaved, streams);
    default: return pass_for<float>(t.interleaved, streams);
  }
}

struct Job {
  const RopeTables* tables;
  const Rotation* rotation;
  TurnRows pass;
  int64_t rows, blocks, heads, head_groups, first_task;
};
struct Jobs {
  Job of[2];
  int count;
};

void run_task(void* context, int64_t task, char* scratch) {
  const Jobs& jobs = *static_cast<const Jobs*>(context);
  const Job& job = jobs.count == 2 && task >= jobs.of[1].first_task ? jobs.of[1] : jobs.of[0];
  const int64_t index = task - job.first_task;
  Block block;
  block.r = job.rotation;
  block.tables = job.tables;
  block.first_head = index % job.head_groups * job.heads;
  block.heads = job.rotation->heads - block.first_head;
  if (block.heads > job.heads) block.heads = job.heads;
  block.batch = index / job.head_groups / job.blocks;
  block.begin = index / job.head_groups % job.blocks * job.rows;
  const int64_t left = job.rotation->length - block.begin;
  block.rows = left < job.rows ? left : job.rows;
  find_rows(block, reinterpret_cast<float*>(scratch));
  job.pass(block);
}

void rotate(const RopeTables& tables, const Rotation* rotations, int count, const Pool& pool) {
  Jobs jobs{};
  jobs.count = count;
  int64_t tasks = 0;
  for (int i = 0; i < count; ++i) {
    const Rotation& r = rotations[i];
    Job& job = jobs.of[i];
    job.tables = &tables;
    job.rotation = &r;
    job.pass = pass_for(tables, r);
    cut(tables, r, &job.rows, &job.heads);
    job.head_groups = (r.heads + job.heads - 1) / job.heads;
    job.blocks = (r.length + job.rows - 1) / job.rows;
    job.first_task = tasks;
    tasks += r.batch * job.blocks * job.head_groups;
  }
  const size_t assembled = tables.axes == 1 ? 0 : size_t(2 * kMostRows * tables.pairs) * sizeof(float);
  pool.run(tasks, run_task, &jobs, assembled);
}

}  // namespace

const RopeKernels rope_kernels = {rotate};

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
