// What loading and saving of memory files share: bytes of arrays, and their checksum.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <mlx/mlx.h>

#include "safetensors.h"
#include "sha256.h"

namespace ahn {

namespace mx = mlx::core;

using Bytes = std::vector<uint8_t>;

inline constexpr int BUFFERS = 3, LEAVING = 3, MEMORY = 6;  // in a layer's arrays

// Of an array that lies in one piece.
inline const uint8_t* bytes_of(const mx::array& x) {
  return reinterpret_cast<const uint8_t*>(x.data<char>());
}

inline mx::array whole(const mx::array& x) {
  auto y = mx::contiguous(x);
  mx::eval(y);
  return y;
}

inline bool finite(const Bytes& data, const std::string& dtype) {
  if (dtype == "F32") {
    uint32_t x;
    for (size_t i = 0; i + 4 <= data.size(); i += 4) {
      std::memcpy(&x, &data[i], 4);
      if ((x & 0x7F800000) == 0x7F800000) return false;
    }
  } else if (dtype == "F16" || dtype == "BF16") {
    uint16_t x, mask = dtype == "F16" ? 0x7C00 : 0x7F80;
    for (size_t i = 0; i + 2 <= data.size(); i += 2) {
      std::memcpy(&x, &data[i], 2);
      if ((x & mask) == mask) return false;
    }
  }
  return true;
}

inline std::string tuple(const std::vector<int64_t>& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); i++) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

// What the checksum is of: the facts, then the arrays by name.
class Checksum {
 public:
  explicit Checksum(const std::string& facts) { hash_.update(facts.data(), facts.size()); }
  void add(const std::string& name, const TensorInfo& info, const Bytes& data) {
    static const std::map<std::string, std::string> names = {
        {"F32", "float32"}, {"F16", "float16"}, {"BF16", "bfloat16"}, {"U32", "uint32"},
        {"U8", "uint8"}};
    std::string text = name + " mlx.core." + names.at(info.dtype) + " " + tuple(info.shape);
    hash_.update(text.data(), text.size());
    hash_.update(data.data(), data.size());
  }
  std::string hex() { return hash_.hex(); }

 private:
  Sha256 hash_;
};

}  // namespace ahn
