// manifest.json, which may say anything.
#include "fuzz.h"
#include "manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return guarded([&] {
    ahn::Manifest::parse("manifest.json", {reinterpret_cast<const char*>(data), size});
  });
}
