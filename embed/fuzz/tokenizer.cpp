// tokenizer.bin, and then a text through whatever it was: after a first byte 0 the rest is such a
// file, else a text for the tokenizer that AHN_FUZZ_TOKENIZER names.
#include <fstream>
#include <iterator>
#include <memory>

#include "fuzz.h"
#include "tokenizer.h"

static void use(const ahn::Tokenizer& tokenizer, std::string_view text) {
  auto ids = tokenizer.encode({"<|im_start|>", text, "<|im_end|>"});
  ahn::Stream stream(tokenizer);
  std::string said;
  for (int32_t id : ids) said += stream.add(id);
  said += stream.end();
  if (tokenizer.decode(ids).size() < said.size()) std::abort();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::unique_ptr<ahn::Tokenizer> given = [] {
    std::ifstream in(std::getenv("AHN_FUZZ_TOKENIZER"), std::ios::binary);
    std::vector<uint8_t> file{std::istreambuf_iterator<char>(in), {}};
    return std::make_unique<ahn::Tokenizer>(file);
  }();
  if (size == 0) return 0;
  return guarded([&] {
    if (data[0] == 0) {
      ahn::Tokenizer tokenizer({data + 1, data + size});
      use(tokenizer, "It's  caf\u00e9 12345 \u1100\u1161\u0323\u0301 x\r\n\n\u00c5");
    } else {
      use(*given, {reinterpret_cast<const char*>(data + 1), size - 1});
    }
  });
}
