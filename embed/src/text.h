// UTF-8, and white space as Python knows it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ahn {

// Bytes of the first character, 1 to 4, and its code point; 0 if it is no UTF-8.
int decode_utf8(std::string_view text, char32_t& c);
void append_utf8(std::string& out, char32_t c);
// Where the first byte is that belongs to no character; npos if all do.
size_t find_invalid(std::string_view text);
// The text, with U+FFFD for each part that is no UTF-8, as Python's decoder replaces them.
// kept: bytes at the end that begin a character, which are left out unless `all`.
std::string replace_invalid(std::string_view text, bool all, size_t& kept);

// Without white space at its begin, or its end; views of the text.
std::string_view strip_left(std::string_view text);
std::string_view strip_right(std::string_view text);
// Words with one space between them; at most so many characters.
std::string preview(std::string_view text, size_t characters);

}  // namespace ahn
