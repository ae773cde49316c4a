// One decoded token of Mamba2: the token that leaves the window is written into the state
// and the query reads it; gated and weighted, that goes through the head's projection.
// The norm runs over all heads of a token, so its one factor cannot be known here: the
// kernel gives each head's sum of squares, and memory_step_mamba2_finish.metal finishes.
//
// q: [B, H, 1, D]. k, v: [B, HKV, slots, D] and gates: [B, H, slots, 1] (step size), of
// which slot[b] is read. state: [B, H, D, D], value by key. z: [B, 1, H] before silu.
// rates: [H], A < 0. norm: [H D]. projection: [H, D, D].
// projected: [B, H, 1, D] float32, squares: [B, H, 1, 1] float32.
//
// grid (32 SG, B H, 1), threadgroup (32 SG, 1, 1): one threadgroup per head. A simdgroup
// holds D / SG rows of the state in registers, a lane D / 32 columns of each (one, if D < 32).
// Reads the state once and writes it once (2 x 64 KB for D = 128), reads the projection
// once (64 KB in float32), and k, v, q, norm once: 2 KB.

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
auto state_ = state + n * D * D + simd_gid * ROWS * D + simd_lid * COLS;
auto projection_ = projection + h * D * D + simd_gid * ROWS * D + simd_lid * COLS;
auto new_state_ = new_state + n * D * D + simd_gid * ROWS * D + simd_lid * COLS;

threadgroup float key[D];
threadgroup float query[D];
threadgroup float gated[D];
threadgroup float parts[SG * D];
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
  const float k_scale = metal::rsqrt(simd_sum(kk) + 1e-24f);
  const float q_scale = metal::rsqrt(simd_sum(qq) + 1e-24f);
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

// Read the old state row by row, then write the row.
const float dt = static_cast<float>(gates[n * slots + slot[b]]);
const float decay = metal::exp(dt * rates[h]);
const float gate = silu(static_cast<float>(z[n]));
for (int r = 0; r < ROWS; r++) {
  const int row = simd_gid * ROWS + r;
  const float value = dt * static_cast<float>(v_[row]);
  float out = 0.0f;
  for (int c = 0; active && c < COLS; c++) {
    const float old = decay * state_[r * D + c];
    out += old * query[simd_lid * COLS + c];
    new_state_[r * D + c] = old + value * key[simd_lid * COLS + c];
  }
  out = simd_sum(out);
  if (simd_lid == 0) {
    gated[row] = (out + overlap[0] * value) * gate;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Project, and add up squares for the norm.
float part[COLS] = {0.0f};
for (int r = 0; r < ROWS; r++) {
  const int row = simd_gid * ROWS + r;
  const float y = gated[row] * static_cast<float>(norm[h * D + row]);
  for (int c = 0; active && c < COLS; c++) {
    part[c] += y * static_cast<float>(projection_[r * D + c]);
  }
}
for (int c = 0; active && c < COLS; c++) {
  parts[simd_gid * D + simd_lid * COLS + c] = part[c];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd_gid == 0) {
  float sum = 0.0f;
  for (int c = 0; active && c < COLS; c++) {
    sum += gated[simd_lid * COLS + c] * gated[simd_lid * COLS + c];
  }
  sum = simd_sum(sum);
  if (simd_lid == 0) {
    squares[n] = sum;
  }
}
if (tid < D) {
  float out = 0.0f;
  for (int s = 0; s < SG; s++) {
    out += parts[s * D + tid];
  }
  projected[n * D + tid] = out;
}
