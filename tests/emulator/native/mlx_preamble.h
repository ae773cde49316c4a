// The names that MLX's own preamble gives to every custom kernel.
#pragma once

typedef half float16_t;
typedef bfloat bfloat16_t;

#define MLX_MTL_CONST static constant constexpr const
#define MLX_MTL_PRAGMA_UNROLL _Pragma("GCC unroll 16")

template <class T> struct Limits {
  static constexpr T max = metal::numeric_limits<T>::max();
  static constexpr T min = metal::numeric_limits<T>::lowest();
  static constexpr T finite_max = metal::numeric_limits<T>::max();
  static constexpr T finite_min = metal::numeric_limits<T>::lowest();
};
template <class T> struct FloatLimits {
  static constexpr T max = metal::numeric_limits<T>::infinity();
  static constexpr T min = T(-metal::numeric_limits<T>::infinity());
  static constexpr T finite_max = metal::numeric_limits<T>::max();
  static constexpr T finite_min = metal::numeric_limits<T>::lowest();
};
template <> struct Limits<float> : FloatLimits<float> {};
template <> struct Limits<half> : FloatLimits<half> {};
template <> struct Limits<bfloat> : FloatLimits<bfloat> {};

template <typename I = int64_t>
METAL_FUNC I elem_to_loc(I elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  I at = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    at += (elem % shape[i]) * I(strides[i]);
    elem /= shape[i];
  }
  return at;
}

template <typename T, typename U> METAL_FUNC T ceildiv(T n, U m) { return (n + m - 1) / m; }

METAL_FUNC float log1p(float x) {
  float y = 1.0f + x;
  if (y == Limits<float>::max) return y;
  return y == 1.0f ? x : x * (metal::log(y) / (y - 1.0f));
}
