// Linear attention on a GPU: what a launcher hands to the kernels. Raw pointers, no torch.
#pragma once
#include "../cpu/linear_attention.h"

namespace xformer_fast {

// Rows of queries (or of their gradients), or of keys (or values), by head.
struct LinearOperand {
  View view;
  int64_t width;
  bool of_keys;                      // rows are positions and heads are KV heads; else rows are queries
  bool mapped;                       // φ is applied
  const float* row_scale = nullptr;  // of queries: multiplies each row
  const float* row_bias = nullptr;   // of queries: what a row adds beside its channels; of keys it is 1
};

enum class LinearWalk { kState, kValues, kFeatures };

// One walk over chunks of positions, forward or in reverse: see linear_attention_sm80.cu. Numbers of queries are laid out
// (batch, heads_q, rows_q), packed (heads_q, rows_q); states are float32 and contiguous: kv (.., head_dim, head_dim_v), z (.., head_dim).
struct CudaLinear {
  Element element;
  FeatureMap map;
  LinearWalk walk;
  int64_t batch, heads_q, heads_kv, head_dim, head_dim_v;
  int64_t rows_q, rows_k;                 // of a sequence, or of the packed tensors
  const int64_t* cu_seqlens = nullptr;
  const int64_t* key_lengths = nullptr;
  const float* decay = nullptr;
  bool causal, reverse;
  bool fresh = false;                     // there is no initial state
  LinearOperand left, depth, columns;     // out = Σ w (left·depth) columns
  bool transposed_state;                  // the walk's state is (columns, depth) = (value, φ), kv's transpose
  int64_t segments, chunks;               // of a sequence; of a segment
  const float* start_kv = nullptr;        // of each segment (causal) or each (batch, head), or none
  const float* start_z = nullptr;
  float* sum_kv = nullptr;                // kState: what each segment adds
  float* sum_z = nullptr;
  View out;
  bool wide;                              // out is float32, by query head
  View derivative_of;                     // kFeatures: out is multiplied by φ' of these rows
  float* denominator = nullptr;           // kValues of the forward: written; 0 where fresh and without a key
  bool normalize;
  float scale, eps;
};

// Turns what each segment adds into what each starts from, and leaves the whole in final_kv and final_z.
struct CudaLinearPrefix {
  CudaLinear walk;
  float *states, *final;
  const float* initial;
  int64_t size;  // numbers of a state
};

// grad_scale = scale / denominator (0 where that is 0), row_grad = -grad_scale dO·O (0 if not normalised).
struct CudaLinearRows {
  Element element;
  int64_t batch, heads_q, rows_q, head_dim_v;
  View grad_out, out;
  const float* denominator;
  float *grad_scale, *row_grad;
  bool normalize;
  float scale;
};

struct LinearTile {
  int64_t chunk, columns;  // positions of a chunk; columns of a block
};
LinearTile linear_tile(Element element, int64_t width);  // by the larger head dim
int linear_walk_cuda(const CudaLinear& walk, void* stream);
int linear_prefix_cuda(const CudaLinearPrefix& prefix, void* stream);
int linear_rows_cuda(const CudaLinearRows& rows, void* stream);

}  // namespace xformer_fast
