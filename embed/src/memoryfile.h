// What a model remembers of a text, in memory and as a file: docs/memory-format.md.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "facts.h"
#include "model.h"

namespace ahn {

// What the tail changed: slots as they were before it.
struct Past {
  int64_t at = 0;
  std::vector<int32_t> slots;
  std::vector<mx::array> contents;  // for each layer keys, values, gates [1, heads, slots, width]
  std::vector<mx::array> leaving;   // for each layer three of one slot
  std::vector<mx::array> memory;    // of each layer
};

// Of one layer, as the file has it; this library does not add to it.
struct Trace {
  std::vector<float> strengths, heads;  // [2, blocks], [3, H]
};

struct Memory {
  State state;                 // after the tail
  std::vector<int32_t> tail;   // tokens since the last full step
  Past past;                   // before the tail, if there is one
  std::vector<Trace> traces;   // empty, or of each layer, before the tail
  std::vector<Trace> traces_after;
  int64_t step = 512;
  std::string turn = "start", system, preview, space;
  bool chat = true;
  std::vector<Json> texts;
  int64_t earlier = 0;
  // For each token of the vocabulary a bit, if it is known which there were. The library does not
  // penalize them; it keeps count for programs that do.
  std::optional<std::vector<uint8_t>> seen;

  void note(const int32_t* ids, size_t count);
};

// All in the worker's thread.
Past before(const Model& model, const State& state, size_t n);
void undo(const Model& model, State& state, const Past& past);

// unread: tokens of a file of version 1 that are still to be read.
Memory load_memory(const Model& model, const std::string& file, std::vector<int32_t>& unread);
void save_memory(const Model& model, const Memory& memory, const std::string& file);

}  // namespace ahn
