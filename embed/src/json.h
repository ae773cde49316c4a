// JSON as this library's files have it: strict, of bounded depth, names unique, numbers whole or
// not at all.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace ahn {

class Json {
 public:
  enum Kind { null, boolean, whole, real, text, list, object };

  // Throws std::invalid_argument, saying what is wrong, for what is no JSON.
  static Json parse(std::string_view text);
  // As Python's json.dumps writes it with sort_keys and without ensure_ascii.
  std::string dump() const;

  // One that is not whole, or too large: kept as it is written, since none is ever asked for.
  static Json number(std::string digits) {
    Json made(std::move(digits));
    made.kind_ = real;
    return made;
  }

  Json() = default;
  Json(bool x) : kind_(boolean), whole_(x) {}
  Json(int64_t x) : kind_(whole), whole_(x) {}
  Json(int x) : Json(static_cast<int64_t>(x)) {}
  Json(std::string x) : kind_(text), text_(std::move(x)) {}
  Json(const char* x) : Json(std::string(x)) {}
  Json(std::vector<Json> x) : kind_(list), list_(std::move(x)) {}
  Json(std::map<std::string, Json> x) : kind_(object), object_(std::move(x)) {}

  Kind kind() const { return kind_; }
  bool is(Kind kind) const { return kind_ == kind; }
  bool as_bool() const { return expect(boolean).whole_ != 0; }
  int64_t as_whole() const { return expect(whole).whole_; }
  const std::string& digits() const { return expect(real).text_; }
  const std::string& as_text() const { return expect(text).text_; }
  const std::vector<Json>& as_list() const { return expect(list).list_; }
  const std::map<std::string, Json>& as_object() const { return expect(object).object_; }
  std::map<std::string, Json>& as_object() { return const_cast<Json&>(expect(object)).object_; }
  bool has(const std::string& name) const { return as_object().count(name) != 0; }
  // A member; throws std::invalid_argument if there is none, naming it.
  const Json& operator[](const std::string& name) const;
  // A whole number within bounds.
  int64_t whole_in(const std::string& name, int64_t low, int64_t high) const;

 private:
  const Json& expect(Kind kind) const;

  Kind kind_ = null;
  int64_t whole_ = 0;
  std::string text_;
  std::vector<Json> list_;
  std::map<std::string, Json> object_;
};

}  // namespace ahn
