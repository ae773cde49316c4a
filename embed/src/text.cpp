#include "text.h"

#include "error.h"

namespace ahn {

int decode_utf8(std::string_view text, char32_t& c) {
  if (text.empty()) return 0;
  auto at = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  uint8_t first = at(0);
  if (first < 0x80) {
    c = first;
    return 1;
  }
  int n = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < static_cast<size_t>(n)) return 0;
  c = first & (0x7F >> n);
  for (int i = 1; i < n; i++) {
    if ((at(i) & 0xC0) != 0x80) return 0;
    c = c << 6 | (at(i) & 0x3F);
  }
  bool overlong = c < (n == 3 ? 0x800u : n == 4 ? 0x10000u : 0x80u);
  return overlong || (c >= 0xD800 && c < 0xE000) || c > 0x10FFFF ? 0 : n;
}

void append_utf8(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
    return;
  }
  int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
  out += static_cast<char>((0xF00 >> n & 0xFF) | c >> 6 * (n - 1));
  for (int i = n - 2; i >= 0; i--) out += static_cast<char>(0x80 | (c >> 6 * i & 0x3F));
}

size_t find_invalid(std::string_view text) {
  char32_t c;
  for (size_t i = 0; i < text.size();) {
    int n = decode_utf8(text.substr(i), c);
    if (n == 0) return i;
    i += n;
  }
  return std::string_view::npos;
}

// Bytes from the first on that could begin a character, at least 1.
static size_t prefix(std::string_view text) {
  auto at = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  uint8_t first = at(0);
  size_t n = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4) return 1;
  size_t i = 1;
  for (; i < n && i < text.size() && (at(i) & 0xC0) == 0x80; i++) {
    if (i == 1) {
      uint8_t low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
      uint8_t high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
      if (at(1) < low || at(1) > high) break;
    }
  }
  return i;
}

std::string replace_invalid(std::string_view text, bool all, size_t& kept) {
  std::string out;
  char32_t c;
  kept = 0;
  for (size_t i = 0; i < text.size();) {
    auto rest = text.substr(i);
    if (int n = decode_utf8(rest, c)) {
      out += rest.substr(0, n);
      i += n;
      continue;
    }
    size_t n = prefix(rest);
    uint8_t first = static_cast<uint8_t>(rest[0]);
    bool cut = n == rest.size() && first >= 0xC2 && first <= 0xF4;
    if (cut && !all) {
      kept = n;
      break;
    }
    out += "\xEF\xBF\xBD";
    i += n;
  }
  return out;
}

static bool is_space(char32_t c) {
  return (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

std::string_view strip_left(std::string_view text) {
  char32_t c;
  while (int n = decode_utf8(text, c)) {
    if (!is_space(c)) break;
    text.remove_prefix(n);
  }
  return text;
}

std::string_view strip_right(std::string_view text) {
  char32_t c;
  while (!text.empty()) {
    size_t i = text.size() - 1;
    while (i > 0 && (static_cast<uint8_t>(text[i]) & 0xC0) == 0x80) i--;
    if (!decode_utf8(text.substr(i), c) || !is_space(c)) break;
    text = text.substr(0, i);
  }
  return text;
}

std::string preview(std::string_view text, size_t characters) {
  std::string out;
  char32_t c;
  bool space = false;
  size_t looked = 0;
  for (size_t written = 0; written < characters && looked < 2 * characters; looked++) {
    int n = decode_utf8(text, c);
    if (n == 0) break;
    text.remove_prefix(n);
    if (is_space(c)) {
      space = !out.empty();
      continue;
    }
    if (c == 0) continue;
    if (space && ++written < characters) out += ' ';
    if (written >= characters) break;
    space = false;
    append_utf8(out, c);
    written++;
  }
  return out;
}

std::string show(const std::string& text) {
  std::string out = "'";
  size_t kept;
  for (unsigned char c : replace_invalid(text, true, kept)) {
    if (out.size() > 116) return out + "...";
    if (c < 0x20 || c == 0x7F) {
      out += '?';
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + "'";
}

}  // namespace ahn
