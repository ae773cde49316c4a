#include "facts.h"

#include <stdexcept>

#include "error.h"
#include "ring.h"

namespace ahn {

std::string stored_dtype(const Manifest& m) {
  return m.dtype == "float32" ? "F32" : m.dtype == "float16" ? "F16" : "BF16";
}

static void check_identity(const TensorFile& file, const Json& facts, const Manifest& manifest) {
  auto other = [&](const std::string& what) {
    throw Error(AHN_OTHER_MODEL, file.path() + ": of another model, " +
                                     show(facts["model"]["name"].as_text()) + " (" + what +
                                     " differ); use that model");
  };
  const Json& ours = manifest.identity["model"];
  for (const char* part : {"settings", "weights' shapes", "weights"}) {
    if (facts["model"][part].as_text() != ours[part].as_text()) other(part);
  }
  if (facts["tokenizer"].as_text() != manifest.identity["tokenizer"].as_text()) {
    throw Error(AHN_OTHER_MODEL, file.path() + ": of another tokenizer; use the model as it was");
  }
  for (auto [part, here] : {std::pair{"window", manifest.window}, {"sinks", manifest.sinks}}) {
    int64_t there = facts[part].as_whole();
    if (there == here) continue;
    throw Error(AHN_OTHER_MODEL, file.path() + ": has " + part + " " + std::to_string(there) +
                                     ", not " + std::to_string(here) +
                                     "; export the model with --" + part + " " +
                                     std::to_string(there));
  }
}

static void check_layers(const TensorFile& file, const Json& facts, const Manifest& m, int64_t B) {
  const auto& layers = facts["layers"].as_list();
  if (static_cast<int64_t>(layers.size()) != m.layers) {
    throw std::invalid_argument("its layers are not this model's");
  }
  for (const Json& layer : layers) {
    const auto& numbers = layer.as_list();
    if (numbers.size() == 5 && !numbers[3].is(Json::null)) {
      throw Error(AHN_OTHER_MODEL, file.path() + ": its window is quantized to " +
                                       numbers[3].dump() + " bits; digest the text without --kv-bits");
    }
    if (numbers.size() != 5 || numbers[0].as_whole() != B || numbers[1].as_whole() != m.window ||
        numbers[2].as_whole() != m.sinks) {
      throw std::invalid_argument("its layers are not this model's");
    }
  }
}

static void check_texts(const std::vector<Json>& texts) {
  if (texts.size() > MOST_TEXTS) throw std::invalid_argument("it lists too many texts");
  for (const Json& text : texts) {
    if (text["name"].as_text().size() > 4 * LONGEST_NAME) {
      throw std::invalid_argument("a text's name is too long");
    }
    text.whole_in("read", 0, int64_t{1} << 53);
    text.whole_in("tokens", 0, MOST_TOKENS);
  }
}

Facts::Facts(const TensorFile& file, const Manifest& manifest) {
  auto said = file.metadata().find("ahn");
  if (said == file.metadata().end() || said->second.size() > 1 << 24) {
    throw Error(AHN_DAMAGED, file.path() + ": is not a memory; ahn-mlx digest writes one");
  }
  try {
    all = Json::parse(said->second);
    version = all["version"].as_whole();
    if (version != 1 && version != 2) {
      throw Error(AHN_DAMAGED, file.path() + ": is of version " + std::to_string(version) +
                                   ", this library reads 2; update the app");
    }
    tokens = all.whole_in("tokens", 0, MOST_TOKENS);
    step = all.whole_in("step", 1, 1 << 16);
    check_identity(file, all, manifest);
    auto found = file.tensors().find(tail_name());
    bool there = found != file.tensors().end();
    if (there && (found->second.shape.size() != 1 || found->second.dtype != "U32")) {
      file.broken("its tail has a wrong shape");
    }
    tail = there ? found->second.shape[0] : 0;
    if (tail >= step || tail > tokens || (there && version == 2 && tail == 0)) {
      throw std::invalid_argument("its tail has " + std::to_string(tail) + " tokens");
    }
    check_layers(file, all, manifest, before());
    const std::string& turn = all["turn"].as_text();
    if (turn != "start" && turn != "read" && turn != "answered" && turn != "cut") {
      throw std::invalid_argument("its turn is " + show(turn));
    }
    bool chat = all["chat"].as_bool();
    const std::string& system = all["system"].as_text();
    if (system.size() > 4 * LONGEST_SYSTEM || (!system.empty() && !chat)) {
      throw std::invalid_argument("its system message is wrong");
    }
    all["preview"].as_text();
    if (all.has("earlier")) all.whole_in("earlier", 0, MOST_TOKENS);
    if (all.has("space") && all["space"].as_text().size() > 4 * LONGEST_SPACE) {
      throw std::invalid_argument("its space is too long");
    }
    if (all.has("texts")) check_texts(all["texts"].as_list());
  } catch (const std::invalid_argument& e) {
    file.broken(e.what());
  }
}

TensorInfo seen_info(const Manifest& m) { return {"U8", {(m.vocabulary + 7) / 8}, 0, 0}; }

std::map<std::string, TensorInfo> expected_arrays(const Manifest& m, int64_t tokens, int64_t tail,
                                                  bool with_changes) {
  int64_t B = tokens - tail, C = m.capacity();
  std::string dtype = stored_dtype(m);
  std::map<std::string, TensorInfo> wanted;
  auto want = [&](const std::string& name, const std::string& type, std::vector<int64_t> shape) {
    wanted[name] = {type, std::move(shape), 0, 0};
  };
  auto layer = [&](const std::string& name, int64_t slots, bool buffers, bool memory, bool trace) {
    if (buffers) {
      want(name + "0", dtype, {1, m.kv_heads, slots, m.head_dim});
      want(name + "1", dtype, {1, m.kv_heads, slots, m.head_dim});
      want(name + "2", dtype, {1, m.heads, slots, m.gates});
    }
    if (memory) want(name + "memory", "F32", {1, m.heads, m.head_dim, m.head_dim});
    if (trace) {
      want(name + "trace.0", "F32", {2, -1});
      want(name + "trace.1", "F32", {3, m.heads});
    }
  };
  bool changes = with_changes && tail > 0;
  auto stay = static_cast<int64_t>(slots_that_stay(B, tokens, m.window, m.sinks).size());
  for (int64_t i = 0; i < m.layers; i++) {
    std::string name = "layers." + std::to_string(i) + ".";
    layer(name, grown_to(B, C), B > 0, B > C, true);
    if (changes) layer(name + "tail.", stay, true, tokens > C, tokens > C);
  }
  return wanted;
}

}  // namespace ahn
