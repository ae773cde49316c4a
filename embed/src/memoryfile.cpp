#include "memoryfile.h"

#include <unistd.h>

#include <cmath>
#include <cstring>
#include <ctime>
#include <set>

#include "error.h"
#include "ring.h"
#include "safetensors.h"
#include "sha256.h"

namespace ahn {

using Bytes = std::vector<uint8_t>;

static constexpr int BUFFERS = 3, LEAVING = 3, MEMORY = 6;  // in a layer's arrays

// Of an array that lies in one piece.
static const uint8_t* bytes_of(const mx::array& x) {
  return reinterpret_cast<const uint8_t*>(x.data<char>());
}

static mx::array whole(const mx::array& x) {
  auto y = mx::contiguous(x);
  mx::eval(y);
  return y;
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

static bool finite(const Bytes& data, const std::string& dtype) {
  if (dtype == "F32") {
    uint32_t x;
    for (size_t i = 0; i + 4 <= data.size(); i += 4) {
      std::memcpy(&x, &data[i], 4);
      if ((x & 0x7F800000) == 0x7F800000) return false;
    }
  } else if (dtype == "F16" || dtype == "BF16") {
    uint16_t x, mask = dtype == "F16" ? 0x7C00 : 0x7F80;
    for (size_t i = 0; i + 2 <= data.size(); i += 2) {
      std::memcpy(&x, &data[i], 2);
      if ((x & mask) == mask) return false;
    }
  }
  return true;
}

static std::string tuple(const std::vector<int64_t>& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); i++) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

// What the checksum is of: the facts, then the arrays by name.
class Checksum {
 public:
  explicit Checksum(const std::string& facts) { hash_.update(facts.data(), facts.size()); }
  void add(const std::string& name, const TensorInfo& info, const Bytes& data) {
    static const std::map<std::string, std::string> names = {
        {"F32", "float32"}, {"F16", "float16"}, {"BF16", "bfloat16"}, {"U32", "uint32"}};
    std::string text = name + " mlx.core." + names.at(info.dtype) + " " + tuple(info.shape);
    hash_.update(text.data(), text.size());
    hash_.update(data.data(), data.size());
  }
  std::string hex() { return hash_.hex(); }

 private:
  Sha256 hash_;
};

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
    size_t dot = name.find('.', 7);
    loader.put(std::stoll(name.substr(7, dot - 7)), name.substr(dot + 1), data);
  }
  auto said = file.metadata().find("sha256");
  if (said == file.metadata().end() || said->second != sum.hex()) {
    file.broken("its checksum does not fit");
  }
  loader.finish();
  for (int32_t id : tail) {
    if (id < 0 || id >= manifest.vocabulary) file.broken("a token in its tail is not the model's");
  }
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

// Saving

namespace {

// The arrays of a file, each made when it is wanted, so that memory holds one.
class Saver {
 public:
  Saver(const Model& model, const Memory& memory) : m_(model.manifest()), memory_(memory) {
    int64_t N = memory.state.at, n = static_cast<int64_t>(memory.tail.size());
    before_ = N - n;
    wanted_ = expected_arrays(m_, N, n, true);
    if (n > 0) wanted_["tail"] = {"U32", {n}, 0, 0};
    for (auto& [name, info] : wanted_) {
      if (info.shape.back() < 0) info.shape.back() = static_cast<int64_t>(trace(name).size() / 2);
    }
  }

  const std::map<std::string, TensorInfo>& wanted() const { return wanted_; }

  Bytes bytes(const std::string& name) {
    if (name == "tail") return numbers(memory_.tail);
    size_t dot = name.find('.', 7);
    int64_t layer = std::stoll(name.substr(7, dot - 7));
    std::string rest = name.substr(dot + 1);
    if (rest.find("trace.") != std::string::npos) return numbers(trace(name));
    bool after = rest.rfind("tail.", 0) == 0 || memory_.tail.empty();
    if (rest == "memory" || rest == "tail.memory") {
      auto x = whole(after ? array(layer, MEMORY) : memory_.past.memory[layer]);
      return Bytes(bytes_of(x), bytes_of(x) + x.nbytes());
    }
    int j = rest.back() - '0';
    return rest.size() == 1 ? held(layer, j) : changed(layer, j);
  }

 private:
  const mx::array& array(int64_t layer, int j) const {
    return memory_.state.arrays[layer * State::PER_LAYER + j];
  }

  template <typename T>
  static Bytes numbers(const std::vector<T>& x) {
    auto from = reinterpret_cast<const uint8_t*>(x.data());
    return Bytes(from, from + x.size() * sizeof(T));
  }

  std::vector<float> trace(const std::string& name) const {
    size_t dot = name.find('.', 7);
    bool after = name.find(".tail.") != std::string::npos;
    const auto& all = after ? memory_.traces_after : memory_.traces;
    bool first = name.back() == '0';
    if (all.empty()) return std::vector<float>(first ? 0 : 3 * m_.heads);
    const Trace& found = all[std::stoll(name.substr(7, dot - 7))];
    return first ? found.strengths : found.heads;
  }

  // A buffer before the tail.
  Bytes held(int64_t layer, int j) {
    auto from = whole(array(layer, j));
    size_t width = from.shape(3) * from.itemsize(), heads = from.shape(1), slots = from.shape(2);
    size_t kept = static_cast<size_t>(grown_to(before_, m_.capacity()));
    Bytes out(heads * kept * width);
    for (size_t h = 0; h < heads; h++) {
      std::memcpy(&out[h * kept * width], bytes_of(from) + h * slots * width, kept * width);
    }
    if (memory_.tail.empty()) return out;
    auto was = whole(memory_.past.contents[BUFFERS * layer + j]);
    size_t n = memory_.past.slots.size();
    for (size_t h = 0; h < heads; h++) {
      for (size_t i = 0; i < n; i++) {
        size_t slot = memory_.past.slots[i];
        if (slot >= kept) continue;
        std::memcpy(&out[(h * kept + slot) * width], bytes_of(was) + (h * n + i) * width, width);
      }
    }
    return out;
  }

  // What a buffer has of the tail.
  Bytes changed(int64_t layer, int j) {
    auto from = whole(array(layer, j));
    size_t width = from.shape(3) * from.itemsize(), heads = from.shape(1), slots = from.shape(2);
    size_t n = memory_.past.slots.size();
    Bytes out(heads * n * width);
    for (size_t h = 0; h < heads; h++) {
      for (size_t i = 0; i < n; i++) {
        size_t slot = memory_.past.slots[i];
        std::memcpy(&out[(h * n + i) * width], bytes_of(from) + (h * slots + slot) * width, width);
      }
    }
    return out;
  }

  const Manifest& m_;
  const Memory& memory_;
  int64_t before_;
  std::map<std::string, TensorInfo> wanted_;
};

Json facts_of(const Model& model, const Memory& memory) {
  const Manifest& m = model.manifest();
  int64_t N = memory.state.at, B = N - static_cast<int64_t>(memory.tail.size());
  Json layer = std::vector<Json>{B, m.window, m.sinks, Json(), 64};
  std::map<std::string, Json> facts = m.identity.as_object();
  facts["version"] = 2;
  facts["tokens"] = N;
  facts["window"] = m.window;
  facts["sinks"] = m.sinks;
  facts["step"] = memory.step;
  facts["turn"] = memory.turn;
  facts["chat"] = memory.chat;
  facts["system"] = memory.system;
  facts["preview"] = memory.preview;
  facts["saved"] = static_cast<int64_t>(std::time(nullptr));
  facts["layers"] = std::vector<Json>(m.layers, layer);
  facts["texts"] = memory.texts;
  if (memory.earlier) facts["earlier"] = memory.earlier;
  if (!memory.space.empty()) facts["space"] = memory.space;
  return facts;
}

// Nothing is replaced but a memory, be it damaged or of another version.
void check_replaced(const std::string& path) {
  if (::access(path.c_str(), F_OK) != 0) return;
  std::string start(1 << 20, '\0');
  FILE* file = std::fopen(path.c_str(), "rb");
  start.resize(file ? std::fread(start.data(), 1, start.size(), file) : 0);
  if (file) std::fclose(file);
  bool ours = start.find("\"__metadata__\"") != start.npos && start.find("\"ahn\"") != start.npos;
  if (ours && ::access(path.c_str(), W_OK) == 0) return;
  throw Error(AHN_NOT_WRITTEN, path + ": is there and is not a memory that can be replaced"
                                      "; choose another name");
}

}  // namespace

void save_memory(const Model& model, const Memory& memory, const std::string& path) {
  check_replaced(path);
  Saver saver(model, memory);
  std::string facts = facts_of(model, memory).dump();
  Checksum sum(facts);
  for (const auto& [name, info] : saver.wanted()) {
    Bytes data = saver.bytes(name);
    if (!finite(data, info.dtype)) {
      throw Error(AHN_BROKEN, path + ": not written, array " + name + " holds NaN or infinity"
                                     "; load or make another session");
    }
    sum.add(name, info, data);
  }
  // Wide numbers first, so that each array is aligned.
  std::vector<std::pair<std::string, TensorInfo>> order(saver.wanted().begin(),
                                                        saver.wanted().end());
  std::stable_sort(order.begin(), order.end(), [](auto& a, auto& b) {
    return item_size(a.second.dtype) > item_size(b.second.dtype);
  });
  std::string header =
      make_header(order, {{"format", "mlx"}, {"ahn", facts}, {"sha256", sum.hex()}});
  OutFile out(path);
  out.write(header.data(), header.size());
  for (const auto& [name, info] : order) {
    Bytes data = saver.bytes(name);
    out.write(data.data(), data.size());
  }
  out.finish();
}

}  // namespace ahn
