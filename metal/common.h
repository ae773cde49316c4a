// Shared by all kernels: stands before each kernel's body.
#include <metal_stdlib>
using namespace metal;

inline float silu(float x) {
  return x / (1.0f + metal::exp(-x));
}
