// Puts together what window_decode.metal found in each share of the window.
//
// parts: [B, H, SPLITS, D] float32, stats: [B, H, SPLITS, 2] float32 (largest score, sum
// of weights). heads: [B, H, 1, D].
//
// grid (D, B H, 1), threadgroup (D, 1, 1): one thread per column.
// Reads SPLITS (D + 2) floats per head.

const int d = thread_position_in_grid.x;
const int n = thread_position_in_grid.y;

float highest = -1e30f;
for (int s = 0; s < SPLITS; s++) {
  highest = max(highest, stats[(n * SPLITS + s) * 2]);
}
float total = 0.0f, out = 0.0f;
for (int s = 0; s < SPLITS; s++) {
  const int row = n * SPLITS + s;
  const float share = metal::exp(stats[row * 2] - highest);
  total += share * stats[row * 2 + 1];
  out += share * parts[row * D + d];
}
heads[n * D + d] = static_cast<T>(out / total);
