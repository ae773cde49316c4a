// A memory on its way to a file.
#include "memoryfile.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <ctime>

#include "error.h"
#include "memorybytes.h"
#include "ring.h"

namespace ahn {

namespace {

// The arrays of a file, each made when it is wanted, so that memory holds one.
class Saver {
 public:
  Saver(const Model& model, const Memory& memory) : m_(model.manifest()), memory_(memory) {
    int64_t N = memory.state.at, n = static_cast<int64_t>(memory.tail.size());
    before_ = N - n;
    wanted_ = expected_arrays(m_, N, n, true);
    if (n > 0) wanted_["tail"] = {"U32", {n}, 0, 0};
    if (memory.seen) wanted_[SEEN] = seen_info(m_);
    for (auto& [name, info] : wanted_) {
      if (info.shape.back() < 0) info.shape.back() = static_cast<int64_t>(trace(name).size() / 2);
    }
  }

  const std::map<std::string, TensorInfo>& wanted() const { return wanted_; }

  Bytes bytes(const std::string& name) {
    if (name == "tail") return numbers(memory_.tail);
    if (name == SEEN) return *memory_.seen;
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
