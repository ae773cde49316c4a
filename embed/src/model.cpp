#include "model.h"

#include <algorithm>
#include <cstring>

#include "adler32.h"
#include "error.h"
#include "safetensors.h"
#include "sha256.h"
#include "worker.h"

namespace ahn {

static constexpr uint64_t LARGEST = uint64_t{1} << 30;  // of a file that is read whole

struct Model::Functions {
  mx::ImportedFunction step;
  mx::Kwargs weights;
  // The step of one token, with what is elementwise fused, where MLX can do so.
  std::function<std::vector<mx::array>(const mx::Args&)> token;
};

mx::Dtype dtype_of(const std::string& name) {
  if (name == "F16" || name == "float16") return mx::float16;
  if (name == "BF16" || name == "bfloat16") return mx::bfloat16;
  if (name == "U32") return mx::uint32;
  return name == "U8" ? mx::uint8 : mx::float32;
}

std::string stored(mx::Dtype dtype) {
  if (dtype == mx::float16) return "F16";
  if (dtype == mx::bfloat16) return "BF16";
  return dtype == mx::uint32 ? "U32" : "F32";
}

// Opening

static void check_hash(const std::string& path, const std::string& found,
                       const std::string& expected) {
  if (is_sum(expected, found)) return;
  throw Error(AHN_DAMAGED, path + ": damaged, it is not the file that manifest.json was written"
                                  " with; export the model again");
}

// A small file that is what the manifest says.
static std::vector<uint8_t> checked_file(const std::string& path, const std::string& expected) {
  auto data = read_file(path, LARGEST);
  check_hash(path, sha256({reinterpret_cast<const char*>(data.data()), data.size()}), expected);
  return data;
}

// The version that a function file begins with: its length as a 64-bit number, then its text.
static std::string exporter(const std::vector<uint8_t>& file) {
  uint64_t n = 0;
  if (file.size() >= 8) std::memcpy(&n, file.data(), 8);
  if (n == 0 || n > 32 || file.size() < 8 + n) return "";
  return {reinterpret_cast<const char*>(file.data()) + 8, static_cast<size_t>(n)};
}

static void check_version(const std::string& path, const std::string& found) {
  std::string here = mx::version();
  if (found == here) return;
  throw Error(AHN_OTHER_MLX, path + ": was exported by MLX " + show(found) + ", this app has " +
                                 here + "; export the model with that version");
}

static mx::array empty_array(const TensorInfo& info) {
  mx::Shape shape(info.shape.begin(), info.shape.end());
  return mx::array(mx::allocator::malloc(info.end - info.begin), shape, dtype_of(info.dtype));
}

Model::Model(const std::string& directory) : directory_(directory) {
  std::string path = directory + "/manifest.json";
  auto text = read_file(path, 16 << 20);
  manifest_ = Manifest::parse(path, {reinterpret_cast<const char*>(text.data()), text.size()});
  check_version(path, manifest_.mlx);
  auto version = [&](const std::string& name) {
    std::string file = directory + "/" + name;
    check_version(file, exporter(checked_file(file, manifest_.files.at(name))));
  };
  version("model.mlxfn");
  if (manifest_.files.count("plain.mlxfn")) version("plain.mlxfn");
  if (manifest_.device == "gpu" && !mx::is_available(mx::Device::gpu)) {
    throw Error(AHN_OTHER_DEVICE, directory + ": was exported for a GPU, which this machine lacks"
                                              "; export it on a machine like this one");
  }
  dtype_ = dtype_of(manifest_.dtype);
  tokenizer_ = std::make_unique<Tokenizer>(
      checked_file(directory + "/tokenizer.bin", manifest_.files.at("tokenizer.bin")));
  Worker::shared().run([this] { load(); });
}

Model::~Model() {
  Worker::shared().run([this] {
    functions_.reset();
    mx::clear_cache();
  });
}

void Model::load() {
  mx::set_default_device(manifest_.device == "gpu" ? mx::Device::gpu : mx::Device::cpu);
  // The first stream of the device must be this thread's: the function will run on it.
  mx::default_stream(mx::default_device());
  TensorFile file(directory_ + "/weights.safetensors", "a file of weights",
                  "export the model again");
  check_hash(file.path(), file.header_hash(), manifest_.files.at("weights.safetensors"));
  mx::Kwargs weights;
  Adler32 sum;
  for (const auto& [name, info] : file.in_order()) {
    mx::array x = empty_array(info);
    file.read(info, x.data<char>());
    sum.update(x.data<char>(), x.nbytes());
    weights.emplace(name, std::move(x));
  }
  if (sum.value() != manifest_.weights) file.broken("its bytes are not those that were exported");
  functions_.reset(new Functions{mx::import_function(directory_ + "/model.mlxfn"), weights, {}});
  try {
    for (int64_t n : manifest_.lengths) check_shapes(n);
    if (manifest_.files.count("plain.mlxfn")) compare();
    functions_->token = mx::compile([f = functions_.get()](const mx::Args& args) {
      return f->step(args, f->weights);
    });
    State state = empty();
    int32_t id = 0;
    read(state, &id, 1);
  } catch (const std::invalid_argument&) {  // there is no trace of such shapes
    throw Error(AHN_DAMAGED, directory_ + "/manifest.json: damaged, what it says of window, sinks,"
                                          " heads, layers, dtype, lengths or vocabulary is not what"
                                          " model.mlxfn was traced with; export the model again");
  }
}

// Of the trace for n tokens; nothing is computed. Throws std::invalid_argument.
void Model::check_shapes(int64_t n) const {
  State state = empty();
  std::vector<mx::Shape> shapes;
  for (const mx::array& x : state.arrays) shapes.push_back(x.shape());
  auto logits = call(state, mx::zeros({1, static_cast<int>(n)}, mx::int32), n);
  bool same = logits.shape() == mx::Shape{1, static_cast<int>(manifest_.vocabulary)};
  same = same && state.arrays.size() == shapes.size();
  for (size_t i = 0; same && i < shapes.size(); i++) same = state.arrays[i].shape() == shapes[i];
  if (!same) throw std::invalid_argument("shapes");
}

// The step with kernels serves if it agrees with the one without on this machine: on a state that
// is full and has wrapped, of numbers that are as good as any.
void Model::compare() {
  auto plain = mx::import_function(directory_ + "/plain.mlxfn");
  std::vector<int32_t> ids;
  for (int64_t i = 0; i <= manifest_.chunk(); i++) {
    ids.push_back(static_cast<int32_t>((7 * i + i * i) % manifest_.vocabulary));
  }
  auto logits = [&] {
    mx::random::KeySequence keys(0);
    State state = empty();
    state.at = manifest_.capacity() + manifest_.window / 3;
    for (size_t i = 0; i < state.arrays.size(); i++) {
      mx::array& x = state.arrays[i];
      auto noise = mx::random::normal(x.shape(), mx::float32, keys.next());
      // Gates that hardly write and hardly forget.
      bool gates = i % State::PER_LAYER % 3 == 2;
      noise = gates ? mx::multiply(mx::abs(noise), mx::array(-0.01f)) : noise;
      x = mx::astype(noise, x.dtype());
    }
    mx::array first = read(state, ids.data(), ids.size() - 1);
    mx::array second = read(state, &ids.back(), 1);
    return mx::astype(mx::concatenate({first, second}), mx::float32);
  };
  auto found = logits();
  std::swap(functions_->step, plain);
  auto expected = logits();
  float off = mx::max(mx::abs(mx::subtract(found, expected))).item<float>();
  float size = mx::max(mx::abs(expected)).item<float>();
  float bound = dtype_ == mx::float32 ? 1e-3f : 5e-2f;
  // The other way round a NaN would agree.
  if (off <= bound * size) std::swap(functions_->step, plain);
}

// Computing

State Model::empty() const {
  const Manifest& m = manifest_;
  int H = static_cast<int>(m.heads), K = static_cast<int>(m.kv_heads);
  int D = static_cast<int>(m.head_dim), G = static_cast<int>(m.gates);
  State state;
  for (int64_t layer = 0; layer < m.layers; layer++) {
    for (int slots : {static_cast<int>(m.capacity()), 1}) {
      state.arrays.push_back(mx::zeros({1, K, slots, D}, dtype_));
      state.arrays.push_back(mx::zeros({1, K, slots, D}, dtype_));
      state.arrays.push_back(mx::zeros({1, H, slots, G}, dtype_));
    }
    state.arrays.push_back(mx::zeros({1, H, D, D}, mx::float32));
  }
  return state;
}

void Model::check(const int32_t* ids, size_t count) const {
  for (size_t i = 0; i < count; i++) {
    if (ids[i] < 0 || ids[i] >= manifest_.vocabulary) {
      throw Error(AHN_BAD_ARGUMENT, "token " + std::to_string(ids[i]) + " is not among the model's " +
                                        std::to_string(manifest_.vocabulary));
    }
  }
}

mx::array Model::call(State& state, mx::array ids, int64_t n) const {
  mx::Args args;
  args.reserve(3 + state.arrays.size());
  args.push_back(std::move(ids));
  args.push_back(mx::array({static_cast<int32_t>(state.at)}));
  args.push_back(mx::array({static_cast<int32_t>(n)}));
  for (mx::array& x : state.arrays) args.push_back(std::move(x));
  state.arrays.clear();
  bool fused = args[0].size() == 1 && functions_->token;
  auto out = fused ? functions_->token(args) : functions_->step(args, functions_->weights);
  // Whoever holds a buffer while it is written has it copied.
  args.clear();
  mx::array logits = std::move(out[0]);
  out.erase(out.begin());
  state.arrays = std::move(out);
  state.at += n;
  return logits;
}

mx::array Model::read(State& state, const int32_t* ids, size_t count) const {
  const auto& lengths = manifest_.lengths;
  mx::array logits(0.0f);
  for (size_t done = 0; done < count;) {
    int64_t left = static_cast<int64_t>(count - done);
    // The shortest trace that takes all, or the longest there is.
    auto found = std::lower_bound(lengths.begin(), lengths.end(), left);
    int64_t L = found == lengths.end() ? lengths.back() : *found;
    // Several short ones cost less than a long one that is mostly padding.
    if (L > left && found - lengths.begin() >= 2 && 2 * left < L) L = *(found - 1);
    int64_t n = std::min(L, left);
    std::vector<int32_t> padded(ids + done, ids + done + n);
    padded.resize(L);
    logits = call(state, mx::array(padded.data(), {1, static_cast<int>(L)}, mx::int32), n);
    std::vector<mx::array> all = state.arrays;
    all.push_back(logits);
    // The graph must not hold the state: eval detaches what it has computed.
    mx::eval(std::move(all));
    mx::clear_cache();
    done += n;
  }
  return logits;
}

mx::array Model::step(State& state, const mx::array& id) const {
  return call(state, mx::reshape(id, {1, 1}), 1);
}

}  // namespace ahn
