// What the fuzz targets share: bytes as a file, and errors that are expected.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "error.h"

// A file with these bytes, for as long as the target runs; the same name each time.
inline const std::string& as_file(const uint8_t* data, size_t size) {
  static const std::string path = [] {
    std::string name = "/dev/shm/ahn-fuzz-" + std::to_string(getpid());
    static std::string kept = name;
    std::atexit([] { unlink(kept.c_str()); });
    return name;
  }();
  FILE* f = std::fopen(path.c_str(), "wb");
  if (!f || std::fwrite(data, 1, size, f) != size) std::abort();
  std::fclose(f);
  return path;
}

// Runs `work`; only the library's own errors may come out of it, and they must say something.
template <typename F>
int guarded(F work) {
  try {
    work();
  } catch (const ahn::Error& e) {
    if (!*e.what()) std::abort();
  }
  return 0;
}
