// What tests look at from inside. Texts and numbers come in and go out as they lie in memory.
#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

#include "error.h"
#include "model.h"
#include "session.h"
#include "worker.h"

using namespace ahn;

static std::vector<uint8_t> all(std::istream& in) {
  return {std::istreambuf_iterator<char>(in), {}};
}

template <typename T>
static void out(const T* data, size_t n) {
  std::cout.write(reinterpret_cast<const char*>(data), n * sizeof(T));
}

static uint32_t number(std::istream& in) {
  uint32_t n = 0;
  in.read(reinterpret_cast<char*>(&n), 4);
  return n;
}

// tokenize TOKENIZER.BIN: texts, each with its length before it; out come their ids, and the
// length of what streaming says of them, and that, likewise.
static int tokenize(const char* file) {
  std::ifstream in(file, std::ios::binary);
  Tokenizer tokenizer(all(in));
  while (true) {
    uint32_t n = number(std::cin);
    if (!std::cin) return 0;
    std::string text(n, '\0');
    std::cin.read(text.data(), n);
    auto ids = tokenizer.encode({"", text});
    Stream stream(tokenizer);
    std::string said;
    for (int32_t id : ids) said += stream.add(id);
    said += stream.end();
    uint32_t counts[2] = {static_cast<uint32_t>(ids.size()), static_cast<uint32_t>(said.size())};
    out(counts, 2);
    out(ids.data(), ids.size());
    out(said.data(), said.size());
  }
}

// pieces TOKENIZER.BIN: the arguments as pieces; ids as text.
static int pieces(const char* file, int argc, char** argv) {
  std::ifstream in(file, std::ios::binary);
  Tokenizer tokenizer(all(in));
  for (int32_t id : tokenizer.encode({argv, argv + argc})) std::cout << id << ' ';
  return 0;
}

// logits MODEL: numbers n, then n ids, again and again: each read at once; their last logits.
static int logits(const char* directory) {
  Model model(directory);
  State state = Worker::shared().run([&] { return model.empty(); });
  while (true) {
    uint32_t n = number(std::cin);
    if (!std::cin) return 0;
    std::vector<int32_t> ids(n);
    std::cin.read(reinterpret_cast<char*>(ids.data()), 4 * n);
    Worker::shared().run([&] {
      auto x = mx::astype(model.read(state, ids.data(), n), mx::float32);
      mx::eval(x);
      out(x.data<float>(), x.size());
    });
  }
}

// decode MODEL STEPS: buffers that moved, bytes of one step beyond what is held, seconds a step.
static int decode(const char* directory, int steps) {
  Model model(directory);
  return Worker::shared().run([&] {
    State state = model.empty();
    std::vector<int32_t> prompt(static_cast<size_t>(model.manifest().capacity()) + 7, 5);
    auto logits = model.read(state, prompt.data(), prompt.size());
    auto id = mx::astype(mx::argmax(logits, -1), mx::int32);
    int moved = 0;
    auto step = [&] {
      logits = model.step(state, id);
      id = mx::astype(mx::argmax(logits, -1), mx::int32);
      auto arrays = state.arrays;
      arrays.push_back(id);
      mx::async_eval(std::move(arrays));
    };
    step();
    mx::eval(state.arrays);
    auto places = [&] {
      std::vector<const void*> at;
      for (size_t i = 0; i < state.arrays.size(); i++) {
        if (i % State::PER_LAYER < 3) at.push_back(state.arrays[i].data<char>());
      }
      return at;
    };
    for (int n = 0; n < steps; n++) {
      auto was = places();
      step();
      mx::eval(state.arrays);
      auto now = places();
      for (size_t i = 0; i < was.size(); i++) moved += was[i] != now[i];
    }
    mx::reset_peak_memory();
    size_t held = mx::get_active_memory();
    auto start = std::chrono::steady_clock::now();
    for (int n = 0; n < steps; n++) {
      auto last = id;
      step();
      last.item<int32_t>();
    }
    mx::eval(state.arrays);
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::cout << moved << ' ' << mx::get_peak_memory() - held << ' ' << seconds / steps << '\n';
    return 0;
  });
}

// memory MODEL TOKENS: MLX's memory after each 10,000 tokens read.
static int memory(const char* directory, size_t tokens) {
  Session session(std::make_shared<Model>(directory), "", true);
  std::vector<int32_t> ids;
  for (size_t n = 0; n < tokens; n += 10000) {
    ids.clear();
    for (size_t i = 0; i < 10000; i++) ids.push_back(static_cast<int32_t>((n + i) * 7 % 200));
    session.read_ids(ids, nullptr);
    std::cout << mx::get_active_memory() << ' ' << mx::get_cache_memory() << std::endl;
  }
  return 0;
}

// manifest FILE: which bits of it, from its begin, can be flipped without its being refused.
static int manifest(const char* file) {
  std::ifstream in(file, std::ios::binary);
  auto data = all(in);
  std::string text(data.begin(), data.end());
  Manifest::parse(file, text);
  for (size_t bit = 0; bit < 8 * text.size(); bit++) {
    text[bit / 8] ^= 1 << bit % 8;
    try {
      Manifest::parse(file, text);
      std::cout << bit << ' ';
    } catch (const Error& e) {
      if (e.status != AHN_DAMAGED || !std::strstr(e.what(), ": damaged, ")) throw;
    }
    text[bit / 8] ^= 1 << bit % 8;
  }
  return 0;
}

int main(int argc, char** argv) try {
  std::string what = argc > 2 ? argv[1] : "";
  if (what == "tokenize") return tokenize(argv[2]);
  if (what == "pieces") return pieces(argv[2], argc - 3, argv + 3);
  if (what == "manifest") return manifest(argv[2]);
  if (what == "logits") return logits(argv[2]);
  if (what == "decode") return decode(argv[2], std::atoi(argv[3]));
  if (what == "memory") return memory(argv[2], std::strtoul(argv[3], nullptr, 10));
  return 2;
} catch (const std::exception& e) {
  std::cerr << "error: " << e.what() << '\n';
  return 1;
}
