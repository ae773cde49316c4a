// A model that has read something and can be asked: read, ask, save, fork. What it does with a
// text is what ahn_mlx/reading/session.py does.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ahn.h"
#include "answer.h"
#include "memoryfile.h"
#include "model.h"

namespace ahn {

using Progress = std::function<bool(size_t, size_t)>;

class Session {
 public:
  Session(std::shared_ptr<Model> model, std::string instructions, bool plain);
  ~Session();
  static std::unique_ptr<Session> load(std::shared_ptr<Model> model, const std::string& file);
  std::unique_ptr<Session> fork();
  void save(const std::string& file);

  // Whether all was read; otherwise `progress` has stopped it.
  bool read(std::string_view text, std::string_view name, const Progress& progress);
  bool read_ids(const std::vector<int32_t>& ids, const Progress& progress);
  // Nothing if `progress` has stopped it before the answer began.
  std::optional<ahn_finish> generate(std::string_view question, const Sampling& sampling,
                                     const Progress& progress, const Piece& piece);

  size_t tokens() const;
  size_t bytes() const;

 private:
  explicit Session(std::shared_ptr<Model> model) : model_(std::move(model)) {}

  // Held while the session does something.
  struct Turn {
    std::atomic<bool>& busy;
    ~Turn() { busy = false; }
  };

  Turn begin();
  void read_step(const int32_t* ids, size_t count);
  Parts opening() const;
  std::vector<int32_t> encode(const Parts& pieces) const;
  std::vector<int32_t> question(std::string_view text) const;
  void check_room(size_t more) const;
  bool go_back_and_read(const std::vector<int32_t>& ids, const Progress& progress);
  void choose_template(bool plain);

  std::shared_ptr<Model> model_;
  std::atomic<bool> busy_ = false;
  std::atomic<int64_t> tokens_ = 0;  // as anyone may ask meanwhile
  std::optional<Template> template_;
  Memory memory_;
  bool broken_ = false;  // interrupted inside of a step
};

}  // namespace ahn
