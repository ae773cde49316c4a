// The header of weights.safetensors, or of anything that claims to be one.
#include <vector>

#include "fuzz.h"
#include "safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return guarded([&] {
    ahn::TensorFile file(as_file(data, size), "a file of weights", "export the model again");
    for (const auto& [name, info] : file.tensors()) {
      std::vector<uint8_t> bytes(info.end - info.begin);
      file.read(info, bytes.data());
    }
  });
}
