// An answer as it comes: how a token is drawn, and what of the text may be said.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <mlx/mlx.h>

namespace ahn {

namespace mx = mlx::core;

using Piece = std::function<bool(std::string_view)>;

struct Sampling {
  size_t max_tokens = 256;
  float temperature = 0, top_p = 1;
  uint64_t seed = 0;
  std::vector<std::string> stops;
};

// Of logits [1, V] an id [1], int32. In the worker's thread.
mx::array sample(const mx::array& logits, const Sampling& sampling,
                 mx::random::KeySequence& keys);

// Text on its way to the caller, without what may turn out to be a stop.
class Spoken {
 public:
  Spoken(const std::vector<std::string>& stops, const Piece& piece)
      : stops_(stops), piece_(piece) {}

  // Whether it goes on.
  bool say(std::string_view text, bool last);

  bool stopped = false;

 private:
  size_t beginning() const;

  const std::vector<std::string>& stops_;
  const Piece& piece_;
  std::string held_;
};

}  // namespace ahn
