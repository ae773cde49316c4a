// What manifest.json says of a model. No array library is needed here.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace ahn {

// Scaffolding and content by turns; what stands for the system message has no text.
using Parts = std::vector<std::optional<std::string>>;

// A chat template, taken apart.
struct Template {
  Parts start, answer;
  std::optional<Parts> between;
  std::string why;  // there is no `between`
  std::string end;  // which the model says by itself
  bool trims_left = false, trims_right = false;
  bool strips_system = false;
};

struct Manifest {
  // Throws Error, naming the file, if it is not one or of another version.
  static Manifest parse(const std::string& path, std::string_view text);

  std::string name, mlx, device, dtype;
  int64_t window, sinks, vocabulary, layers, heads, kv_heads, head_dim, gates;
  std::vector<int64_t> lengths;  // ascending, from 1
  std::vector<int32_t> begin, ends;
  std::map<std::string, std::string> files;  // name -> SHA-256, of the weights: of their header
  int64_t weights;                           // Adler-32 of what follows that header
  std::optional<Template> plain, system;
  Json identity;

  int64_t capacity() const { return window + sinks; }
  int64_t chunk() const { return lengths.back(); }
};

}  // namespace ahn
