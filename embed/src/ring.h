// Tokens in slots: sinks stay, later tokens share a ring.
#pragma once

#include <cstdint>
#include <vector>

namespace ahn {

// The slot of a token, while it is there.
inline int64_t slot_of(int64_t token, int64_t window, int64_t sinks) {
  return token < sinks ? token : sinks + (token - sinks) % window;
}

// Slots of those of the tokens first ... end - 1 that stay until the last of them, in their order.
inline std::vector<int32_t> slots_that_stay(int64_t first, int64_t end, int64_t window,
                                            int64_t sinks) {
  std::vector<int32_t> slots;
  for (int64_t t = first; t < end; t++) {
    if (t < sinks || t >= end - window) {
      slots.push_back(static_cast<int32_t>(slot_of(t, window, sinks)));
    }
  }
  return slots;
}

// Slots that a memory file has of so many tokens.
inline int64_t grown_to(int64_t tokens, int64_t capacity) {
  int64_t held = tokens < capacity ? tokens : capacity;
  int64_t grown = (held + 255) / 256 * 256;
  return grown < capacity ? grown : capacity;
}

}  // namespace ahn
