// One decoded token of Gated DeltaNet (G = 2 gates) or DeltaNet (G = 1): the token that
// leaves the window is written into the state, the query reads it, and what it read, after
// norm, gate and the head's projection, is added to the head's local output.
//
// q: [B, H, 1, D]. k, v: [B, HKV, slots, D] and gates: [B, H, slots, G] (write
// strength, log decay), of which slot[b] is read. state: [B, H, D, D], key by value.
// z: [B, 1, H] before silu. norm: [D]. projection: [H, D, D]. router: [B, H]. The local
// output is attention in shares (common.h): local [B, H, SPLITS, D], stats [B, H, SPLITS, 2].
//
// grid (32 SG, B H, 1), threadgroup (32 SG, 1, 1): one threadgroup per head. A simdgroup
// holds D / SG rows of the state in registers, a lane D / 32 columns of each (one, if D < 32).
// Reads the state once and writes it once (2 x 64 KB for D = 128), reads the projection
// once (64 KB in float32), and k, v, q, local, norm once: 2.5 KB.

constexpr int ROWS = D / SG;
constexpr int LANES = D < 32 ? D : 32;  // that hold columns
constexpr int COLS = D / LANES;

const int simd_lid = thread_index_in_simdgroup;
const int simd_gid = simdgroup_index_in_threadgroup;
const bool active = simd_lid < LANES;
const int tid = thread_index_in_threadgroup;
const int n = threadgroup_position_in_grid.y;
const int b = n / H;
const int h = n % H;
const int slots = k_shape[2];
const int from = (b * HKV + h / (H / HKV)) * slots + slot[b];

auto k_ = k + from * D;
auto v_ = v + from * D;
auto q_ = q + n * D;
auto gate_ = gates + (n * slots + slot[b]) * G;
auto state_ = state + n * D * D + simd_gid * ROWS * D + simd_lid * COLS;
auto projection_ = projection + h * D * D + simd_gid * ROWS * D + simd_lid * COLS;
auto new_state_ = new_state + n * D * D + simd_gid * ROWS * D + simd_lid * COLS;

threadgroup float key[D];
threadgroup float query[D];
threadgroup float change[D];
threadgroup float read[D];
threadgroup float parts[SG * 2 * D];
threadgroup float overlap[1];

// Normalise key and query.
if (simd_gid == 0) {
  float kn[COLS], qn[COLS];
  float kk = 0.0f, qq = 0.0f, kq = 0.0f;
  for (int c = 0; c < COLS; c++) {
    kn[c] = active ? static_cast<float>(k_[simd_lid * COLS + c]) : 0.0f;
    qn[c] = active ? static_cast<float>(q_[simd_lid * COLS + c]) : 0.0f;
    kk += kn[c] * kn[c];
    qq += qn[c] * qn[c];
    kq += kn[c] * qn[c];
  }
  const float k_scale = metal::rsqrt(simd_sum(kk) + 1e-6f);
  const float q_scale = metal::rsqrt((simd_sum(qq) + 1e-6f) * D);
  kq = simd_sum(kq);
  for (int c = 0; active && c < COLS; c++) {
    key[simd_lid * COLS + c] = kn[c] * k_scale;
    query[simd_lid * COLS + c] = qn[c] * q_scale;
  }
  if (simd_lid == 0) {
    overlap[0] = kq * k_scale * q_scale;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Key and query read the old state.
const float decay = G == 2 ? metal::exp(static_cast<float>(gate_[G - 1])) : 1.0f;
float M[ROWS][COLS];
float recalled[COLS] = {0.0f};
float answer[COLS] = {0.0f};
for (int r = 0; r < ROWS; r++) {
  for (int c = 0; active && c < COLS; c++) {
    M[r][c] = decay * state_[r * D + c];
    recalled[c] += M[r][c] * key[simd_gid * ROWS + r];
    answer[c] += M[r][c] * query[simd_gid * ROWS + r];
  }
}
for (int c = 0; active && c < COLS; c++) {
  parts[simd_gid * 2 * D + simd_lid * COLS + c] = recalled[c];
  parts[simd_gid * 2 * D + D + simd_lid * COLS + c] = answer[c];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (tid < D) {
  float old = 0.0f, out = 0.0f;
  for (int s = 0; s < SG; s++) {
    old += parts[s * 2 * D + tid];
    out += parts[s * 2 * D + D + tid];
  }
  change[tid] = static_cast<float>(gate_[0]) * (static_cast<float>(v_[tid]) - old);
  read[tid] = out + overlap[0] * change[tid];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Write the state; norm, gate and project what was read.
float squares = 0.0f;
for (int c = 0; active && c < COLS; c++) {
  squares += read[simd_lid * COLS + c] * read[simd_lid * COLS + c];
}
const float scale = metal::rsqrt(simd_sum(squares) / D + 1e-5f) * silu(static_cast<float>(z[n]));
float projected[COLS] = {0.0f};
for (int r = 0; r < ROWS; r++) {
  const int row = simd_gid * ROWS + r;
  const float y = read[row] * scale * static_cast<float>(norm[row]);
  for (int c = 0; active && c < COLS; c++) {
    new_state_[r * D + c] = M[r][c] + key[row] * change[simd_lid * COLS + c];
    projected[c] += y * static_cast<float>(projection_[r * D + c]);
  }
}
for (int c = 0; active && c < COLS; c++) {
  parts[simd_gid * D + simd_lid * COLS + c] = projected[c];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (tid < D) {
  float out = 0.0f;
  for (int s = 0; s < SG; s++) {
    out += parts[s * D + tid];
  }
  const float sum = merged<SPLITS, D>(local + n * SPLITS * D, stats + n * SPLITS * 2, tid);
  heads[n * D + tid] = static_cast<T>(sum + router[n] * out);
}
