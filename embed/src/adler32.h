// Adler-32 (RFC 1950): finds damage, not malice, at the speed at which a file is read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace ahn {

class Adler32 {
 public:
  void update(const void* data, size_t n) {
    auto p = static_cast<const uint8_t*>(data);
    while (n > 0) {
      size_t part = std::min<size_t>(n, 16 * 256);  // sums that 32 bits hold
      size_t i = 0;
      for (; i + 16 <= part; i += 16) {
        uint32_t sum = 0, weighted = 0;
        for (uint32_t j = 0; j < 16; j++) sum += p[i + j], weighted += (16 - j) * p[i + j];
        b_ += 16 * a_ + weighted;
        a_ += sum;
      }
      for (; i < part; i++) b_ += a_ += p[i];
      a_ %= 65521, b_ %= 65521;
      p += part, n -= part;
    }
  }
  int64_t value() const { return int64_t{b_} << 16 | a_; }

 private:
  uint32_t a_ = 1, b_ = 0;
};

}  // namespace ahn
