// Composition of characters and their marks (NFC), with the tables of the tokenizer's file.
#include <algorithm>

#include "text.h"
#include "tokenizer.h"

namespace ahn {

static constexpr uint32_t NONE = 0xFFFFFFFF;

const uint32_t* Tokenizer::decomposition(char32_t c) const {
  auto found = std::lower_bound(parts_.begin(), parts_.end(), c,
                                [](auto& part, char32_t x) { return part.first < x; });
  return found != parts_.end() && found->first == c ? found->second : nullptr;
}

uint32_t Tokenizer::mark(char32_t c) const {
  size_t low = 0, high = marks_.size / 2;
  while (low < high) {
    size_t mid = (low + high) / 2;
    if (marks_[2 * mid] == c) return marks_[2 * mid + 1];
    if (marks_[2 * mid] < c) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return 0;
}

static constexpr char32_t S = 0xAC00, L = 0x1100, V = 0x1161, T = 0x11A7;  // Hangul

char32_t Tokenizer::composed(char32_t a, char32_t b) const {
  if (a >= L && a < L + 19 && b >= V && b < V + 21) return S + ((a - L) * 21 + (b - V)) * 28;
  if (a >= S && a < S + 11172 && (a - S) % 28 == 0 && b > T && b < T + 28) return a + (b - T);
  size_t low = 0, high = pairs_.size / 3;
  while (low < high) {
    size_t mid = (low + high) / 2;
    const uint32_t* p = pairs_.data + 3 * mid;
    if (p[0] == a && p[1] == b) return p[2];
    if (p[0] < a || (p[0] == a && p[1] < b)) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return 0;
}

std::string Tokenizer::compose(std::string_view text) const {
  bool plain = std::all_of(text.begin(), text.end(), [](char c) { return (c & 0x80) == 0; });
  if (plain) return std::string(text);
  std::vector<std::pair<char32_t, uint32_t>> all;  // characters and their classes
  auto put = [&](char32_t c) { all.push_back({c, mark(c)}); };
  for (size_t i = 0; i < text.size();) {
    char32_t c;
    i += decode_utf8(text.substr(i), c);
    if (c >= S && c < S + 11172) {
      put(L + (c - S) / 588);
      put(V + (c - S) % 588 / 28);
      if ((c - S) % 28) put(T + (c - S) % 28);
    } else if (auto part = decomposition(c)) {
      for (uint32_t j = 0; j < part[0]; j++) put(part[1 + j]);
    } else {
      put(c);
    }
  }
  for (size_t i = 0; i < all.size();) {
    size_t end = i + 1;
    if (all[i].second) {
      while (end < all.size() && all[end].second) end++;
      std::stable_sort(all.begin() + i, all.begin() + end,
                       [](auto& a, auto& b) { return a.second < b.second; });
    }
    i = end;
  }
  size_t written = 0, starter = NONE;
  uint32_t last = 0;  // class of what was kept since the starter
  for (auto [c, kind] : all) {
    bool blocked = starter == NONE || (written - 1 > starter && last >= kind);
    char32_t one = blocked ? 0 : composed(all[starter].first, c);
    if (one) {
      all[starter].first = one;
      continue;
    }
    if (kind == 0) starter = written;
    last = kind;
    all[written++] = {c, kind};
  }
  std::string out;
  for (size_t i = 0; i < written; i++) append_utf8(out, all[i].first);
  return out;
}

}  // namespace ahn
