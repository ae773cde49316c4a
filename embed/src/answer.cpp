#include "answer.h"

#include <algorithm>
#include <limits>

namespace ahn {

mx::array sample(const mx::array& logits, const Sampling& s, mx::random::KeySequence& keys) {
  if (s.temperature == 0) return mx::astype(mx::argmax(logits, -1), mx::int32);
  mx::array x = mx::subtract(logits, mx::logsumexp(logits, true));
  if (s.top_p > 0 && s.top_p < 1) {
    // A token stays if those that are likelier have less than top_p of the mass.
    mx::array sorted = mx::sort(x, -1);
    mx::array p = mx::exp(mx::astype(sorted, mx::float32));
    mx::array above = mx::cumsum(p, -1, true, false);
    mx::array mass = mx::sum(p, -1, true);
    mx::array dropped = mx::sum(
        mx::greater_equal(above, mx::multiply(mx::array(s.top_p), mass)), -1, true);
    mx::array least = mx::take_along_axis(sorted, mx::astype(dropped, mx::int32), -1);
    mx::array never(-std::numeric_limits<float>::infinity(), x.dtype());
    x = mx::where(mx::less(x, least), never, x);
  }
  x = mx::multiply(x, mx::array(1.0f / s.temperature, x.dtype()));
  return mx::astype(mx::random::categorical(x, -1, keys.next()), mx::int32);
}

bool Spoken::say(std::string_view text, bool last) {
  held_ += text;
  size_t end = held_.size(), complete = std::string::npos;
  for (const std::string& stop : stops_) {
    size_t at = held_.find(stop);
    if (at == std::string::npos) continue;
    // The one that is complete first, as if it had been looked for at each character.
    if (at + stop.size() < complete || (at + stop.size() == complete && at < end)) {
      complete = at + stop.size();
      end = at;
    }
    stopped = true;
  }
  size_t out = stopped || last ? end : held_.size() - beginning();
  std::string ready = held_.substr(0, out);
  held_.erase(0, out);
  if (!ready.empty() && piece_ && !piece_(ready)) return false;
  return !stopped;
}

// Bytes at the end that begin a stop.
size_t Spoken::beginning() const {
  size_t longest = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; n--) {
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) longest = n;
    }
  }
  return longest;
}

}  // namespace ahn
