// Byte-level BPE from the tables that ahn_mlx/apps/tokenizer.py packs. The file is used where it
// lies; whatever it says is checked when it is opened.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ahn {

class Tokenizer {
 public:
  // Throws Error if the bytes are not such a file.
  explicit Tokenizer(std::vector<uint8_t> file);

  // Ids of the pieces as one text. By turns they are scaffolding and content, and only
  // scaffolding has control tokens. Throws Error if a piece is not UTF-8.
  std::vector<int32_t> encode(const std::vector<std::string_view>& pieces) const;

  // Bytes of a token; nothing for one that is not there.
  std::string_view bytes(int32_t id) const;
  // The text of tokens, with U+FFFD for what is no character.
  std::string decode(const std::vector<int32_t>& ids) const;
  int32_t size() const { return static_cast<int32_t>(size_); }

 private:
  struct Span {
    const uint32_t* data = nullptr;
    size_t size = 0;
    uint32_t operator[](size_t i) const { return data[i]; }
  };
  struct Added {
    std::string_view text;
    int32_t id;
    bool control;
  };

  enum Class : uint8_t { letter = 1, number = 2, space = 4, digit = 8 };

  void check() const;
  uint8_t class_of(char32_t c) const { return c < classes_.size() ? classes_[c] : 0; }
  const Added* added_at(std::string_view text, bool controls) const;
  void split_added(std::string_view text, std::vector<int32_t>& out) const;
  void words(std::string_view text, std::vector<int32_t>& out) const;
  void split(const std::vector<char32_t>& text, const std::vector<size_t>& starts,
             std::string_view bytes, std::vector<int32_t>& out) const;
  size_t gpt2(const char32_t* text, size_t n) const;
  size_t qwen(const char32_t* text, size_t n) const;
  size_t run(const char32_t* text, size_t i, size_t n, bool (*fits)(uint8_t)) const;
  size_t blank(const char32_t* text, size_t n) const;
  void merge(std::string_view word, std::vector<int32_t>& out) const;
  const uint32_t* find_merge(uint32_t left, uint32_t right) const;
  int32_t find_word(std::string_view word) const;
  std::string compose(std::string_view text) const;
  const uint32_t* decomposition(char32_t c) const;
  uint32_t mark(char32_t c) const;
  char32_t composed(char32_t a, char32_t b) const;

  std::vector<uint8_t> file_;
  uint32_t size_ = 0;
  int splitter_ = 0;
  bool digits_ = false, whole_ = false, nfc_ = false;
  Span offsets_, bytes_, merges_, listed_, marks_, pairs_;
  std::string_view texts_;
  std::vector<Added> added_;
  std::vector<uint8_t> classes_;
  // Character and where its decomposition stands, sorted.
  std::vector<std::pair<char32_t, const uint32_t*>> parts_;
};

// Text of tokens that come one by one: never half a character.
class Stream {
 public:
  explicit Stream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  // What can be said with this token; the rest waits for the next.
  std::string add(int32_t id);
  std::string end();

 private:
  std::string take(bool all);

  const Tokenizer& tokenizer_;
  std::string waiting_;
  bool begun_ = false;
};

}  // namespace ahn
