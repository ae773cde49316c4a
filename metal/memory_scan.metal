// A memory reads a document: N evicted tokens are written one after the other, and after
// each of them a query reads. KIND 0 Gated DeltaNet, 1 DeltaNet, 2 Mamba2.
//
// Evicted token i is the token e = first[b] + i. It lies in the ring, as it was before
// the chunk, while e < offset[b], in slot S + (e - S) % W, for sinks never leave; else in
// row e - offset[b] of the chunk.
//
// q: [B, H, N, D]. ring_k, ring_v: [B, HKV, slots, D], ring_gates: [B, H, slots, G];
// chunk_k, chunk_v: [B, HKV, L, D], chunk_gates: [B, H, L, G]. state: [B, H, D, D] float32,
// key by value for the delta rules, value by key for Mamba2. rates: [H], A < 0 (KIND 2).
// o: [B, N, H, D] float32. T: type of what is staged, that of the tokens.
//
// grid (4 D / P, P, B H), threadgroup (4 D / P, 1, 1): P threadgroups per head, each with
// D / P value columns. Eight columns per simdgroup, four lanes per column, D / 4 state
// elements per lane in registers. BT tokens are staged at a time, each read once.
// Reads per token and head P (q + k) + v + gates: 1.5 KB at P = 1, 4.5 KB at P = 4
// (float32, D = 128). The state is read and written once per call. Sequential in time:
// four shuffles per simdgroup and token leave nothing that a chunked form would save here.

constexpr int NT = 4 * D / P;       // threads
constexpr int COLS = D / P;         // value columns of this threadgroup
constexpr int LANES = NT / BT;      // threads that stage one token
constexpr int WIDTH = D / LANES;    // of its key and query that each of them reads
constexpr int KEYS = D / 4;         // state elements per lane
constexpr float EPS = KIND == 2 ? 1e-24f : 1e-6f;

const int simd_lid = thread_index_in_simdgroup;
const int simd_gid = simdgroup_index_in_threadgroup;
const int tid = thread_position_in_threadgroup.x;
const int first_col = threadgroup_position_in_grid.y * COLS;
const int n = threadgroup_position_in_grid.z;
const int b = n / H;
const int h = n % H;
const int kv = b * HKV + h / (H / HKV);
const int tokens = q_shape[2];
const int slots = ring_k_shape[2];
const int rows = chunk_k_shape[2];
const int col = simd_gid * 8 + simd_lid / 4;
const int part = simd_lid % 4;

auto q_ = q + n * tokens * D;
auto ring_k_ = ring_k + kv * slots * D;
auto ring_v_ = ring_v + kv * slots * D + first_col;
auto ring_gates_ = ring_gates + n * slots * G;
auto chunk_k_ = chunk_k + kv * rows * D;
auto chunk_v_ = chunk_v + kv * rows * D + first_col;
auto chunk_gates_ = chunk_gates + n * rows * G;
auto o_ = o + (b * tokens * H + h) * D + first_col + col;

threadgroup T keys[BT * D];
threadgroup T queries[BT * D];
threadgroup T values[BT * COLS];
threadgroup float key_parts[NT];
threadgroup float query_parts[NT];
threadgroup float key_scale[BT];
threadgroup float query_scale[BT];
threadgroup float decay[BT];
threadgroup float strength[BT];

float M[KEYS];
for (int i = 0; i < KEYS; i++) {
  const int key = 4 * i + part;
  const int value = first_col + col;
  M[i] = state[n * D * D + (KIND == 2 ? value * D + key : key * D + value)];
}

for (int start = 0; start < tokens; start += BT) {
  const int count = min(BT, tokens - start);

  // Stage BT tokens, LANES threads for each.
  const int row = tid / LANES;
  if (row < count) {
    const int e = first[b] + start + row;
    const bool in_ring = e < offset[b];
    const int at = in_ring ? S + (e - S) % W : e - offset[b];
    float kk = 0.0f, qq = 0.0f;
    for (int i = 0; i < WIDTH; i++) {
      const int d = i * LANES + tid % LANES;
      const float k = in_ring ? static_cast<float>(ring_k_[at * D + d])
                              : static_cast<float>(chunk_k_[at * D + d]);
      const float query = static_cast<float>(q_[(start + row) * D + d]);
      keys[row * D + d] = static_cast<T>(k);
      queries[row * D + d] = static_cast<T>(query);
      kk += k * k;
      qq += query * query;
    }
    for (int c = tid % LANES; c < COLS; c += LANES) {
      values[row * COLS + c] = in_ring ? static_cast<T>(ring_v_[at * D + c])
                                       : static_cast<T>(chunk_v_[at * D + c]);
    }
    key_parts[tid] = kk;
    query_parts[tid] = qq;
    if (tid % LANES == 0) {
      strength[row] = in_ring ? static_cast<float>(ring_gates_[at * G])
                              : static_cast<float>(chunk_gates_[at * G]);
      float log_decay = 0.0f;
      if (KIND == 0) {
        log_decay = in_ring ? static_cast<float>(ring_gates_[at * G + G - 1])
                            : static_cast<float>(chunk_gates_[at * G + G - 1]);
      }
      if (KIND == 2) {
        log_decay = strength[row] * rates[h];
      }
      decay[row] = metal::exp(log_decay);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid < count) {
    float kk = 0.0f, qq = 0.0f;
    for (int i = 0; i < LANES; i++) {
      kk += key_parts[tid * LANES + i];
      qq += query_parts[tid * LANES + i];
    }
    key_scale[tid] = metal::rsqrt(kk + EPS);
    query_scale[tid] = metal::rsqrt((qq + EPS) * (KIND == 2 ? 1.0f : float(D)));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int t = 0; t < count; t++) {
    float change = strength[t] * static_cast<float>(values[t * COLS + col]);
    if (KIND != 2) {
      float recalled = 0.0f;
      for (int i = 0; i < KEYS; i++) {
        recalled += M[i] * static_cast<float>(keys[t * D + 4 * i + part]);
      }
      recalled += simd_shuffle_xor(recalled, 1);
      recalled += simd_shuffle_xor(recalled, 2);
      change -= strength[t] * decay[t] * key_scale[t] * recalled;
    }
    change *= key_scale[t];
    float answer = 0.0f;
    for (int i = 0; i < KEYS; i++) {
      M[i] = decay[t] * M[i] + static_cast<float>(keys[t * D + 4 * i + part]) * change;
      answer += M[i] * static_cast<float>(queries[t * D + 4 * i + part]);
    }
    answer += simd_shuffle_xor(answer, 1);
    answer += simd_shuffle_xor(answer, 2);
    if (part == 0) {
      o_[(start + t) * H * D] = answer * query_scale[t];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

for (int i = 0; i < KEYS; i++) {
  const int key = 4 * i + part;
  const int value = first_col + col;
  new_state[n * D * D + (KIND == 2 ? value * D + key : key * D + value)] = M[i];
}
