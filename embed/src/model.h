// A model that is open: its step, its weights, its tokenizer. All but the constructor's checks
// happens in the worker's thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <mlx/mlx.h>

#include "manifest.h"
#include "tokenizer.h"

namespace ahn {

namespace mx = mlx::core;

// What a model has read: for each layer keys, values [1, Hkv, S + W, D], gates [1, H, S + W, G],
// one slot of each, which leaves next, and the memory [1, H, D, D] float32.
struct State {
  static constexpr int PER_LAYER = 7;

  std::vector<mx::array> arrays;
  int64_t at = 0;  // tokens
};

class Model {
 public:
  // Throws Error for a directory that is not one, or not for this machine and MLX.
  explicit Model(const std::string& directory);
  ~Model();

  const Manifest& manifest() const { return manifest_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  mx::Dtype dtype() const { return dtype_; }
  State empty() const;
  // Read ids, all of them; logits [1, V] after the last. The state given is consumed, so that
  // its buffers are written in place.
  mx::array read(State& state, const int32_t* ids, size_t count) const;
  // One token that need not be known yet, int32 [1]; nothing is evaluated.
  mx::array step(State& state, const mx::array& id) const;
  // Raises AHN_BAD_ARGUMENT for a token that the model does not have.
  void check(const int32_t* ids, size_t count) const;

 private:
  struct Functions;

  void load();
  void check_shapes(int64_t n) const;
  void compare();
  mx::array call(State& state, mx::array ids, int64_t n) const;

  std::string directory_;
  Manifest manifest_;
  std::unique_ptr<Tokenizer> tokenizer_;
  mx::Dtype dtype_ = mx::float32;
  std::unique_ptr<Functions> functions_;
};

mx::Dtype dtype_of(const std::string& name);
// As safetensors names it.
std::string stored(mx::Dtype dtype);

}  // namespace ahn
