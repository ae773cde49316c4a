#include "manifest.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "error.h"
#include "safetensors.h"
#include "sha256.h"

namespace ahn {

static constexpr int64_t VERSION = 2;
static const char* const NEEDED[] = {"model.mlxfn", "weights.safetensors", "tokenizer.bin"};

static Parts parts(const Json& list) {
  Parts out;
  for (const Json& x : list.as_list()) {
    bool content = out.size() % 2;
    if (content != x.is(Json::null)) throw std::invalid_argument("its template is not by turns");
    out.push_back(content ? std::nullopt : std::optional(x.as_text()));
  }
  if (out.size() % 2 == 0) throw std::invalid_argument("its template is not by turns");
  return out;
}

static std::optional<Template> one_template(const Json& facts) {
  if (facts.is(Json::null)) return std::nullopt;
  Template made;
  made.start = parts(facts["start"]);
  made.answer = parts(facts["answer"]);
  if (!facts["between"].is(Json::null)) made.between = parts(facts["between"]);
  made.why = facts["why"].as_text();
  made.end = facts["end"].as_text();
  const std::string& trim = facts["trim"].as_text();
  made.trims_left = trim == "strip" || trim == "lstrip";
  made.trims_right = trim == "strip" || trim == "rstrip";
  made.strips_system = facts.has("strip") && facts["strip"].as_bool();
  return made;
}

static std::vector<int32_t> ids(const Json& list, int64_t vocabulary) {
  std::vector<int32_t> out;
  for (const Json& x : list.as_list()) {
    int64_t id = x.as_whole();
    if (id < 0 || id >= vocabulary) throw std::invalid_argument("a token is not the model's");
    out.push_back(static_cast<int32_t>(id));
  }
  return out;
}

static Manifest read(const Json& facts) {
  Manifest m;
  m.name = facts["name"].as_text();
  m.mlx = facts["mlx"].as_text();
  m.device = facts["device"].as_text();
  m.dtype = facts["dtype"].as_text();
  bool known = m.dtype == "float32" || m.dtype == "float16" || m.dtype == "bfloat16";
  if (!known || (m.device != "cpu" && m.device != "gpu")) {
    throw std::invalid_argument("it is of an unknown dtype or device");
  }
  m.window = facts.whole_in("window", 1, 1 << 28);
  m.sinks = facts.whole_in("sinks", 0, 1 << 28);
  m.vocabulary = facts.whole_in("vocabulary", 1, 1 << 24);
  m.layers = facts.whole_in("layers", 1, 1000);
  m.heads = facts.whole_in("heads", 1, 1 << 12);
  m.kv_heads = facts.whole_in("kv_heads", 1, m.heads);
  m.head_dim = facts.whole_in("head_dim", 1, 1 << 12);
  m.gates = facts.whole_in("gates", 1, 16);
  for (const Json& x : facts["lengths"].as_list()) m.lengths.push_back(x.as_whole());
  for (size_t i = 0; i < m.lengths.size(); i++) {
    if (i > 0 && m.lengths[i] <= m.lengths[i - 1]) throw std::invalid_argument("its lengths fall");
  }
  if (m.lengths.empty() || m.lengths[0] != 1 || m.chunk() > m.window || m.chunk() > 1 << 16) {
    throw std::invalid_argument("its lengths are wrong");
  }
  m.begin = ids(facts["begin"], m.vocabulary);
  m.ends = ids(facts["ends"], m.vocabulary);
  for (const auto& [name, hash] : facts["files"].as_object()) {
    bool needed = std::find(std::begin(NEEDED), std::end(NEEDED), name) != std::end(NEEDED);
    if (!needed && name != "plain.mlxfn") {
      throw std::invalid_argument("it lists the file " + show(name));
    }
    m.files[name] = hash.as_text();
  }
  m.weights = facts.whole_in("weights", 0, (int64_t{1} << 32) - 1);
  for (const char* name : NEEDED) {
    if (!m.files.count(name)) throw std::invalid_argument(std::string("it lacks ") + name);
  }
  if (const Json& apart = facts["template"]; !apart.is(Json::null)) {
    m.plain = one_template(apart["plain"]);
    m.system = one_template(apart["system"]);
  }
  m.identity = facts["identity"];
  m.identity["model"].as_object();
  m.identity["base"].as_object();
  m.identity["memory"].as_text();
  m.identity["tokenizer"].as_text();
  return m;
}

// Its checksum is of all the rest. The first version had none.
static void check_content(const Json& facts) {
  if (!facts.has("sha256") && facts["version"].as_whole() == 1) return;
  Json rest = facts;
  rest.as_object().erase("sha256");
  if (!is_sum(facts["sha256"].as_text(), sha256(rest.dump()))) {
    throw std::invalid_argument("its checksum does not fit what it says");
  }
}

Manifest Manifest::parse(const std::string& path, std::string_view text) {
  try {
    Json facts = Json::parse(text);
    check_content(facts);
    int64_t version = facts["version"].as_whole();
    if (version != VERSION) {
      throw Error(AHN_DAMAGED, path + ": is of version " + std::to_string(version) +
                                   ", this library reads " + std::to_string(VERSION) +
                                   "; export the model again");
    }
    return read(facts);
  } catch (const std::invalid_argument& e) {
    throw Error(AHN_DAMAGED, path + ": damaged, " + e.what() + "; export the model again");
  }
}

}  // namespace ahn
