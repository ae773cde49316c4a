#include "session.h"

#include <algorithm>
#include <ctime>

#include "error.h"
#include "text.h"
#include "worker.h"

namespace ahn {

static constexpr int CLEAR = 256;  // tokens of an answer between two clearings of MLX's cache

// Making

Session::Session(std::shared_ptr<Model> model, std::string instructions, bool plain)
    : model_(std::move(model)) {
  if (find_invalid(instructions) != std::string::npos) {
    throw Error(AHN_BAD_TEXT, "the instructions are not UTF-8; convert them");
  }
  if (instructions.size() > LONGEST_SYSTEM) {
    throw Error(AHN_BAD_ARGUMENT, "the instructions are longer than 2^20 bytes; shorten them");
  }
  memory_.system = std::move(instructions);
  memory_.step = std::max<int64_t>(model_->manifest().chunk(), 1);
  memory_.seen = std::vector<uint8_t>((model_->manifest().vocabulary + 7) / 8);
  choose_template(plain);
  memory_.state = Worker::shared().run([&] { return model_->empty(); });
}

void Session::choose_template(bool plain) {
  memory_.chat = !plain;
  const Manifest& m = model_->manifest();
  if (plain) {
    if (!memory_.system.empty()) {
      throw Error(AHN_BAD_ARGUMENT, "instructions need the chat template; drop them, or `plain`");
    }
    return;
  }
  template_ = memory_.system.empty() ? m.plain : m.system;
  if (template_) return;
  throw Error(AHN_TEMPLATE, m.plain ? "the chat template has no place for instructions; drop them"
                                    : "the model has no chat template; make a session that is "
                                      "`plain`, which continues texts");
}

Session::~Session() {
  // Arrays are let go where they are used.
  Worker::shared().run([this] { memory_ = Memory(); });
}

std::unique_ptr<Session> Session::load(std::shared_ptr<Model> model, const std::string& file) {
  std::unique_ptr<Session> session(new Session(std::move(model)));
  std::vector<int32_t> unread;
  session->memory_ =
      Worker::shared().run([&] { return load_memory(*session->model_, file, unread); });
  session->tokens_ = session->memory_.state.at;
  session->choose_template(!session->memory_.chat);
  if (!unread.empty()) session->read_ids(unread, nullptr);
  return session;
}

Session::Turn Session::begin() {
  if (busy_.exchange(true)) {
    throw Error(AHN_BUSY, "the session is busy; wait for it, or fork it before");
  }
  if (broken_) {
    busy_ = false;
    throw Error(AHN_BROKEN, "the session was interrupted inside of a step; load or make another");
  }
  return {busy_};
}

std::unique_ptr<Session> Session::fork() {
  Turn turn = begin();
  std::unique_ptr<Session> other(new Session(model_));
  other->template_ = template_;
  Worker::shared().run([&] { other->memory_ = memory_; });
  other->tokens_ = memory_.state.at;
  return other;
}

void Session::save(const std::string& file) {
  Turn turn = begin();
  Worker::shared().run([&] { save_memory(*model_, memory_, file); });
}

size_t Session::tokens() const { return static_cast<size_t>(tokens_.load()); }

size_t Session::bytes() const {
  const Manifest& m = model_->manifest();
  size_t slot = mx::size_of(model_->dtype()) * (2 * m.kv_heads * m.head_dim + m.heads * m.gates);
  size_t state = sizeof(float) * m.heads * m.head_dim * m.head_dim;
  // What leaves next has a copy.
  return m.layers * (slot * (m.capacity() + 1) + state);
}

// Texts

Parts Session::opening() const {
  if (!template_) return {""};
  if (memory_.turn == "start") return template_->start;
  if (memory_.turn == "read") return {""};
  if (!template_->between) {
    throw Error(AHN_TEMPLATE, "the chat template " + template_->why +
                                  ", so it allows one question and no second; fork the session"
                                  " before you ask");
  }
  Parts parts = *template_->between;
  std::string& first = *parts[0];
  if (memory_.turn == "answered" && first.rfind(template_->end, 0) == 0) {
    first.erase(0, template_->end.size());
  }
  return parts;
}

std::vector<int32_t> Session::encode(const Parts& parts) const {
  std::string_view system = memory_.system;
  if (template_ && template_->strips_system) system = strip_left(strip_right(system));
  std::vector<std::string_view> pieces;
  for (const auto& part : parts) pieces.push_back(part ? std::string_view(*part) : system);
  return model_->tokenizer().encode(pieces);
}

static void check_text(std::string_view text) {
  size_t bad = find_invalid(text);
  if (bad != std::string_view::npos) {
    throw Error(AHN_BAD_TEXT, "the text is not UTF-8: byte " + std::to_string(bad) +
                                  " belongs to no character; convert it to UTF-8");
  }
}

// Token ids from here to where the answer begins.
std::vector<int32_t> Session::question(std::string_view text) const {
  check_text(text);
  const auto& begin = model_->manifest().begin;
  if (!template_) {
    if (text.empty()) return {};
    auto ids = encode({"", std::string(text)});
    if (memory_.turn == "start") ids.insert(ids.begin(), begin.begin(), begin.end());
    return ids;
  }
  if (template_->trims_right) text = strip_right(text);
  Parts parts = opening();
  std::string said;
  if (memory_.turn != "read") {
    said = template_->trims_left ? strip_left(text) : text;
  } else if (!text.empty()) {
    said = memory_.space + "\n\n" + std::string(text);
  }
  parts.push_back(said);
  parts.insert(parts.end(), template_->answer.begin(), template_->answer.end());
  return encode(parts);
}

// Reading

// Positions are counted in 32 bits.
void Session::check_room(size_t more) const {
  if (memory_.state.at + static_cast<int64_t>(more) > MOST_TOKENS) {
    throw Error(AHN_BAD_ARGUMENT, "a session reads at most 2^30 tokens; make another");
  }
}

bool Session::read(std::string_view text, std::string_view name, const Progress& progress) {
  Turn turn = begin();
  check_text(text);
  check_text(name);
  std::string all = memory_.turn == "read" ? memory_.space + std::string(text) : std::string(text);
  std::string_view rest = all;
  std::string space;
  if (template_) {
    if (memory_.turn != "read" && template_->trims_left) rest = strip_left(rest);
    if (template_->trims_right) {
      auto kept = strip_right(rest);
      space = std::string(rest.substr(kept.size())).substr(0, LONGEST_SPACE);
      rest = kept;
    }
  }
  Parts parts = opening();
  parts.push_back(std::string(rest));
  auto ids = encode(parts);
  const auto& begin_ids = model_->manifest().begin;
  if (memory_.turn == "start" && !template_) {
    ids.insert(ids.begin(), begin_ids.begin(), begin_ids.end());
  }
  check_room(ids.size());
  if (memory_.preview.empty()) memory_.preview = preview(text, LONGEST_PREVIEW);
  memory_.space = space;
  memory_.turn = "read";
  if (!go_back_and_read(ids, progress)) return false;
  std::map<std::string, Json> entry;
  entry["name"] = preview(name, LONGEST_NAME);
  entry["read"] = static_cast<int64_t>(std::time(nullptr));
  entry["tokens"] = static_cast<int64_t>(ids.size());
  memory_.texts.push_back(entry);
  if (memory_.texts.size() > MOST_TEXTS) {
    memory_.texts.erase(memory_.texts.begin());
    memory_.earlier++;
  }
  return true;
}

bool Session::read_ids(const std::vector<int32_t>& ids, const Progress& progress) {
  Turn turn = begin();
  model_->check(ids.data(), ids.size());
  check_room(ids.size());
  return go_back_and_read(ids, progress);
}

// In the worker's thread.
void Session::read_step(const int32_t* ids, size_t count) {
  model_->read(memory_.state, ids, count);
  memory_.note(ids, count);
  tokens_ = memory_.state.at;
}

// From the last full step on, in full steps, and the tail at the end.
bool Session::go_back_and_read(const std::vector<int32_t>& ids, const Progress& progress) {
  Worker& worker = Worker::shared();
  size_t total = ids.size(), known = memory_.tail.size();
  size_t step = static_cast<size_t>(memory_.step);
  if (ids.empty()) return true;
  std::vector<int32_t> waiting = memory_.tail;
  waiting.insert(waiting.end(), ids.begin(), ids.end());
  broken_ = true;
  if (known) {
    worker.run([&] {
      undo(*model_, memory_.state, memory_.past);
      memory_.past = Past();
    });
    memory_.tail.clear();
    memory_.traces_after = memory_.traces;
  }
  size_t full = waiting.size() / step * step;
  for (size_t start = 0; start < full; start += step) {
    worker.run([&] { read_step(&waiting[start], step); });
    size_t read = start + step - known;
    if (progress && read < total && !progress(read, total)) {
      broken_ = false;
      return false;
    }
  }
  if (size_t rest = waiting.size() - full) {
    worker.run([&] {
      memory_.past = before(*model_, memory_.state, rest);
      read_step(&waiting[full], rest);
    });
    memory_.tail.assign(waiting.begin() + full, waiting.end());
  }
  broken_ = false;
  if (progress) progress(total, total);
  return true;
}

// Answering

std::optional<ahn_finish> Session::generate(std::string_view text, const Sampling& sampling,
                                            const Progress& progress, const Piece& piece) {
  Turn turn = begin();
  Worker& worker = Worker::shared();
  std::vector<int32_t> ids = question(text);
  bool again = ids.empty();  // the text goes on from its last tokens
  if (again) ids = memory_.tail;
  if (ids.empty()) {
    throw Error(AHN_EMPTY, "nothing to continue from; ask something, or read a text first");
  }
  size_t most = sampling.max_tokens;
  check_room(ids.size() + most);
  // What is computed in here goes where it was computed, however this ends.
  struct Work {
    State state;
    mx::array logits{0.0f}, id{0};
    mx::random::KeySequence keys;
  };
  auto made = worker.run([&] {
    auto work = new Work{memory_.state, mx::array(0.0f), mx::array(0),
                         mx::random::KeySequence(sampling.seed)};
    if (again) undo(*model_, work->state, memory_.past);
    return work;
  });
  auto drop = [&worker](Work* work) {
    worker.run([work] {
      delete work;
      mx::clear_cache();
    });
  };
  std::unique_ptr<Work, decltype(drop)> work(made, drop);
  size_t step = static_cast<size_t>(model_->manifest().chunk());
  for (size_t i = 0; i < ids.size(); i += step) {
    size_t n = std::min(step, ids.size() - i);
    worker.run([&] { work->logits = model_->read(work->state, &ids[i], n); });
    if (progress && !progress(i + n, ids.size())) return std::nullopt;
  }
  worker.run([&] { work->id = sample(work->logits, sampling, work->keys); });
  const auto& ends = model_->manifest().ends;
  Stream stream(model_->tokenizer());
  Spoken spoken(sampling.stops, piece);
  ahn_finish finish = AHN_FINISH_LENGTH;
  std::vector<int32_t> said = ids;
  for (size_t n = 1; n <= most; n++) {
    int32_t id = worker.run([&] {
      // The next token is under way before this one is known.
      mx::array now = work->id;
      work->logits = model_->step(work->state, now);
      work->id = sample(work->logits, sampling, work->keys);
      std::vector<mx::array> all = work->state.arrays;
      all.push_back(work->id);
      mx::async_eval(std::move(all));
      if (n % CLEAR == 0) mx::clear_cache();
      return now.item<int32_t>();
    });
    said.push_back(id);
    if (std::find(ends.begin(), ends.end(), id) != ends.end()) {
      finish = AHN_FINISH_END;
      break;
    }
    if (!spoken.say(stream.add(id), false)) {
      finish = spoken.stopped ? AHN_FINISH_STOP : AHN_FINISH_CALLER;
      break;
    }
  }
  if (finish == AHN_FINISH_END || finish == AHN_FINISH_LENGTH) {
    if (!spoken.say(stream.end(), true) && spoken.stopped) finish = AHN_FINISH_STOP;
  }
  worker.run([&] {
    mx::eval(work->state.arrays);
    std::swap(memory_.state, work->state);
    tokens_ = memory_.state.at;
    memory_.past = Past();
  });
  memory_.note(said.data(), said.size());
  memory_.tail.clear();
  memory_.traces = memory_.traces_after;
  memory_.space.clear();
  memory_.turn = finish == AHN_FINISH_END ? "answered" : "cut";
  return finish;
}

}  // namespace ahn
