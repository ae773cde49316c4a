// Puts together what window_decode.metal found in each share of the window.
//
// parts: [B, H, SPLITS, D] float32, stats: [B, H, SPLITS, 2] float32 (largest score, sum
// of weights). heads: [B, H, 1, D].
//
// grid (D, B H, 1), threadgroup (D, 1, 1): one thread per column.
// Reads SPLITS (D + 2) floats per head.

const int d = thread_position_in_grid.x;
const int n = thread_position_in_grid.y;

const float out = merged<SPLITS, D>(parts + n * SPLITS * D, stats + n * SPLITS * 2, d);
heads[n * D + d] = static_cast<T>(out);
