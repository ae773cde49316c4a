#include "safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>

#include "error.h"
#include "json.h"
#include "sha256.h"

namespace ahn {

static constexpr uint64_t MAX_HEADER = 100 << 20;
static constexpr int64_t MAX_DIM = (int64_t{1} << 31) - 1;

size_t item_size(const std::string& dtype) {
  if (dtype == "F32" || dtype == "U32") return 4;
  if (dtype == "F16" || dtype == "BF16") return 2;
  return dtype == "U8" ? 1 : 0;
}

static int open_file(const std::string& path, uint64_t& size) {
  int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat facts;
  if (file < 0 || ::fstat(file, &facts) != 0) {
    int why = errno;
    if (file >= 0) ::close(file);
    throw Error(AHN_NO_FILE, path + ": cannot be read (" + std::strerror(why) + ")");
  }
  if (!S_ISREG(facts.st_mode)) {
    ::close(file);
    throw Error(AHN_NO_FILE, path + ": is no file");
  }
  size = static_cast<uint64_t>(facts.st_size);
  return file;
}

// Whether so many bytes could be read.
static bool read_at(int file, uint64_t at, void* out, uint64_t n) {
  auto to = static_cast<char*>(out);
  while (n > 0) {
    ssize_t got = ::pread(file, to, std::min<uint64_t>(n, 1 << 30), static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got, at += got, n -= got;
  }
  return true;
}

std::vector<uint8_t> read_file(const std::string& path, uint64_t most) {
  uint64_t size;
  int file = open_file(path, size);
  std::vector<uint8_t> data;
  bool fits = size <= most;
  if (fits) data.resize(size);
  bool whole = fits && read_at(file, 0, data.data(), size);
  ::close(file);
  if (!fits) throw Error(AHN_DAMAGED, path + ": is larger than any such file; export it again");
  if (!whole) throw Error(AHN_NO_FILE, path + ": cannot be read to its end");
  return data;
}

TensorFile::TensorFile(const std::string& path, const std::string& what, const std::string& mend)
    : path_(path), what_(what), mend_(mend) {
  file_ = open_file(path, size_);
  try {
    uint8_t start[9] = {};
    uint64_t length = 0;
    if (size_ < 9 || !read_at(file_, 0, start, 9)) broken("it has " + std::to_string(size_) + " bytes");
    if (start[8] != '{') throw Error(AHN_DAMAGED, path + ": is not " + what + "; " + mend);
    for (int i = 7; i >= 0; i--) length = length << 8 | start[i];
    if (length > MAX_HEADER || length > size_ - 8) {
      broken("its header claims " + std::to_string(length) + " bytes");
    }
    std::string header(length, '\0');
    if (!read_at(file_, 8, header.data(), length)) broken("its header cannot be read");
    hash_ = sha256(header);
    start_ = 8 + length;
    try {
      parse(header);
    } catch (const std::invalid_argument& e) {
      broken(std::string("its header is wrong (") + e.what() + ")");
    }
  } catch (...) {
    ::close(file_);
    throw;
  }
}

TensorFile::~TensorFile() { ::close(file_); }

void TensorFile::broken(const std::string& why) const {
  throw Error(AHN_DAMAGED, path_ + ": damaged, " + why + "; " + mend_);
}

void TensorFile::parse(const std::string& header) {
  Json entries = Json::parse(header);
  for (const auto& [name, entry] : entries.as_object()) {
    if (name == "__metadata__") {
      if (entry.is(Json::null)) continue;
      for (const auto& [key, value] : entry.as_object()) metadata_[key] = value.as_text();
      continue;
    }
    TensorInfo info;
    info.dtype = entry["dtype"].as_text();
    uint64_t bytes = item_size(info.dtype);
    if (bytes == 0) broken("tensor " + show(name) + " has dtype " + show(info.dtype));
    for (const Json& n : entry["shape"].as_list()) {
      int64_t size = n.as_whole();
      if (size < 0 || size > MAX_DIM) broken("tensor " + show(name) + " has a wrong shape");
      if (size != 0 && bytes > UINT64_MAX / 2 / static_cast<uint64_t>(size)) {
        broken("tensor " + show(name) + " has a wrong shape");
      }
      bytes *= static_cast<uint64_t>(size);
      info.shape.push_back(size);
    }
    const auto& offsets = entry["data_offsets"].as_list();
    if (info.shape.size() > 8 || offsets.size() != 2 || offsets[0].as_whole() < 0 ||
        offsets[1].as_whole() < offsets[0].as_whole()) {
      broken("tensor " + show(name) + " has wrong offsets");
    }
    info.begin = static_cast<uint64_t>(offsets[0].as_whole());
    info.end = static_cast<uint64_t>(offsets[1].as_whole());
    if (info.end - info.begin != bytes) broken("tensor " + show(name) + " has wrong offsets");
    tensors_[name] = info;
  }
  uint64_t end = 0;
  for (const auto& [name, info] : in_order()) {
    if (info.begin != end) broken("its tensors overlap or leave gaps");
    end = info.end;
  }
  if (end != size_ - start_) broken("it has not the bytes that it promises");
}

std::vector<std::pair<std::string, TensorInfo>> TensorFile::in_order() const {
  std::vector<std::pair<std::string, TensorInfo>> order(tensors_.begin(), tensors_.end());
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second.begin, a.second.end) < std::pair(b.second.begin, b.second.end);
  });
  return order;
}

void TensorFile::read(const TensorInfo& tensor, void* out) const {
  if (!read_at(file_, start_ + tensor.begin, out, tensor.end - tensor.begin)) {
    broken("it has become shorter");
  }
}

// Writing

std::string make_header(std::vector<std::pair<std::string, TensorInfo>>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  std::map<std::string, Json> texts, entries;
  for (const auto& [key, value] : metadata) texts[key] = value;
  entries["__metadata__"] = texts;
  uint64_t begin = 0;
  for (auto& [name, info] : tensors) {
    uint64_t bytes = item_size(info.dtype);
    std::vector<Json> shape;
    for (int64_t n : info.shape) {
      bytes *= static_cast<uint64_t>(n);
      shape.push_back(n);
    }
    info.begin = begin;
    info.end = begin += bytes;
    auto offsets = std::vector<Json>{static_cast<int64_t>(info.begin), static_cast<int64_t>(begin)};
    entries[name] =
        std::map<std::string, Json>{{"dtype", info.dtype}, {"shape", shape}, {"data_offsets", offsets}};
  }
  std::string text = Json(entries).dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string header;
  for (int i = 0; i < 8; i++) header += static_cast<char>(text.size() >> 8 * i & 0xFF);
  return header + text;
}

static std::string real_path(const std::string& path) {
  char* found = ::realpath(path.c_str(), nullptr);
  if (!found) return path;
  std::string real = found;
  ::free(found);
  return real;
}

OutFile::OutFile(const std::string& path) : path_(real_path(path)) {
  std::random_device random;
  char name[32];
  std::snprintf(name, sizeof name, ".%08x.part", random());
  size_t slash = path_.rfind('/');
  size_t base = slash == std::string::npos ? 0 : slash + 1;
  part_ = path_.substr(0, base) + "." + path_.substr(base) + name;
  file_ = ::open(part_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file_ < 0) {
    part_.clear();
    fail("made");
  }
}

OutFile::~OutFile() {
  if (file_ >= 0) ::close(file_);
  if (!part_.empty()) ::unlink(part_.c_str());
}

void OutFile::fail(const char* doing) {
  int why = errno;
  bool full = why == ENOSPC || why == EDQUOT || why == EFBIG;
  throw Error(full ? AHN_NO_SPACE : AHN_NOT_WRITTEN,
              path_ + ": cannot be " + doing + " (" + std::strerror(why) + "); " +
                  (full ? "free some space" : "choose another place") + ", nothing was written");
}

void OutFile::write(const void* data, size_t n) {
  auto from = static_cast<const char*>(data);
  while (n > 0) {
    ssize_t done = ::write(file_, from, std::min<size_t>(n, 1 << 30));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail("written");
    from += done, n -= done;
  }
}

void OutFile::finish() {
  if (::fsync(file_) != 0) fail("written");  // some disks report only here that they are full
  int file = file_;
  file_ = -1;
  if (::close(file) != 0) fail("written");
  if (::rename(part_.c_str(), path_.c_str()) != 0) fail("written");
  part_.clear();
}

}  // namespace ahn
