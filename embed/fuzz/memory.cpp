// A memory file, for the model that AHN_FUZZ_MODEL names.
#include "fuzz.h"
#include "memoryfile.h"
#include "worker.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static ahn::Model* model = new ahn::Model(std::getenv("AHN_FUZZ_MODEL"));
  return guarded([&] {
    const std::string& file = as_file(data, size);
    std::vector<int32_t> unread;
    ahn::Worker::shared().run([&] { ahn::load_memory(*model, file, unread); });
  });
}
