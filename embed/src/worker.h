// The one thread that computes. MLX's streams belong to threads, and an imported function to the
// first stream of its device; so all of it happens here, for as long as the process lives.
#pragma once

#include <functional>
#include <future>
#include <type_traits>

namespace ahn {

class Worker {
 public:
  static Worker& shared();

  // The result of `work` in that thread; the caller waits. What it throws comes back.
  template <typename F>
  auto run(F work) -> std::invoke_result_t<F> {
    std::packaged_task<std::invoke_result_t<F>()> task(std::move(work));
    auto result = task.get_future();
    post([&task] { task(); });
    return result.get();
  }

 private:
  Worker();
  void post(std::function<void()> work);
  void loop();

  struct State;
  State* state_;  // never freed: the thread has no end
};

}  // namespace ahn
