#include "memoryfile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"
#include "memorybytes.h"
#include "ring.h"

namespace ahn {

void Memory::note(const int32_t* ids, size_t count) {
  if (!seen) return;
  for (size_t i = 0; i < count; i++) (*seen)[ids[i] / 8] |= 1 << ids[i] % 8;
}

// The tail, undone

static mx::array spread(const std::vector<int32_t>& slots, const mx::array& buffer) {
  int n = static_cast<int>(slots.size());
  mx::array at(slots.data(), {1, 1, n, 1}, mx::int32);
  return mx::broadcast_to(at, {1, buffer.shape(1), n, buffer.shape(3)});
}

Past before(const Model& model, const State& state, size_t n) {
  const Manifest& m = model.manifest();
  Past past;
  past.at = state.at;
  past.slots = slots_that_stay(state.at, state.at + static_cast<int64_t>(n), m.window, m.sinks);
  std::vector<mx::array> copies;
  for (size_t i = 0; i < state.arrays.size(); i += State::PER_LAYER) {
    for (int j = 0; j < BUFFERS; j++) {
      const mx::array& buffer = state.arrays[i + j];
      past.contents.push_back(mx::take_along_axis(buffer, spread(past.slots, buffer), 2));
      past.leaving.push_back(state.arrays[i + LEAVING + j]);
    }
    past.memory.push_back(state.arrays[i + MEMORY]);
  }
  mx::eval(past.contents);  // else the buffers could not be written in place
  return past;
}

void undo(const Model&, State& state, const Past& past) {
  for (size_t i = 0, layer = 0; i < state.arrays.size(); i += State::PER_LAYER, layer++) {
    for (int j = 0; j < BUFFERS; j++) {
      mx::array buffer = std::move(state.arrays[i + j]);
      auto at = spread(past.slots, buffer);
      state.arrays[i + j] =
          mx::put_along_axis(std::move(buffer), at, past.contents[BUFFERS * layer + j], 2);
      state.arrays[i + LEAVING + j] = past.leaving[BUFFERS * layer + j];
    }
    state.arrays[i + MEMORY] = past.memory[layer];
  }
  state.at = past.at;
  mx::eval(state.arrays);
}

// Loading

namespace {

// Puts the arrays of a file where they belong in a state.
class Loader {
 public:
  Loader(const Model& model, const Facts& facts, Memory& memory)
      : m_(model.manifest()), facts_(facts), memory_(memory) {
    changed_ = facts.version == 2 && facts.tail > 0;
    State& state = memory.state;
    state.at = changed_ ? facts.tokens : facts.before();
    for (const mx::array& x : model.empty().arrays) {
      mx::array y(mx::allocator::malloc(x.nbytes()), x.shape(), x.dtype());
      std::memset(y.data<char>(), 0, y.nbytes());
      state.arrays.push_back(std::move(y));
    }
    memory.traces.resize(m_.layers);
    memory.traces_after.resize(m_.layers);
    if (changed_) {
      memory.past.at = facts.before();
      memory.past.slots = slots_that_stay(facts.before(), facts.tokens, m_.window, m_.sinks);
    }
  }

  // layers.LAYER.REST
  void put(int64_t layer, const std::string& rest, const Bytes& data) {
    if (rest == "memory" || rest == "tail.memory") {
      (rest == "memory" ? memory_now_ : memory_after_)[layer] = data;
    } else if (rest.size() == 1) {
      rows(layer, rest[0] - '0', data);
    } else if (rest.rfind("trace.", 0) == 0) {
      trace(memory_.traces[layer], rest.back(), data);
    } else if (rest.rfind("tail.trace.", 0) == 0) {
      trace(memory_.traces_after[layer], rest.back(), data);
    } else {
      tail_[{layer, rest.back() - '0'}] = data;
    }
  }

  void finish() {
    State& state = memory_.state;
    for (int64_t layer = 0; layer < m_.layers; layer++) {
      for (int j = 0; j < BUFFERS; j++) leave(layer, j);
      mx::array& now = state.arrays[layer * State::PER_LAYER + MEMORY];
      auto fill = [&](mx::array& to, const std::map<int64_t, Bytes>& from) {
        auto found = from.find(layer);
        if (found != from.end()) std::memcpy(to.data<char>(), found->second.data(), to.nbytes());
      };
      if (changed_) {
        mx::array past(mx::allocator::malloc(now.nbytes()), now.shape(), now.dtype());
        std::memset(past.data<char>(), 0, past.nbytes());
        fill(past, memory_now_);
        memory_.past.memory.push_back(past);
        // What the tail has not changed is as before.
        fill(now, memory_after_.count(layer) ? memory_after_ : memory_now_);
        if (facts_.tokens <= m_.capacity()) memory_.traces_after[layer] = memory_.traces[layer];
      } else {
        fill(now, memory_now_);
        memory_.traces_after[layer] = memory_.traces[layer];
      }
    }
  }

 private:
  mx::array& buffer(int64_t layer, int j) {
    return memory_.state.arrays[layer * State::PER_LAYER + j];
  }
  static size_t row(const mx::array& x) { return x.shape(3) * x.itemsize(); }

  // The slots that a token has come to; the rest stay zero, whatever the file has there.
  void rows(int64_t layer, int j, const Bytes& data) {
    mx::array& to = buffer(layer, j);
    size_t width = row(to), heads = to.shape(1), slots = to.shape(2);
    size_t held = static_cast<size_t>(grown_to(facts_.before(), m_.capacity()));
    size_t used = static_cast<size_t>(std::min(facts_.before(), m_.capacity()));
    for (size_t h = 0; h < heads; h++) {
      std::memcpy(to.data<char>() + h * slots * width, data.data() + h * held * width, used * width);
    }
  }

  mx::array take(mx::array& from, const std::vector<int32_t>& at) {
    size_t width = row(from), heads = from.shape(1), slots = from.shape(2), n = at.size();
    mx::array out(mx::allocator::malloc(heads * n * width),
                  {1, from.shape(1), static_cast<int>(n), from.shape(3)}, from.dtype());
    for (size_t h = 0; h < heads; h++) {
      for (size_t i = 0; i < n; i++) {
        std::memcpy(out.data<char>() + (h * n + i) * width,
                    from.data<char>() + (h * slots + at[i]) * width, width);
      }
    }
    return out;
  }

  int32_t next(int64_t tokens) {
    return static_cast<int32_t>(slot_of(tokens, m_.window, m_.sinks));
  }

  // What the tail changed in one buffer, and what leaves next.
  void leave(int64_t layer, int j) {
    mx::array& to = buffer(layer, j);
    if (changed_) {
      memory_.past.contents.push_back(take(to, memory_.past.slots));
      memory_.past.leaving.push_back(take(to, {next(facts_.before())}));
      const Bytes& data = tail_.at({layer, j});
      size_t width = row(to), heads = to.shape(1), slots = to.shape(2);
      size_t n = memory_.past.slots.size();
      for (size_t h = 0; h < heads; h++) {
        for (size_t i = 0; i < n; i++) {
          std::memcpy(to.data<char>() + (h * slots + memory_.past.slots[i]) * width,
                      data.data() + (h * n + i) * width, width);
        }
      }
    }
    buffer(layer, LEAVING + j) = take(to, {next(memory_.state.at)});
  }

  static void trace(Trace& to, char which, const Bytes& data) {
    auto& numbers = which == '0' ? to.strengths : to.heads;
    numbers.resize(data.size() / 4);
    if (!data.empty()) std::memcpy(numbers.data(), data.data(), data.size());
  }

  const Manifest& m_;
  const Facts& facts_;
  Memory& memory_;
  bool changed_;
  std::map<int64_t, Bytes> memory_now_, memory_after_;
  std::map<std::pair<int64_t, int>, Bytes> tail_;
};

// Counts of other tokens than were written would be refused when they are read again.
void check_trace(const TensorFile& file, const Trace& trace, int64_t tokens, const Manifest& m) {
  size_t blocks = trace.strengths.size() / 2;
  double total = 0;
  bool right = true;
  for (size_t i = 0; i < blocks; i++) {
    float strength = trace.strengths[i], count = trace.strengths[blocks + i];
    right = right && strength >= 0 && count >= 0 && count <= 64 && count == std::round(count);
    total += count;
  }
  for (float x : trace.heads) right = right && x >= 0;
  int64_t written = std::max<int64_t>(0, tokens - m.capacity());
  int64_t most = (std::max<int64_t>(0, tokens - m.window) + 63) / 64;
  right = right && total <= static_cast<double>(written) && (blocks == 0 || total > 0);
  if (!right || static_cast<int64_t>(blocks) > most) {
    file.broken("a trace counts other tokens than were written");
  }
}

}  // namespace

static void check_arrays(const TensorFile& file, const Facts& facts, const Manifest& manifest) {
  auto wanted = expected_arrays(manifest, facts.tokens, facts.tail, facts.version == 2);
  if (facts.tail > 0 || facts.version == 1) wanted[facts.tail_name()] = {"U32", {facts.tail}, 0, 0};
  if (file.tensors().count(SEEN)) wanted[SEEN] = seen_info(manifest);
  for (const auto& [name, info] : file.tensors()) {
    auto found = wanted.find(name);
    if (found == wanted.end()) file.broken("array " + show(name) + " belongs to no memory like this");
    auto shape = found->second.shape;
    if (shape.back() < 0 && info.shape.size() == shape.size()) shape.back() = info.shape.back();
    if (shape != info.shape || info.dtype != found->second.dtype) {
      file.broken("array " + show(name) + " is " + info.dtype + " " + tuple(info.shape) + ", not " +
                  found->second.dtype + " " + tuple(shape));
    }
    wanted.erase(found);
  }
  if (!wanted.empty()) file.broken("array " + wanted.begin()->first + " is missing");
}

// As many bits as there are tokens, and then zeros; the tail was seen.
static void check_seen(const TensorFile& file, const Bytes& seen, int64_t vocabulary,
                       const std::vector<int32_t>& tail) {
  if (vocabulary % 8 && seen.back() >> vocabulary % 8) {
    file.broken("it has seen other tokens than the " + std::to_string(vocabulary) +
                " that there are");
  }
  for (int32_t id : tail) {
    if (!(seen[id / 8] >> id % 8 & 1)) file.broken("it has not seen the tokens of its tail");
  }
}

Memory load_memory(const Model& model, const std::string& path, std::vector<int32_t>& unread) {
  TensorFile file(path, "a memory", "read the text again");
  const Manifest& manifest = model.manifest();
  Facts facts(file, manifest);
  check_arrays(file, facts, manifest);
  Memory memory;
  Loader loader(model, facts, memory);
  Checksum sum(file.metadata().at("ahn"));
  std::vector<int32_t> tail;
  for (const auto& [name, info] : file.tensors()) {
    Bytes data(info.end - info.begin);
    file.read(info, data.data());
    if (!finite(data, info.dtype)) file.broken("array " + name + " holds NaN or infinity");
    sum.add(name, info, data);
    if (name == facts.tail_name()) {
      tail.resize(info.shape[0]);
      if (!data.empty()) std::memcpy(tail.data(), data.data(), data.size());
      continue;
    }
    if (name == SEEN) {
      memory.seen = std::move(data);
      continue;
    }
    size_t dot = name.find('.', 7);
    loader.put(std::stoll(name.substr(7, dot - 7)), name.substr(dot + 1), data);
  }
  auto said = file.metadata().find("sha256");
  if (said == file.metadata().end() || !is_sum(said->second, sum.hex())) {
    file.broken("its checksum does not fit");
  }
  loader.finish();
  for (int32_t id : tail) {
    if (id < 0 || id >= manifest.vocabulary) file.broken("a token in its tail is not the model's");
  }
  if (memory.seen) check_seen(file, *memory.seen, manifest.vocabulary, tail);
  for (int64_t i = 0; i < manifest.layers; i++) {
    check_trace(file, memory.traces[i], facts.before(), manifest);
    check_trace(file, memory.traces_after[i], memory.state.at, manifest);
  }
  (facts.version == 1 ? unread : memory.tail) = tail;
  const Json& all = facts.all;
  memory.step = facts.step;
  memory.turn = all["turn"].as_text();
  memory.chat = all["chat"].as_bool();
  memory.system = all["system"].as_text();
  memory.preview = all["preview"].as_text();
  if (all.has("space")) memory.space = all["space"].as_text();
  if (all.has("texts")) memory.texts = all["texts"].as_list();
  if (all.has("earlier")) memory.earlier = all["earlier"].as_whole();
  return memory;
}

}  // namespace ahn
