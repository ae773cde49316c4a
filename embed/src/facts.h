// What a memory file says of itself, and which arrays it must then have. No array library is
// needed here.
#pragma once

#include <map>
#include <string>

#include "json.h"
#include "manifest.h"
#include "safetensors.h"

namespace ahn {

constexpr int64_t MOST_TOKENS = int64_t{1} << 30;
constexpr size_t MOST_TEXTS = 100, LONGEST_NAME = 200, LONGEST_PREVIEW = 200;  // characters
constexpr size_t LONGEST_SYSTEM = 1 << 20, LONGEST_SPACE = 1 << 16;

struct Facts {
  // Throws Error, naming the file, for what is no memory, or of another model.
  Facts(const TensorFile& file, const Manifest& manifest);

  Json all;
  int64_t version, tokens, step, tail;
  int64_t before() const { return tokens - tail; }  // B, after the last full step
  std::string tail_name() const { return version == 1 ? "pending" : "tail"; }
};

// As a file of it names the dtype of keys and values.
std::string stored_dtype(const Manifest& manifest);
// Which tokens were read or said: an array that a file may lack.
inline const std::string SEEN = "seen";
TensorInfo seen_info(const Manifest& manifest);
// Name -> dtype and shape, but for the number of a trace's blocks, which is -1.
std::map<std::string, TensorInfo> expected_arrays(const Manifest& manifest, int64_t tokens,
                                                  int64_t tail, bool with_changes);

}  // namespace ahn
