// Rotary position embedding: pairs of channels (a, b) turn to (a cos - b sin, b cos + a sin); the inverse, which is also
// the backward pass, has -sin. Su et al., "RoFormer" (2021). Arithmetic is float32 whatever is stored.
//
// A thread owns the angles of one position that fill 16 bytes of each half (4 float32, 8 half-width), holds their cosines and
// sines in registers, and walks a group of heads of the query and the same share of the key's: the tables are read once for
// all of them. A warp's accesses are contiguous, 16 bytes a thread; kAtOnce heads are loaded before the first is stored.
// Where a pointer, a stride or the number of pairs is no multiple of 16 bytes, the same kernel runs with one pair a thread.
// Positions are clamped to the tables' rows: a wrong one stays in memory.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills).
#include "rope.h"

#include "device.cuh"

namespace xformer_fast {
namespace {

constexpr int kHeads = 8;     // of a block, query's and key's each
constexpr int kAtOnce = 4;    // heads in flight
constexpr int kThreads = 256;

template <int V>
struct Angles {
  float cos[V], sin[V];
};

__device__ __forceinline__ int64_t table_row(const CudaRope& r, const CudaRopeTensor& t, int64_t batch, int64_t row, int axis) {
  const int64_t p = t.positions
      ? t.positions[axis * t.position_axis + batch * t.position_batch + row * t.position_row] : t.first + row;
  return p < 0 ? 0 : p < r.table_rows ? p : r.table_rows - 1;
}

template <int V>
__device__ __forceinline__ Angles<V> angles_at(const CudaRope& r, const CudaRopeTensor& t, int64_t batch, int64_t row, int angle) {
  Angles<V> angles;
  const float sign = r.inverse ? -1.f : 1.f;
  if (r.axes == 1) {
    const int64_t p = table_row(r, t, batch, row, 0);
    const auto c = load<float, V>(r.cos + p * r.cos_row + angle), s = load<float, V>(r.sin + p * r.sin_row + angle);
#pragma unroll
    for (int i = 0; i < V; ++i) angles.cos[i] = c.values[i], angles.sin[i] = sign * s.values[i];
    return angles;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    int axis = 0;
    while (axis + 1 < r.axes && angle + i >= r.section_end[axis]) ++axis;
    const int64_t p = table_row(r, t, batch, row, axis);
    angles.cos[i] = r.cos[p * r.cos_row + angle + i];
    angles.sin[i] = sign * r.sin[p * r.sin_row + angle + i];
  }
  return angles;
}

// Turns V pairs: `first` and `second` are the halves, or both halves of a run of 2 V neighbours.
template <bool Interleaved, class T, int V>
__device__ __forceinline__ void turn(Pack<T, V>& first, Pack<T, V>& second, const Angles<V>& angles) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    Pack<T, V>& half = !Interleaved || 2 * i < V ? first : second;
    T& low = Interleaved ? half.values[2 * i % V] : first.values[i];
    T& high = Interleaved && V > 1 ? half.values[(2 * i + 1) % V] : second.values[i];
    const float a = to_float(low), b = to_float(high);
    assign(low, a * angles.cos[i] - b * angles.sin[i]);
    assign(high, b * angles.cos[i] + a * angles.sin[i]);
  }
}

template <class T, int V, bool Interleaved>
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ CudaRope r) {
  const int64_t row = static_cast<int64_t>(blockIdx.x % r.row_blocks) * blockDim.y + threadIdx.y, batch = blockIdx.x / r.row_blocks;
  const int turning = 2 * r.pairs, apart = Interleaved ? V : r.pairs;
  for (int angle = threadIdx.x * V; angle < r.pairs; angle += blockDim.x * V) {
    const int place = Interleaved ? 2 * angle : angle;
    Angles<V> angles;
    int64_t held = -1;
    for (int which = 0; which < r.count; ++which) {
      const CudaRopeTensor& t = r.tensors[which];
      if (row >= t.length) continue;
      const int64_t wanted = r.axes == 1 ? table_row(r, t, batch, row, 0) : -2;
      if (wanted != held || wanted < 0) angles = angles_at<V>(r, t, batch, row, angle);
      held = wanted;
      const int begin = blockIdx.y * kHeads, end = min(begin + kHeads, t.heads);
      const T* in = static_cast<const T*>(t.in) + batch * t.in_batch + row * t.in_row + place;
      T* out = static_cast<T*>(t.out) + batch * t.out_batch + row * t.out_row + place;
      for (int head = begin; head < end; head += kAtOnce) {
        Pack<T, V> first[kAtOnce], second[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (head + i < end) {
            first[i] = load<T, V>(in + (head + i) * t.in_head);
            second[i] = load<T, V>(in + (head + i) * t.in_head + apart);
          }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (head + i < end) {
            turn<Interleaved>(first[i], second[i], angles);
            store(out + (head + i) * t.out_head, first[i]);
            store(out + (head + i) * t.out_head + apart, second[i]);
          }
      }
    }
  }
  for (int which = 0; which < r.count; ++which) {
    const CudaRopeTensor& t = r.tensors[which];
    if (row >= t.length || t.in == t.out) continue;
    const T* in = static_cast<const T*>(t.in) + batch * t.in_batch + row * t.in_row;
    T* out = static_cast<T*>(t.out) + batch * t.out_batch + row * t.out_row;
    for (int head = blockIdx.y * kHeads; head < min(static_cast<int>(blockIdx.y + 1) * kHeads, t.heads); ++head)
      for (int channel = turning + threadIdx.x; channel < r.head_dim; channel += blockDim.x)
        out[head * t.out_head + channel] = in[head * t.in_head + channel];
  }
}

template <class T>
bool fits_16_bytes(const CudaRope& r, int v) {
  int64_t places = (r.cos_row | r.sin_row) * 4 | reinterpret_cast<intptr_t>(r.cos) | reinterpret_cast<intptr_t>(r.sin);
  for (int i = 0; i < r.count; ++i) {
    const CudaRopeTensor& t = r.tensors[i];
    places |= reinterpret_cast<intptr_t>(t.in) | reinterpret_cast<intptr_t>(t.out);
    places |= (t.in_batch | t.in_head | t.in_row | t.out_batch | t.out_head | t.out_row) * static_cast<int64_t>(sizeof(T));
  }
  return places % 16 == 0 && r.pairs % v == 0;
}

template <class T, int V, bool Interleaved>
cudaError_t rotate(CudaRope r, void* stream) {
  int length = 0, heads = 0;
  for (int i = 0; i < r.count; ++i) {
    length = max(length, r.tensors[i].length);
    heads = max(heads, r.tensors[i].heads);
  }
  if (!length || !heads || !r.batch) return cudaSuccess;
  int wide = 1;  // threads along the channels: a power of two
  while (wide * V < r.pairs && wide < 64) wide *= 2;
  const dim3 block(wide, kThreads / wide);
  r.row_blocks = (length + block.y - 1) / block.y;
  const dim3 grid(r.row_blocks * r.batch, (heads + kHeads - 1) / kHeads);
  return launch(rope_kernel<T, V, Interleaved>, grid, block, 0, stream, r);
}

template <class T>
cudaError_t rotate(const CudaRope& r, void* stream) {
  constexpr int v = 16 / sizeof(T);
  if (fits_16_bytes<T>(r, v)) return r.interleaved ? rotate<T, v, true>(r, stream) : rotate<T, v, false>(r, stream);
  return r.interleaved ? rotate<T, 1, true>(r, stream) : rotate<T, 1, false>(r, stream);
}

}  // namespace

int rope_cuda(const CudaRope& rope, void* stream) {
  switch (rope.element) {
    case Element::float32: return rotate<float>(rope, stream);
    case Element::bfloat16: return rotate<bf16>(rope, stream);
    case Element::float16: return rotate<half>(rope, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace xformer_fast
