#include "tokenizer.h"

#include <algorithm>
#include <cstring>
#include <queue>

#include "error.h"
#include "text.h"

namespace ahn {

static constexpr uint32_t NONE = 0xFFFFFFFF;
static constexpr char MAGIC[] = "AHNTOK1\n";
static constexpr size_t SECTIONS = 13, HEAD = 24;

[[noreturn]] static void damaged(const char* what) {
  throw Error(AHN_DAMAGED, std::string("tokenizer.bin is damaged, ") + what + "; export it again");
}

// Opening

Tokenizer::Tokenizer(std::vector<uint8_t> file) : file_(std::move(file)) {
  if (file_.size() < HEAD || std::memcmp(file_.data(), MAGIC, 8) != 0) damaged("it is none");
  auto number = [&](size_t at) {
    uint32_t x;
    std::memcpy(&x, file_.data() + at, 4);
    return x;
  };
  uint32_t flags = number(8);
  size_ = number(12);
  if (number(16) != SECTIONS || size_ == 0 || size_ > 1u << 24 || (flags & 0xFF) > 2 ||
      flags >> 11) {
    damaged("its head is wrong");
  }
  splitter_ = flags & 0xFF;
  digits_ = flags >> 8 & 1;
  whole_ = flags >> 9 & 1;
  nfc_ = flags >> 10 & 1;
  std::string_view sections[SECTIONS];
  size_t at = HEAD;
  for (auto& section : sections) {
    if (file_.size() - at < 8) damaged("it ends too early");
    uint64_t n;
    std::memcpy(&n, file_.data() + at, 8);
    at += 8;
    if (n > file_.size() - at) damaged("it ends too early");
    section = {reinterpret_cast<const char*>(file_.data()) + at, static_cast<size_t>(n)};
    at += n + (8 - n % 8) % 8;
    if (at > file_.size()) damaged("it ends too early");
  }
  auto numbers = [&](int i, size_t by) {
    if (sections[i].size() % (4 * by)) damaged("a table is cut");
    return Span{reinterpret_cast<const uint32_t*>(sections[i].data()), sections[i].size() / 4};
  };
  offsets_ = numbers(0, 1);
  texts_ = sections[1];
  bytes_ = numbers(2, 1);
  merges_ = numbers(3, 4);
  listed_ = numbers(4, 1);
  if (offsets_.size != size_ + 1 || bytes_.size != 256) damaged("a table is cut");
  for (size_t i = 0; i < size_; i++) {
    if (offsets_[i] > offsets_[i + 1]) damaged("its words overlap");
  }
  if (offsets_[0] != 0 || offsets_[size_] != texts_.size()) damaged("its words are cut");
  for (size_t i = 0; i < 256; i++) {
    if (bytes_[i] != NONE && bytes_[i] >= size_) damaged("a byte is no word");
  }
  for (size_t i = 0; i < merges_.size; i++) {
    if (i % 4 != 2 && merges_[i] >= size_) damaged("a merge is of no words");
  }
  for (size_t i = 0; i < listed_.size; i++) {
    if (listed_[i] >= size_) damaged("a word is not there");
  }
  Span added = numbers(5, 2);
  for (size_t i = 0; i < added.size; i += 2) {
    if (added[i] >= size_ || bytes(added[i]).empty()) damaged("a token is not there");
    added_.push_back({bytes(added[i]), static_cast<int32_t>(added[i]), added[i + 1] != 0});
  }
  for (int i = 0; i < 4; i++) {
    Span ranges = numbers(6 + i, 2);
    // They rise, so that no file of many ranges fills the table again and again.
    for (size_t j = 0; j < ranges.size; j++) {
      if (ranges[j] > 0x10FFFF || (j > 0 && ranges[j] < ranges[j - 1] + (j % 2 == 0))) {
        damaged("a range is wrong");
      }
    }
    if (ranges.size) classes_.resize(std::max<size_t>(classes_.size(), ranges[ranges.size - 1] + 1));
    for (size_t j = 0; j < ranges.size; j += 2) {
      for (uint32_t c = ranges[j]; c <= ranges[j + 1]; c++) classes_[c] |= 1 << i;
    }
  }
  marks_ = numbers(10, 2);
  Span parts = numbers(11, 1);
  pairs_ = numbers(12, 3);
  for (size_t i = 0; i < parts.size;) {
    if (parts.size - i < 3 || parts[i + 1] == 0 || parts[i + 1] > 64 ||
        parts[i + 1] > parts.size - i - 2) {
      damaged("a decomposition is cut");
    }
    for (uint32_t j = 0; j < parts[i + 1]; j++) {
      if (parts[i + 2 + j] > 0x10FFFF) damaged("a decomposition is of no characters");
    }
    parts_.push_back({parts[i], parts.data + i + 1});
    i += 2 + parts[i + 1];
  }
  std::sort(parts_.begin(), parts_.end(), [](auto& a, auto& b) { return a.first < b.first; });
  for (size_t i = 0; i < pairs_.size; i += 3) {
    if (pairs_[i + 2] > 0x10FFFF) damaged("a composition is no character");
  }
}

// Encoding

std::vector<int32_t> Tokenizer::encode(const std::vector<std::string_view>& pieces) const {
  std::vector<int32_t> out;
  std::string text;  // between control tokens, scaffolding and content are one
  for (size_t n = 0; n < pieces.size(); n++) {
    std::string_view piece = pieces[n];
    size_t bad = find_invalid(piece);
    if (bad != std::string_view::npos) {
      throw Error(AHN_BAD_TEXT, "the text is not UTF-8: byte " + std::to_string(bad) +
                                    " belongs to no character; convert it to UTF-8");
    }
    if (n % 2) {
      text += piece;
      continue;
    }
    for (size_t i = 0, from = 0; i <= piece.size();) {
      const Added* token = i < piece.size() ? added_at(piece.substr(i), true) : nullptr;
      if (i == piece.size()) text += piece.substr(from);
      if (!token) {
        i++;
        continue;
      }
      if (token->control) {
        text += piece.substr(from, i - from);
        split_added(text, out);
        text.clear();
        out.push_back(token->id);
        from = i + token->text.size();
      }
      i += token->text.size();
    }
  }
  split_added(text, out);
  return out;
}

// The longest added token that the text begins with.
const Tokenizer::Added* Tokenizer::added_at(std::string_view text, bool controls) const {
  const Added* best = nullptr;
  for (const Added& token : added_) {
    if (token.text[0] != text[0] || (token.control && !controls)) continue;
    bool longer = !best || token.text.size() > best->text.size();
    if (longer && text.substr(0, token.text.size()) == token.text) best = &token;
  }
  return best;
}

void Tokenizer::split_added(std::string_view text, std::vector<int32_t>& out) const {
  size_t from = 0;
  bool any = std::any_of(added_.begin(), added_.end(), [](auto& x) { return !x.control; });
  for (size_t i = 0; any && i < text.size();) {
    const Added* token = added_at(text.substr(i), false);
    if (!token) {
      i++;
      continue;
    }
    words(text.substr(from, i - from), out);
    out.push_back(token->id);
    from = i += token->text.size();
  }
  words(text.substr(from), out);
}

void Tokenizer::words(std::string_view text, std::vector<int32_t>& out) const {
  std::string other;
  if (nfc_) {
    other = compose(text);
    text = other;
  }
  std::vector<char32_t> characters;
  std::vector<size_t> starts;
  for (size_t i = 0; i < text.size();) {
    char32_t c;
    int n = decode_utf8(text.substr(i), c);
    characters.push_back(c);
    starts.push_back(i);
    i += n;
  }
  starts.push_back(text.size());
  split(characters, starts, text, out);
}

// Words of a text, each merged by itself. starts: where each character begins in bytes.
void Tokenizer::split(const std::vector<char32_t>& text, const std::vector<size_t>& starts,
                      std::string_view bytes, std::vector<int32_t>& out) const {
  for (size_t from = 0; from < text.size();) {
    size_t to = text.size();
    if (digits_) {  // each alone, and what is between them has an end of its own
      to = from;
      while (to < text.size() && !(class_of(text[to]) & digit)) to++;
      if (to == from) to++;
    }
    while (from < to) {
      const char32_t* rest = text.data() + from;
      size_t n = splitter_ == 0 ? gpt2(rest, to - from) : qwen(rest, to - from);
      merge(bytes.substr(starts[from], starts[from + n] - starts[from]), out);
      from += n;
    }
  }
}

size_t Tokenizer::run(const char32_t* text, size_t i, size_t n, bool (*fits)(uint8_t)) const {
  while (i < n && fits(class_of(text[i]))) i++;
  return i;
}

static bool is_letter(uint8_t c) { return c & 1; }
static bool is_number(uint8_t c) { return c & 2; }
static bool is_blank(uint8_t c) { return c & 4; }
static bool is_other(uint8_t c) { return !(c & 7); }

// Characters of 's|'t|'re|'ve|'m|'ll|'d, or 0.
static size_t contraction(const char32_t* text, size_t n, bool fold) {
  if (n < 2 || text[0] != '\'') return 0;
  auto lower = [&](size_t i) -> char32_t {
    char32_t c = i < n ? text[i] : 0;
    if (!fold) return c;
    if (c == 0x17F) return 's';  // the long s
    return c >= 'A' && c <= 'Z' ? c + 32 : c;
  };
  char32_t a = lower(1), b = lower(2);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// \s+(?!\S)|\s+ at a blank.
size_t Tokenizer::blank(const char32_t* text, size_t n) const {
  size_t end = run(text, 0, n, is_blank);
  return end < n && end > 1 ? end - 1 : std::max<size_t>(end, 1);
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t Tokenizer::gpt2(const char32_t* text, size_t n) const {
  if (size_t end = contraction(text, n, false)) return end;
  size_t i = text[0] == ' ' && n > 1 ? 1 : 0;
  uint8_t c = class_of(text[i]);
  for (auto fits : {is_letter, is_number, is_other}) {
    if (fits(c)) return run(text, i, n, fits);
  }
  return blank(text, n);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*
// |\s*[\r\n]+|\s+(?!\S)|\s+, where Qwen2 has \p{N}.
size_t Tokenizer::qwen(const char32_t* text, size_t n) const {
  if (size_t end = contraction(text, n, true)) return end;
  uint8_t c = class_of(text[0]);
  bool newline = text[0] == '\r' || text[0] == '\n';
  size_t i = is_letter(c) || is_number(c) || newline ? 0 : 1;
  if (i < n && is_letter(class_of(text[i]))) return run(text, i, n, is_letter);
  if (is_number(c)) return run(text, 0, std::min<size_t>(n, splitter_ == 1 ? 1 : 3), is_number);
  i = text[0] == ' ' && n > 1 ? 1 : 0;
  if (is_other(class_of(text[i]))) {
    i = run(text, i, n, is_other);
    while (i < n && (text[i] == '\r' || text[i] == '\n')) i++;
    return i;
  }
  size_t end = run(text, 0, n, is_blank), last = end;
  while (last > 0 && text[last - 1] != '\r' && text[last - 1] != '\n') last--;
  return last > 0 ? last : blank(text, n);
}

// Merges

const uint32_t* Tokenizer::find_merge(uint32_t left, uint32_t right) const {
  size_t low = 0, high = merges_.size / 4;
  while (low < high) {
    size_t mid = (low + high) / 2;
    const uint32_t* m = merges_.data + 4 * mid;
    if (m[0] == left && m[1] == right) return m;
    if (m[0] < left || (m[0] == left && m[1] < right)) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return nullptr;
}

int32_t Tokenizer::find_word(std::string_view word) const {
  auto first = listed_.data, last = listed_.data + listed_.size;
  auto found = std::lower_bound(first, last, word, [&](uint32_t id, std::string_view x) {
    return bytes(static_cast<int32_t>(id)) < x;
  });
  bool same = found != last && bytes(static_cast<int32_t>(*found)) == word;
  return same ? static_cast<int32_t>(*found) : -1;
}

void Tokenizer::merge(std::string_view word, std::vector<int32_t>& out) const {
  if (whole_) {
    int32_t id = find_word(word);
    if (id >= 0) {
      out.push_back(id);
      return;
    }
  }
  struct Symbol {
    uint32_t id;
    int32_t before, after;
  };
  struct Step {
    uint32_t rank;
    int32_t at;
    uint32_t left, right, made;
    bool operator<(const Step& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
  };
  std::vector<Symbol> symbols;
  for (unsigned char byte : word) {
    if (bytes_[byte] == NONE) continue;  // it vanishes
    int32_t i = static_cast<int32_t>(symbols.size());
    symbols.push_back({bytes_[byte], i - 1, i + 1});
  }
  if (symbols.empty()) return;
  symbols.back().after = -1;
  std::priority_queue<Step> steps;
  auto consider = [&](int32_t at) {
    if (at < 0 || symbols[at].after < 0) return;
    uint32_t left = symbols[at].id, right = symbols[symbols[at].after].id;
    if (auto m = find_merge(left, right)) steps.push({m[2], at, left, right, m[3]});
  };
  for (size_t i = 0; i < symbols.size(); i++) consider(static_cast<int32_t>(i));
  while (!steps.empty()) {
    Step step = steps.top();
    steps.pop();
    Symbol& left = symbols[step.at];
    if (left.id != step.left || left.after < 0 || symbols[left.after].id != step.right) continue;
    Symbol& right = symbols[left.after];
    left.id = step.made;
    right.id = NONE;
    left.after = right.after;
    if (left.after >= 0) symbols[left.after].before = step.at;
    consider(left.before);
    consider(step.at);
  }
  for (int32_t i = 0; i >= 0; i = symbols[i].after) {
    out.push_back(static_cast<int32_t>(symbols[i].id));
  }
}

// Decoding

std::string_view Tokenizer::bytes(int32_t id) const {
  if (id < 0 || id >= size()) return {};
  return texts_.substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids) const {
  std::string all;
  for (int32_t id : ids) all += bytes(id);
  size_t kept;
  return replace_invalid(all, true, kept);
}

std::string Stream::add(int32_t id) {
  waiting_ += tokenizer_.bytes(id);
  return take(false);
}

std::string Stream::end() { return take(true); }

std::string Stream::take(bool all) {
  size_t kept;
  std::string text = replace_invalid(waiting_, all, kept);
  waiting_.erase(0, waiting_.size() - kept);
  // An answer does not begin with the space that its first word brings along.
  if (!begun_ && !text.empty()) {
    begun_ = true;
    if (text[0] == ' ') text.erase(0, 1);
  }
  return text;
}

}  // namespace ahn
