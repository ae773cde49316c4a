// Attention of a chunk of L tokens to sinks and window. A query at position t sees the
// tokens j <= t with j < S or t - j < W; sinks and window are loop bounds, and no block
// outside them is loaded.
//
// q, q_sink: [B, H, L, D], the latter for scores of sinks. chunk_k, chunk_v: [B, HKV, L, D],
// tokens offset[b] ... offset[b] + L - 1. ring_k, ring_v: [B, HKV, slots, D] as before the
// chunk: token j in slot j or, behind the sinks, S + (j - S) % W. heads: [B, H, L, D].
//
// grid (32 SG, ceil(L / BQ), B H), threadgroup (32 SG, 1, 1) with BQ = 8 SG: eight queries
// per simdgroup, BK keys at a time, products by 8 x 8 simdgroup matrices. Queries, keys and
// values are staged as T, that of the tokens; scores, weights and sums are float32.
// Reads each visible key and value once per BQ queries and head: 2 D / BQ elements per
// query and key.

constexpr int BQ = 8 * SG;
constexpr int THREADS = 32 * SG;
constexpr int SPAN = BK / 4;  // scores of one row that a lane looks at

const int simd_lid = thread_index_in_simdgroup;
const int simd_gid = simdgroup_index_in_threadgroup;
const int tid = thread_position_in_threadgroup.x;
const int row0 = threadgroup_position_in_grid.y * BQ;
const int n = threadgroup_position_in_grid.z;
const int b = n / H;
const int kv = b * HKV + (n % H) / (H / HKV);
const int L = q_shape[2];
const int slots = ring_k_shape[2];
const int before = offset[b];
const int rows = min(BQ, L - row0);
const int t0 = before + row0;      // position of the first query
const int end = t0 + rows;         // behind the last query
const int my_row = simd_lid / 4;   // of this simdgroup's eight
const int my_t = t0 + simd_gid * 8 + my_row;

auto ring_k_ = ring_k + kv * slots * D;
auto ring_v_ = ring_v + kv * slots * D;
auto chunk_k_ = chunk_k + kv * L * D;
auto chunk_v_ = chunk_v + kv * L * D;

threadgroup T queries[BQ * D];
threadgroup T block[BK * D];  // keys, then values
threadgroup float scores[BQ * BK];  // at the end: what leaves
threadgroup float diagonal[SG * 64];

threadgroup T* my_queries = queries + simd_gid * 8 * D;
threadgroup float* my_scores = scores + simd_gid * 8 * BK;
threadgroup float* my_diagonal = diagonal + simd_gid * 64;

simdgroup_float8x8 out[D / 8];
for (int d = 0; d < D / 8; d++) {
  out[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
my_diagonal[simd_lid] = 0.0f;
my_diagonal[simd_lid + 32] = 0.0f;
float top = -1e30f, sum = 0.0f;  // of my_row

// The sinks, then the window, each with its own queries.
for (int pass = 0; pass < 2; pass++) {
  const int from = pass == 0 ? 0 : max(S, t0 - W + 1);
  const int to = pass == 0 ? min(S, end) : end;
  for (int i = tid; i < BQ * D; i += THREADS) {
    const int at = (n * L + row0) * D + i;
    const float query = i >= rows * D ? 0.0f : static_cast<float>(pass == 0 ? q_sink[at] : q[at]);
    queries[i] = static_cast<T>(query);
  }
  for (int j0 = from; j0 < to; j0 += BK) {
    // Keys j0 ... j0 + BK - 1; what is behind the last is zero and never seen.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = tid; i < BK * D; i += THREADS) {
      const int j = j0 + i / D;
      const int slot = j < S ? j : S + (j - S) % W;
      float key = 0.0f;
      if (j < to) {
        key = j < before ? static_cast<float>(ring_k_[slot * D + i % D])
                         : static_cast<float>(chunk_k_[(j - before) * D + i % D]);
      }
      block[i] = static_cast<T>(key);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int c = 0; c < BK / 8; c++) {
      simdgroup_float8x8 score = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (int d = 0; d < D / 8; d++) {
        simdgroup_matrix<T, 8, 8> left, right;
        simdgroup_load(left, my_queries + d * 8, D);
        simdgroup_load(right, block + c * 8 * D + d * 8, D, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(score, left, right, score);
      }
      simdgroup_store(score, my_scores + c * 8, BK);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = tid; i < BK * D; i += THREADS) {
      const int j = j0 + i / D;
      const int slot = j < S ? j : S + (j - S) % W;
      float value = 0.0f;
      if (j < to) {
        value = j < before ? static_cast<float>(ring_v_[slot * D + i % D])
                           : static_cast<float>(chunk_v_[(j - before) * D + i % D]);
      }
      block[i] = static_cast<T>(value);
    }

    // Softmax so far: four lanes per row. A row that has seen no key yet counts the others
    // alike, until its first real score takes their weight away.
    float higher = top;
    float weight[SPAN];
    for (int i = 0; i < SPAN; i++) {
      const int j = j0 + (simd_lid % 4) * SPAN + i;
      const bool visible = j < to && j <= my_t && (pass == 0 || my_t - j < W);
      const float score = scale[0] * my_scores[my_row * BK + (simd_lid % 4) * SPAN + i];
      weight[i] = visible ? score : -1e30f;
      higher = max(higher, weight[i]);
    }
    higher = max(higher, simd_shuffle_xor(higher, 1));
    higher = max(higher, simd_shuffle_xor(higher, 2));
    float added = 0.0f;
    for (int i = 0; i < SPAN; i++) {
      weight[i] = metal::exp(weight[i] - higher);
      added += weight[i];
      my_scores[my_row * BK + (simd_lid % 4) * SPAN + i] = weight[i];
    }
    added += simd_shuffle_xor(added, 1);
    added += simd_shuffle_xor(added, 2);
    const float keep = metal::exp(top - higher);
    sum = sum * keep + added;
    top = higher;
    if (simd_lid % 4 == 0) {
      my_diagonal[my_row * 9] = keep;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_float8x8 rescale;
    simdgroup_load(rescale, my_diagonal, 8);
    for (int d = 0; d < D / 8; d++) {
      simdgroup_multiply(out[d], rescale, out[d]);
      for (int c = 0; c < BK / 8; c++) {
        simdgroup_float8x8 left;
        simdgroup_matrix<T, 8, 8> right;
        simdgroup_load(left, my_scores + c * 8, BK);
        simdgroup_load(right, block + c * 8 * D + d * 8, D);
        simdgroup_multiply_accumulate(out[d], left, right, out[d]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

if (simd_lid % 4 == 0) {
  my_diagonal[my_row * 9] = 1.0f / sum;
}
simdgroup_barrier(mem_flags::mem_threadgroup);
simdgroup_float8x8 divide;
simdgroup_load(divide, my_diagonal, 8);
// BK columns at a time, as many as scores hold.
for (int d = 0; d < D / 8; d += BK / 8) {
  for (int c = 0; c < BK / 8; c++) {
    simdgroup_multiply(out[d + c], divide, out[d + c]);
    simdgroup_store(out[d + c], my_scores + c * 8, BK);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = simd_lid; i < 8 * BK; i += 32) {
    const int row = simd_gid * 8 + i / BK;
    if (row < rows) {
      heads[(n * L + row0 + row) * D + d * 8 + i % BK] = static_cast<T>(my_scores[i]);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
