// Attention of one decoded token to all that the window keeps, one share of it per
// threadgroup; who uses the shares puts them together (common.h).
//
// q, q_sink: [B, HKV G, 1, D]. k, v: [B, HKV, slots, D], of which the first filled[b]
// slots are visible, in whatever order of time. The first SINKS slots are scored with
// q_sink, the others with q. parts: [B, HKV G, SPLITS, D] float32, not divided by the sum
// of weights; stats: [B, HKV G, SPLITS, 2] float32, largest score and sum of weights.
// Slot following[b], where the next token goes, is copied: next_k, next_v [B, HKV, 1, D], and
// of gates [B, HKV G, slots, GATES] next_gates [B, HKV G, 1, GATES].
//
// grid (32 SG, SPLITS, B HKV), threadgroup (32 SG, 1, 1): a simdgroup takes every SG-th
// key of the share for all G query heads, a lane D / 32 columns (one, if D < 32).
// Reads each visible key and value once per key/value head: 2 D elements.

constexpr int LANES = D < 32 ? D : 32;  // that hold columns
constexpr int COLS = D / LANES;

const int simd_lid = thread_index_in_simdgroup;
const int simd_gid = simdgroup_index_in_threadgroup;
const bool active = simd_lid < LANES;
const int tid = thread_position_in_threadgroup.x;
const int split = threadgroup_position_in_grid.y;
const int n = threadgroup_position_in_grid.z;  // b * HKV + key/value head
const int slots = k_shape[2];
const int visible = filled[n / HKV];
const int share = (slots + SPLITS - 1) / SPLITS;
const int first = split * share;
const int last = min(first + share, visible);

auto k_ = k + n * slots * D + simd_lid * COLS;
auto v_ = v + n * slots * D + simd_lid * COLS;

threadgroup float outputs[SG * D];
threadgroup float tops[SG];
threadgroup float sums[SG];

float query[G][COLS];
float out[G][COLS];
float top[G];
float sum[G];
for (int g = 0; g < G; g++) {
  top[g] = -1e30f;
  sum[g] = 0.0f;
  for (int c = 0; c < COLS; c++) {
    out[g][c] = 0.0f;
  }
}

// The sinks, then the rest, each with its own query.
for (int pass = 0; pass < 2; pass++) {
  const int from = pass == 0 ? first : max(first, SINKS);
  const int to = pass == 0 ? min(last, SINKS) : last;
  for (int g = 0; g < G; g++) {
    for (int c = 0; c < COLS; c++) {
      const int at = (n * G + g) * D + simd_lid * COLS + c;
      const float x = active ? static_cast<float>(pass == 0 ? q_sink[at] : q[at]) : 0.0f;
      query[g][c] = scale[0] * x;
    }
  }
  for (int j = from + simd_gid; j < to; j += SG) {
    float key[COLS], value[COLS];
    for (int c = 0; c < COLS; c++) {
      key[c] = active ? static_cast<float>(k_[j * D + c]) : 0.0f;
      value[c] = active ? static_cast<float>(v_[j * D + c]) : 0.0f;
    }
    for (int g = 0; g < G; g++) {
      float score = 0.0f;
      for (int c = 0; c < COLS; c++) {
        score += query[g][c] * key[c];
      }
      score = simd_sum(score);
      const float higher = max(top[g], score);
      const float keep = metal::exp(top[g] - higher);
      const float weight = metal::exp(score - higher);
      top[g] = higher;
      sum[g] = sum[g] * keep + weight;
      for (int c = 0; c < COLS; c++) {
        out[g][c] = out[g][c] * keep + weight * value[c];
      }
    }
  }
}

// Join the simdgroups, one query head after the other.
for (int g = 0; g < G; g++) {
  for (int c = 0; active && c < COLS; c++) {
    outputs[simd_gid * D + simd_lid * COLS + c] = out[g][c];
  }
  if (simd_lid == 0) {
    tops[simd_gid] = top[g];
    sums[simd_gid] = sum[g];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float highest = -1e30f;
  for (int s = 0; s < SG; s++) {
    highest = max(highest, tops[s]);
  }
  const int row = (n * G + g) * SPLITS + split;
  if (tid < D) {
    float total = 0.0f;
    for (int s = 0; s < SG; s++) {
      total += outputs[s * D + tid] * metal::exp(tops[s] - highest);
    }
    parts[row * D + tid] = total;
  }
  if (tid == 0) {
    float total = 0.0f;
    for (int s = 0; s < SG; s++) {
      total += sums[s] * metal::exp(tops[s] - highest);
    }
    stats[row * 2] = highest;
    stats[row * 2 + 1] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// By the time the slot is written again its reader must be done: it is copied now.
const int leaves = following[n / HKV];
if (split == 0) {
  if (tid < D) {
    next_k[n * D + tid] = k[(n * slots + leaves) * D + tid];
    next_v[n * D + tid] = v[(n * slots + leaves) * D + tid];
  }
  for (int i = tid; i < G * GATES; i += 32 * SG) {
    const int row = n * G + i / GATES;
    next_gates[n * G * GATES + i] = gates[(row * slots + leaves) * GATES + i % GATES];
  }
}
