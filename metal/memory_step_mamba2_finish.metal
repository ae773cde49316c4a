// Finishes what memory_step_mamba2.metal began: the norm's factor, known only when all heads are
// done, and the sum with the head's local output.
//
// projected: [B, H, 1, D] float32, squares: [B, H, 1, 1] float32. router: [B, H]. The local
// output is attention in shares (common.h): local [B, H, SPLITS, D], stats [B, H, SPLITS, 2].
// heads: [B, H, 1, D].
//
// grid (D, B H, 1), threadgroup (D, 1, 1): one thread per column.
// Reads SPLITS (D + 2) + D + H floats per head.

const int d = thread_position_in_grid.x;
const int n = thread_position_in_grid.y;

float sum = 0.0f;
for (int h = 0; h < H; h++) {
  sum += squares[n / H * H + h];
}
const float scale = metal::rsqrt(sum / (H * D) + 1e-5f) * router[n];
const float out = merged<SPLITS, D>(local + n * SPLITS * D, stats + n * SPLITS * 2, d);
heads[n * D + d] = static_cast<T>(out + projected[n * D + d] * scale);
