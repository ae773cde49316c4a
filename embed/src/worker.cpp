#include "worker.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace ahn {

struct Worker::State {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::function<void()>> queue;
};

Worker& Worker::shared() {
  static Worker* worker = new Worker();
  return *worker;
}

Worker::Worker() : state_(new State) {
  std::thread([this] { loop(); }).detach();
}

void Worker::post(std::function<void()> work) {
  {
    std::lock_guard lock(state_->mutex);
    state_->queue.push_back(std::move(work));
  }
  state_->wake.notify_one();
}

void Worker::loop() {
  while (true) {
    std::function<void()> work;
    {
      std::unique_lock lock(state_->mutex);
      state_->wake.wait(lock, [&] { return !state_->queue.empty(); });
      work = std::move(state_->queue.front());
      state_->queue.pop_front();
    }
    work();
  }
}

}  // namespace ahn
