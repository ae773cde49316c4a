// Shared by all kernels: stands before each kernel's body.
#include <metal_stdlib>
using namespace metal;

inline float silu(float x) {
  return x / (1.0f + metal::exp(-x));
}

// Column d of a head's attention, put together from its shares of the window: parts [SPLITS, D]
// are sums that are not divided, stats [SPLITS, 2] largest score and sum of weights.
template <int SPLITS, int D, typename Parts, typename Stats>
inline float merged(Parts parts, Stats stats, int d) {
  float highest = -1e30f;
  for (int s = 0; s < SPLITS; s++) {
    highest = max(highest, stats[s * 2]);
  }
  float total = 0.0f, out = 0.0f;
  for (int s = 0; s < SPLITS; s++) {
    const float share = metal::exp(stats[s * 2] - highest);
    total += share * stats[s * 2 + 1];
    out += share * static_cast<float>(parts[s * D + d]);
  }
  return out / total;
}
