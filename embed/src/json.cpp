#include "json.h"

#include <cstdio>
#include <stdexcept>

#include "error.h"
#include "text.h"

namespace ahn {

namespace {

constexpr int DEEPEST = 64;

[[noreturn]] void wrong(const std::string& what) { throw std::invalid_argument(what); }

struct Parser {
  std::string_view text;
  size_t at = 0;

  char peek() const { return at < text.size() ? text[at] : '\0'; }
  void blanks() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') at++;
  }
  bool take(std::string_view word) {
    if (text.substr(at, word.size()) != word) return false;
    at += word.size();
    return true;
  }
  void need(char c) {
    if (peek() != c) wrong("no JSON at byte " + std::to_string(at));
    at++;
  }

  Json value(int depth) {
    if (depth > DEEPEST) wrong("JSON too deep");
    blanks();
    Json made;
    switch (peek()) {
      case '{': made = object(depth); break;
      case '[': made = list(depth); break;
      case '"': made = string(); break;
      default:
        if (take("true")) {
          made = true;
        } else if (take("false")) {
          made = false;
        } else if (!take("null")) {
          made = number();
        }
    }
    blanks();
    return made;
  }

  Json object(int depth) {
    std::map<std::string, Json> members;
    need('{');
    blanks();
    if (peek() == '}') return at++, Json(std::move(members));
    while (true) {
      blanks();
      std::string name = string();
      blanks();
      need(':');
      Json member = value(depth + 1);
      if (!members.emplace(name, std::move(member)).second) wrong(show(name) + " appears twice");
      if (peek() != ',') break;
      at++;
    }
    need('}');
    return members;
  }

  Json list(int depth) {
    std::vector<Json> items;
    need('[');
    blanks();
    if (peek() == ']') return at++, Json(std::move(items));
    while (true) {
      items.push_back(value(depth + 1));
      if (peek() != ',') break;
      at++;
    }
    need(']');
    return items;
  }

  Json number() {
    size_t from = at;
    auto digits = [&] {
      size_t first = at;
      while (peek() >= '0' && peek() <= '9') at++;
      if (at == first) wrong("no JSON at byte " + std::to_string(at));
      return at - first;
    };
    bool minus = take("-");
    char first = peek();
    size_t n = digits();
    if (first == '0' && n > 1) wrong("a number begins with 0");
    bool real = false;
    if (take(".")) real = true, digits();
    if (peek() == 'e' || peek() == 'E') {
      at++, real = true;
      if (peek() == '+' || peek() == '-') at++;
      digits();
    }
    if (real || n > 18) return Json::number(std::string(text.substr(from, at - from)));
    int64_t x = 0;
    for (char c : text.substr(from + minus, n)) x = 10 * x + (c - '0');
    return minus ? -x : x;
  }

  unsigned hex() {
    unsigned x = 0;
    for (int i = 0; i < 4; i++, at++) {
      char c = peek();
      int digit = c >= '0' && c <= '9'   ? c - '0'
                  : c >= 'a' && c <= 'f' ? c - 'a' + 10
                  : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                         : -1;
      if (digit < 0) wrong("a bad escape");
      x = 16 * x + digit;
    }
    return x;
  }

  std::string string() {
    need('"');
    std::string out;
    while (peek() != '"') {
      if (at >= text.size()) wrong("a text does not end");
      unsigned char c = text[at++];
      if (c < 0x20) wrong("a text with a control character");
      if (c != '\\') {
        out += static_cast<char>(c);
        continue;
      }
      char escape = peek();
      at++;
      if (escape == 'u') {
        char32_t x = hex();
        if (x >= 0xD800 && x < 0xDC00 && take("\\u")) {
          unsigned low = hex();
          if (low < 0xDC00 || low > 0xDFFF) wrong("half a surrogate pair");
          x = 0x10000 + ((x - 0xD800) << 10) + (low - 0xDC00);
        }
        if (x >= 0xD800 && x < 0xE000) wrong("half a surrogate pair");
        append_utf8(out, x);
        continue;
      }
      constexpr std::string_view names = "\"\\/bfnrt", means = "\"\\/\b\f\n\r\t";
      size_t i = names.find(escape);
      if (i == names.npos || escape == '\0') wrong("a bad escape");
      out += means[i];
    }
    at++;
    if (find_invalid(out) != std::string::npos) wrong("a text that is not UTF-8");
    return out;
  }
};

void quote(std::string& out, const std::string& text) {
  out += '"';
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (size_t i = std::string_view("\b\f\n\r\t").find(c); i != std::string_view::npos) {
      out += '\\';
      out += "bfnrt"[i];
    } else if (c < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else {
      out += static_cast<char>(c);
    }
  }
  out += '"';
}

void write(std::string& out, const Json& x) {
  const char* comma = "";
  switch (x.kind()) {
    case Json::null: out += "null"; return;
    case Json::boolean: out += x.as_bool() ? "true" : "false"; return;
    case Json::whole: out += std::to_string(x.as_whole()); return;
    case Json::real: out += x.digits(); return;
    case Json::text: quote(out, x.as_text()); return;
    case Json::list:
      out += '[';
      for (const Json& item : x.as_list()) {
        out += comma;
        write(out, item);
        comma = ", ";
      }
      out += ']';
      return;
    case Json::object:
      out += '{';
      for (const auto& [name, member] : x.as_object()) {
        out += comma;
        quote(out, name);
        out += ": ";
        write(out, member);
        comma = ", ";
      }
      out += '}';
  }
}

}  // namespace

Json Json::parse(std::string_view text) {
  Parser parser{text};
  Json value = parser.value(0);
  if (parser.at != text.size()) wrong("more than one JSON value");
  return value;
}

std::string Json::dump() const {
  std::string out;
  write(out, *this);
  return out;
}

const Json& Json::expect(Kind kind) const {
  static const char* names[] = {"null", "true or false", "a whole number", "a number",
                                "a text", "a list", "an object"};
  if (kind_ != kind) wrong(std::string(names[kind_]) + " stands where " + names[kind] + " should");
  return *this;
}

const Json& Json::operator[](const std::string& name) const {
  auto found = as_object().find(name);
  if (found == object_.end()) wrong("it does not say its " + name);
  return found->second;
}

int64_t Json::whole_in(const std::string& name, int64_t low, int64_t high) const {
  const Json& found = (*this)[name];
  if (!found.is(whole) || found.whole_ < low || found.whole_ > high) {
    wrong("its " + name + " is " + found.dump().substr(0, 80));
  }
  return found.whole_;
}

}  // namespace ahn
